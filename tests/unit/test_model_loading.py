"""Loading a tenant's files in the gang: whose fault a failure is."""

from pathlib import Path

import pytest
import torch
from torch.distributed import DistError

from finetune_api.failures import FineTuneError, Reason
from finetune_trainer.model import load_model, reading
from support.tiny import make_tiny_model


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a size\nof x"), LookupError("no codec"), TypeError()])
def test_what_a_library_raises_over_a_tenants_files_is_no_reason_to_try_again(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(FineTuneError, match=r"^the base model cannot be loaded: ") as caught,
        reading("the base model cannot be loaded", tmp_path),
    ):
        raise error
    assert caught.value.reason == Reason.MODEL_INVALID
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError(), DistError("x")])
def test_what_the_machine_lacks_is_not_the_models_fault(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)), reading("the base model cannot be loaded", tmp_path):
        raise error


def test_weights_that_cannot_be_read_name_the_model(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(FineTuneError, match=r"^the base model cannot be loaded: ") as caught:
        load_model(tmp_path, torch.float32, "sdpa", None)
    assert caught.value.reason == Reason.MODEL_INVALID
