"""The model as it was before: kept where switching an adapter off does not bring it back."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_api import job
from finetune_api.stages import effective, keeps_reference
from finetune_api.tuning import Tuning
from finetune_trainer.methods.kto import KTOTrainer
from finetune_trainer.methods.losses import kl_estimate
from finetune_trainer.methods.reference import FirstValues
from finetune_trainer.model import trained_parameters
from finetune_trainer.preferences import collate_pairs, collate_unpaired, others_of
from finetune_trainer.shards import Unpaired
from finetune_trainer.tuning import tune
from support.gang import make_tiny_model
from support.manifests import job_manifest
from unit.test_preference_losses import ROWS, Reference, answered, examples, pairs_of

PISSA = {"type": "LoRA", "lora": {"initialization": "PiSSA", "rank": 4}}
ADAPTER = {"uri": "s3://models/b/", "adapterUri": "s3://models/a/"}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("spec", "keeps"),
    [
        ({}, [False]),
        ({"method": {"type": "DPO"}}, [False]),
        ({"method": {"type": "DPO"}, "tuning": {"type": "Full"}}, [True]),
        ({"method": {"type": "KTO"}, "tuning": {"type": "Freeze"}}, [True]),
        ({"method": {"type": "DPO"}, "tuning": PISSA}, [True]),
        ({"method": {"type": "KTO"}, "baseModel": ADAPTER}, [True]),
        ({"method": {"type": "ORPO"}, "tuning": {"type": "Full"}}, [False]),
        ({"tuning": {"type": "Full"}}, [False]),
        ({"method": {"type": "PPO"}, "tuning": {"type": "Full"}}, [True]),
        ({"method": {"type": "GRPO"}, "tuning": {"type": "Full"}}, [False]),
        ({"method": {"type": "GRPO", "grpo": {"beta": 0.1}}, "tuning": {"type": "Full"}}, [True]),
        ({"stages": [{"name": "a"}, {"name": "b", "method": {"type": "DPO"}}]}, [False, True]),
        (
            {
                "stages": [
                    {"name": "a", "tuning": {"type": "Full"}},
                    {"name": "b", "method": {"type": "DPO"}, "tuning": {"type": "LoRA"}},
                ]
            },
            [False, False],
        ),
    ],
)
def test_where_a_copy_is_kept(spec: dict[str, Any], keeps: list[bool]) -> None:
    stages = effective(job.parse(job_manifest(**spec)).spec)
    assert [keeps_reference(stages, stage.number) for stage in stages] == keeps


@pytest.fixture(params=["Full", "Freeze", "PiSSA", "PromptTuning", "DoRA"])
def learner(request: pytest.FixtureRequest, tiny: Path) -> Any:
    """A model that is tuned, and has not learned anything yet."""
    spec = PISSA if request.param == "PiSSA" else {"type": request.param}
    base = AutoModelForCausalLM.from_pretrained(tiny)
    return tune(base, Tuning.model_validate(spec), "s3://b/", 0, False, masters=True).eval()


def kept(model: Any) -> FirstValues:
    reference = FirstValues()
    reference.begin(SimpleNamespace(model=model, model_wrapped=model, is_deepspeed_enabled=False))
    return reference


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def learn(model: Any) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter += 0.1 * torch.randn_like(parameter)


def test_the_reference_stays_what_the_model_was(learner: Any) -> None:
    names, first = list(learner.state_dict()), logits_of(learner)
    reference = kept(learner)
    learn(learner)
    later = logits_of(learner)
    assert not torch.allclose(later, first, atol=1e-2)
    with reference.active():
        assert torch.equal(logits_of(learner), first)
    assert torch.equal(logits_of(learner), later)
    assert list(learner.state_dict()) == names


def test_what_autocast_has_cast_is_not_mixed_up(learner: Any) -> None:
    reference = kept(learner)
    learn(learner)
    with torch.autocast("cpu", torch.bfloat16):
        alone = logits_of(learner)
    with torch.autocast("cpu", torch.bfloat16):
        with reference.active():
            was = logits_of(learner)
        assert torch.equal(logits_of(learner), alone)
    assert not torch.allclose(was, alone, atol=1e-2)


def test_dpo_of_a_whole_model_has_the_loss_of_trl(tiny: Path, tmp_path: Path) -> None:
    theirs = Reference("DPO", {"beta": 0.3}, tiny, tmp_path, lora=False)
    ours = theirs.ours({"type": "DPO", "dpo": {"beta": 0.3}})
    ours.reference = kept(theirs.trl.model)
    batch = collate_pairs(pairs_of(theirs.features), np.arange(ROWS))
    assert float(ours.scored(theirs.trl.model, batch).sums[0]) / ROWS == pytest.approx(np.log(2), abs=1e-6)
    learn(theirs.trl.model)
    theirs.agree(ours, batch, [ROWS], theirs.trl.compute_loss(theirs.trl.model, theirs.batch))


def test_kto_of_a_whole_model_has_the_loss_of_trl(tiny: Path, tmp_path: Path) -> None:
    theirs = Reference("KTO", {"beta": 0.3, "per_device_train_batch_size": 2 * ROWS}, tiny, tmp_path, lora=False)
    ours = theirs.ours({"type": "KTO", "kto": {"beta": 0.3}})
    assert isinstance(ours, KTOTrainer)
    ours.reference = kept(theirs.trl.model)
    learn(theirs.trl.model)
    rows = [answered(row["prompt_ids"], row["completion_ids"]) for row in theirs.features]
    data = Unpaired(examples(rows), np.array([row["label"] for row in theirs.features]))
    ids = np.arange(2 * ROWS)
    batch = collate_unpaired(data, ids, np.array([others_of(ids)[i] for i in range(2 * ROWS)]), 64)
    ours.kl = kl_estimate(ours._drift([batch], torch.device("cpu")), 2 * ROWS)
    theirs.agree(ours, batch, [2 * ROWS], theirs.trl.compute_loss(theirs.trl.model, theirs.batch))
