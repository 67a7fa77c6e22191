"""Preferences learned where the reference is a copy: whole models, PiSSA, an adapter that goes on learning."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import Reason
from support.gang import make_tiny_model
from support.preferring import PreferenceGang, make_preference_gang
from support.s3 import S3, running_s3

pytestmark = [pytest.mark.integration, pytest.mark.gang]

DPO = {"type": "DPO", "dpo": {"beta": 0.5}}
FULL: dict[str, Any] = {"tuning": {"type": "Full"}, "training": {"maxSteps": 6, "learningRate": 0.003}}
LORA = {"type": "LoRA", "lora": {"rank": 4, "alpha": 8}}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def history(gang: PreferenceGang) -> list[dict[str, float]]:
    text = gang.s3.get(f"{gang.config.output_uri}{gang.attempt_uid}/metrics.jsonl").decode()
    return [entry for entry in map(json.loads, text.splitlines()) if "step" in entry]


def learned_from_itself(gang: PreferenceGang) -> dict[str, float]:
    """Runs it: before the first step the policy is the reference, and then it leaves it in the right direction."""
    result = gang.run().result
    assert result
    figures = result.metrics
    assert figures["rewardMarginBefore"] == pytest.approx(0, abs=1e-6)
    assert figures["evalLossBefore"] == pytest.approx(math.log(2), abs=1e-6)
    assert figures["evalLoss"] < figures["evalLossBefore"]
    assert figures["rewardMargin"] > 0.1
    return figures


def test_a_whole_model_is_compared_with_itself_under_zero_and_after_a_restart(
    s3: S3, model: Path, tmp_path: Path
) -> None:
    alone = make_preference_gang(
        tmp_path / "alone", s3, model, DPO, bucket_prefix="alone", workers=1, micro_batch=16, **FULL
    )
    figures = learned_from_itself(alone)
    # What is published is the model, and nothing of the reference.
    assert "model.safetensors" in {path.name for path in alone.published(tmp_path / "published").iterdir()}

    gang = make_preference_gang(tmp_path / "0", s3, model, DPO, bucket_prefix="gang", strategy="ZeRO3", **FULL)
    gang.start()
    gang.until(lambda: len(gang.events("step")) >= 2, timeout=180)
    gang.signal(0)
    assert {message.reason for message in gang.wait()} == {Reason.PREEMPTED}, gang.log()
    after = make_preference_gang(tmp_path / "1", s3, model, DPO, bucket_prefix="gang", strategy="ZeRO3", **FULL)
    after.attempt_uid = "attempt-1"
    message = after.run()
    assert message.result
    assert message.resumed_from_step
    for name in ("loss", "reward_margin", "grad_norm"):
        known = [entry[name] for entry in history(alone)]
        assert [entry[name] for entry in history(after)] == pytest.approx(known, abs=1e-3, rel=1e-3), name
    assert message.result.metrics["rewardMargin"] == pytest.approx(figures["rewardMargin"], abs=5e-3)


def test_an_adapter_that_goes_on_is_compared_with_what_it_was(s3: S3, model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(tmp_path / "earlier")
    base = {"uri": "s3://bucket/models/tiny/", "adapterUri": "s3://bucket/earlier/"}
    gang = make_preference_gang(
        tmp_path / "gang", s3, model, DPO, bucket_prefix="earlier", strategy="ZeRO2", tuning=LORA, baseModel=base
    )
    for rank in range(2):
        gang.work(rank).root.mkdir(parents=True)
        gang.work(rank).adapter.symlink_to(tmp_path / "earlier")
    learned_from_itself(gang)
    names = {path.name for path in gang.published(tmp_path / "published").iterdir()}
    assert "adapter_model.safetensors" in names


def test_pissa_is_compared_with_its_first_factors(s3: S3, model: Path, tmp_path: Path) -> None:
    tuning = {"type": "LoRA", "lora": {"rank": 4, "alpha": 4, "initialization": "PiSSA"}}
    training = {"maxSteps": 6, "learningRate": 0.01}
    gang = make_preference_gang(
        tmp_path, s3, model, DPO, bucket_prefix="pissa", workers=1, micro_batch=16, tuning=tuning, training=training
    )
    learned_from_itself(gang)
