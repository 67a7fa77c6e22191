"""Each way of tuning on one and on two workers: both learn the same, and what is published loads anywhere."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.manifest import Manifest
from finetune_api.modelfiles import model_shape, parse_header
from finetune_api.sizing import trainable_parameters
from finetune_api.tuning import Tuning
from support.gang import Gang, make_gang, make_tiny_model
from support.s3 import S3, running_s3

pytestmark = [pytest.mark.integration, pytest.mark.gang]

SMALL = {"rank": 4, "alpha": 8}
TUNINGS: dict[str, dict[str, Any]] = {
    "DoRA": {"type": "DoRA", "lora": SMALL},
    "rsLoRA": {"type": "LoRA", "lora": SMALL | {"scaling": "RankStabilized"}},
    "PiSSA": {"type": "LoRA", "lora": SMALL | {"initialization": "PiSSA"}},
    "DoRA-PiSSA-rs": {"type": "DoRA", "lora": SMALL | {"initialization": "PiSSA", "scaling": "RankStabilized"}},
    "QLoRA": {"type": "QLoRA", "lora": SMALL},
    "IA3": {"type": "IA3"},
    "PromptTuning": {"type": "PromptTuning", "promptTuning": {"tokens": 5}},
    "PrefixTuning": {"type": "PrefixTuning", "prefixTuning": {"tokens": 5}},
    "Freeze": {"type": "Freeze", "freeze": {"trainableLayers": 1}},
    "Full": {"type": "Full"},
}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def run(directory: Path, s3: S3, model: Path, name: str, prefix: str, **changes: Any) -> Gang:
    """A finished gang of 8 steps."""
    rate = 0.002 if name in ("Freeze", "Full") else 0.02
    settings = {"training": {"learningRate": rate}, "tuning": TUNINGS[name], "bucket_prefix": prefix}
    gang = make_gang(directory, s3, model, **(settings | changes))
    gang.run()
    return gang


def published_loss(gang: Gang, directory: Path, model: Path) -> float:
    """On the validation data, of what was published, by peft and transformers alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    gang.published(directory)
    tuning = gang.config.spec.tuning
    if not tuning.is_adapter:
        loaded = AutoModelForCausalLM.from_pretrained(directory)
    else:
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        quantized = {"quantization_config": nf4} if tuning.type == "QLoRA" else {}
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, **quantized), directory)
    if tuning.type == "QLoRA":
        loaded.train()  # when it evaluates, bitsandbytes takes a kernel that rounds to bfloat16
    return loss_of(loaded, gang)


def loss_of(loaded: Any, gang: Gang) -> float:
    import torch

    loss = count = 0.0
    with torch.no_grad():
        for ids, labels in gang.validation:
            logits = loaded(input_ids=torch.tensor([ids])).logits[0, -len(ids) : -1]
            targets = torch.tensor(labels[1:])
            loss += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
            count += int((targets != -100).sum())
    return loss / count


@pytest.mark.parametrize("name", TUNINGS)
def test_one_worker_and_two_learn_the_same_and_publish_it(name: str, s3: S3, model: Path, tmp_path: Path) -> None:
    prefix = name.lower()
    merged = TUNINGS[name]["type"] in ("LoRA", "DoRA", "QLoRA", "IA3")
    output = {"uri": f"s3://bucket/{prefix}-1/", "merged": merged}
    one = run(tmp_path / "1", s3, model, name, f"{prefix}-1", workers=1, micro_batch=8, output=output)
    two = run(tmp_path / "2", s3, model, name, f"{prefix}-2", micro_batch=8)
    assert two.losses() == pytest.approx(one.losses(), abs=1e-4)
    for gang, directory in ((one, tmp_path / "a"), (two, tmp_path / "b")):
        loss = published_loss(gang, directory, model)
        manifest = Manifest.model_validate_json((directory / "manifest.json").read_bytes())
        assert manifest.run
        metrics = manifest.run.metrics
        assert metrics["evalLoss"] < metrics["evalLossBefore"]
        assert loss == pytest.approx(metrics["evalLoss"], abs=1e-4)
        assert manifest.kind == ("Adapter" if gang.config.spec.tuning.is_adapter else "Model")
        for path in directory.glob("*.*"):
            assert str(tmp_path).encode() not in path.read_bytes(), f"{path.name} names a folder of the pod"
    if merged:
        assert_merged(one, tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("DoRA", "ZeRO2"),
        ("PiSSA", "ZeRO3"),
        ("PromptTuning", "ZeRO2"),
        ("Freeze", "ZeRO3"),
        ("Full", "ZeRO1"),
        ("Full", "ZeRO2"),
        ("Full", "ZeRO3"),
    ],
)
def test_zero_publishes_what_it_learned(name: str, strategy: str, s3: S3, model: Path, tmp_path: Path) -> None:
    gang = run(tmp_path / "g", s3, model, name, f"{name}-{strategy}".lower(), strategy=strategy, micro_batch=8)
    final = json.loads(s3.get(f"{gang.config.output_uri}attempt-0/metrics.jsonl").splitlines()[-1])["final"]
    assert final["evalLoss"] < final["evalLossBefore"]
    assert published_loss(gang, tmp_path / "out", model) == pytest.approx(final["evalLoss"], abs=1e-4)


