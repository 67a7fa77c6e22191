"""Weights that are no numbers are found before anything is trained, and named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune_api.failures import FineTuneError, Reason
from finetune_trainer.soundness import check_finite


@pytest.mark.parametrize(
    ("dtype", "value", "found"),
    [
        (torch.bfloat16, float("nan"), "1 NaN of 12"),
        (torch.float16, float("inf"), "1 infinite of 12"),
        (torch.float32, float("-inf"), "1 infinite of 12"),
        (torch.float64, float("nan"), "1 NaN of 12"),
    ],
)
def test_a_value_that_is_no_number_is_named_with_its_tensor_and_file(
    dtype: torch.dtype, value: float, found: str, tmp_path: Path
) -> None:
    good = torch.zeros(3, 4, dtype=dtype)
    bad = good.clone()
    bad[1, 2] = value
    save_file({"a.weight": good}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b.weight": bad, "c.weight": good}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(FineTuneError) as error:
        check_finite(tmp_path, "spec.baseModel.uri")
    assert error.value.reason is Reason.MODEL_INVALID
    assert str(error.value) == (
        f"spec.baseModel.uri: model-00002-of-00002.safetensors: the tensor b.weight holds {found} values; "
        "each must be a finite number"
    )


def test_each_rank_reads_its_share_and_all_of_them_everything(tmp_path: Path) -> None:
    for broken in range(5):
        tensors = {f"t{i}": torch.full((2,), float("nan") if i == broken else 1.0) for i in range(5)}
        save_file(tensors, tmp_path / "model.safetensors")
        told = 0
        for rank in range(3):
            try:
                check_finite(tmp_path, "spec.baseModel.uri", rank, 3)
            except FineTuneError:
                told += 1
        assert told == 1


def test_what_is_no_float_and_what_is_empty_is_sound(tmp_path: Path) -> None:
    tensors = {"mask": torch.zeros(4, dtype=torch.bool), "ids": torch.arange(3), "none": torch.zeros(0)}
    save_file(tensors | {"eight": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    check_finite(tmp_path, "spec.baseModel.uri")