@pytest.mark.parametrize(("name", "strategy"), [("DoRA", "DDP"), ("IA3", "DDP"), ("PrefixTuning", "ZeRO2")])
def test_an_earlier_adapter_is_where_training_starts(
    name: str, strategy: str, s3: S3, model: Path, tmp_path: Path
) -> None:
    prefix = f"earlier-{name}".lower()
    first = run(tmp_path / "1", s3, model, name, prefix, workers=1, micro_batch=16)
    earlier = first.published(tmp_path / "adapter")
    learned = Manifest.model_validate_json((earlier / "manifest.json").read_bytes())
    assert learned.run
    base = {"uri": "s3://bucket/models/tiny/", "adapterUri": f"{first.config.output_uri}attempt-0/"}
    second = make_gang(
        tmp_path / "2",
        s3,
        model,
        bucket_prefix=f"{prefix}-2",
        strategy=strategy,
        micro_batch=8,
        tuning=TUNINGS[name],
        baseModel=base,
    )
    for rank in range(2):
        second.work(rank).root.mkdir(parents=True)
        second.work(rank).adapter.symlink_to(earlier)
    result = second.run().result
    assert result
    assert result.metrics["evalLossBefore"] == pytest.approx(learned.run.metrics["evalLoss"], abs=1e-5)
    assert result.metrics["evalLoss"] < learned.run.metrics["evalLoss"]


def test_zero_3_merges_too(s3: S3, model: Path, tmp_path: Path) -> None:
    output = {"uri": "s3://bucket/merged-3/", "merged": True}
    gang = run(tmp_path / "g", s3, model, "rsLoRA", "merged-3", strategy="ZeRO3", micro_batch=8, output=output)
    assert_merged(gang, gang.published(tmp_path / "out"))


def assert_merged(gang: Gang, directory: Path) -> None:
    """The merged model needs no peft."""
    from transformers import AutoModelForCausalLM

    manifest = Manifest.model_validate_json((directory / "manifest.json").read_bytes())
    assert {"merged/model.safetensors", "merged/config.json", "merged/tokenizer.json"} <= {
        entry.key for entry in manifest.files
    }
    assert manifest.run
    loss = loss_of(AutoModelForCausalLM.from_pretrained(directory / "merged"), gang)
    assert loss == pytest.approx(manifest.run.metrics["evalLoss"], abs=1e-4)
    assert str(gang.directory).encode() not in (directory / "merged" / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "first", "second"), [("PiSSA", "DDP", "DDP"), ("PrefixTuning", "DDP", "ZeRO2"), ("Full", "ZeRO3", "DDP")]
)
def test_what_is_resumed_ends_where_the_uninterrupted_ends(
    name: str, first: str, second: str, s3: S3, model: Path, tmp_path: Path
) -> None:
    prefix = f"resume-{name}".lower()
    every_four = {"checkpoint": {"interval": {"type": "Steps", "steps": 4}}, "micro_batch": 8}
    gang = run(tmp_path / "0", s3, model, name, prefix, strategy=first, **every_four)
    uninterrupted = gang.losses()
    # As if it had ended after the fourth step.
    assert gang.checkpoints() == [4, 8]
    bucket, _, prefix_8 = f"{gang.config.scratch_uri}checkpoints/step-00000008/".removeprefix("s3://").partition("/")
    s3.client().delete_object(Bucket=bucket, Key=f"{prefix_8}manifest.json")
    after = make_gang(
        tmp_path / "1",
        s3,
        model,
        bucket_prefix=prefix,
        strategy=second,
        training={"learningRate": gang.config.spec.training.learning_rate},
        tuning=TUNINGS[name],
        **every_four,
    )
    after.attempt_uid = "attempt-1"
    message = after.run()
    assert message.resumed_from_step == 4
    assert after.losses() == pytest.approx(uninterrupted, abs=1e-4)


@pytest.mark.parametrize("name", TUNINGS)
def test_sizing_counts_what_is_trained(name: str, model: Path) -> None:
    import torch

    from finetune_trainer.model import load_model, trained_parameters
    from finetune_trainer.tuning import tune

    tuning = Tuning.model_validate(TUNINGS[name])
    data = (model / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    shape = model_shape(
        json.loads((model / "config.json").read_bytes()), parse_header(data[8:end], len(data), "x"), tuning, "x"
    )
    tuned = tune(load_model(model, torch.float32, "sdpa", None), tuning, "s3://b/m/", 0, False, masters=True)
    assert trainable_parameters(shape, tuning) == sum(p.numel() for p in trained_parameters(tuned).values())
