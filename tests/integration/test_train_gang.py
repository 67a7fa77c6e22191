"""What the ranks of a gang learn together: real processes over gloo, on a tiny Llama."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.failures import EXIT_CODES, FineTuneError, Reason
from finetune_api.manifest import Manifest
from support.gang import Gang, make_gang, make_tiny_model
from support.s3 import S3, running_s3

pytestmark = [pytest.mark.integration, pytest.mark.gang]

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ddp(s3: S3, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Gang:
    """A finished gang of two pods under DDP: what the others are compared with."""
    gang = make_gang(tmp_path_factory.mktemp("ddp"), s3, model, bucket_prefix="ddp")
    gang.run()
    return gang


def adapter(gang: Gang, directory: Path) -> dict[str, list[float]]:
    from safetensors.torch import load_file

    tensors = load_file(gang.published(directory) / "adapter_model.safetensors")
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


def test_one_worker_learns_what_two_learn(ddp: Gang, s3: S3, model: Path, tmp_path: Path) -> None:
    alone = make_gang(tmp_path, s3, model, bucket_prefix="alone", workers=1, micro_batch=8)
    result = alone.run().result
    assert result
    assert alone.losses() == pytest.approx(ddp.losses(), abs=TOLERANCE)
    assert result.metrics["evalLoss"] < result.metrics["evalLossBefore"]
    one, two = adapter(alone, tmp_path / "one"), adapter(ddp, tmp_path / "two")
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert values == pytest.approx(two[name], abs=1e-3), name


@pytest.mark.parametrize(
    ("strategy", "offload"), [("ZeRO1", "None"), ("ZeRO2", "None"), ("ZeRO2", "Optimizer"), ("ZeRO3", "None")]
)
def test_zero_learns_what_ddp_learns(
    strategy: str, offload: str, ddp: Gang, s3: S3, model: Path, tmp_path: Path
) -> None:
    prefix = f"{strategy}-{offload}".lower()
    # ZeRO-3 gathers each layer in each micro-step: as few of them as possible.
    micro = 8 if strategy == "ZeRO3" else 2
    gang = make_gang(tmp_path, s3, model, bucket_prefix=prefix, strategy=strategy, offload=offload, micro_batch=micro)
    result = gang.run().result
    assert result
    assert gang.losses() == pytest.approx(ddp.losses(), abs=TOLERANCE)
    reference = json.loads(s3.get("s3://bucket/ddp/bot/attempt-0/metrics.jsonl").splitlines()[-1])["final"]
    for name in ("evalLossBefore", "evalLoss"):
        assert result.metrics[name] == pytest.approx(reference[name], abs=TOLERANCE)


def test_packed_rows_have_the_loss_of_their_examples(s3: S3, model: Path, tmp_path: Path) -> None:
    """One step over all the data, packed and not: the same tokens, so the same loss, unless examples saw each other."""
    whole = {"globalBatchSize": 32, "maxSteps": 1}
    apart = make_gang(
        tmp_path / "apart", s3, model, bucket_prefix="apart", workers=1, micro_batch=32, examples=32, training=whole
    )
    # The 32 examples fill 9 to 16 rows of 64 tokens; as many rows as one step takes are found by packing them here.
    rows = packed_rows(apart)
    fused = {"globalBatchSize": rows, "maxSteps": 1}
    packed = make_gang(
        tmp_path / "packed",
        s3,
        model,
        bucket_prefix="packed",
        workers=1,
        micro_batch=rows,
        examples=32,
        training=fused,
        method={"type": "SFT", "sft": {"packing": True}},
    )
    apart.run()
    packed.run()
    assert rows < 20
    assert packed.losses() == pytest.approx(apart.losses(), abs=TOLERANCE)


@pytest.mark.parametrize("flat", [False, True])
def test_a_model_that_lets_packed_examples_see_each_other_is_refused(flat: bool, model: Path) -> None:
    import torch

    from finetune_trainer.model import assert_packing, load_model

    loaded = load_model(model, torch.float32, "sdpa", None)
    loaded.config.use_cache = False
    assert_packing(loaded, flat, torch.device("cpu"))
    # With a cache transformers takes the rows for one text each.
    loaded.config.use_cache = True
    with pytest.raises(FineTuneError, match=r"packing: found true; .*set it to false"):
        assert_packing(loaded, flat, torch.device("cpu"))


def packed_rows(gang: Gang) -> int:
    import numpy as np

    from finetune_trainer.batches import Examples, rows_of

    examples = gang.train["pairs"]
    ends = np.cumsum([0, *(len(ids) for ids, _ in examples)])
    flat = np.concatenate([ids for ids, _ in examples]).astype(np.int32)
    return len(rows_of(Examples(flat, flat, ends, np.zeros(len(examples), np.int64)), True, 64, 42))


def test_what_is_published_loads_in_plain_peft(ddp: Gang, s3: S3, model: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory = ddp.published(tmp_path)
    manifest = Manifest.model_validate_json((directory / "manifest.json").read_bytes())
    assert {entry.key for entry in manifest.files} == {
        "README.md",
        "report.html",
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert manifest.kind == "Adapter"
    assert manifest.run
    assert manifest.run.attempt_uid == "attempt-0"
    for path in directory.iterdir():
        assert str(ddp.directory).encode() not in path.read_bytes(), f"{path.name} names a folder of the pod"
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "s3://bucket/models/tiny/"

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), directory).eval()
    loss = count = 0.0
    with torch.no_grad():
        for ids, labels in ddp.validation:
            logits = loaded(input_ids=torch.tensor([ids])).logits[0, :-1]
            targets = torch.tensor(labels[1:])
            loss += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
            count += int((targets != -100).sum())
    assert loss / count == pytest.approx(manifest.run.metrics["evalLoss"], abs=1e-5)


def test_several_datasets_processes_and_no_validation(s3: S3, model: Path, tmp_path: Path) -> None:
    datasets = [
        {"name": "many", "uri": "s3://bucket/data/many.jsonl", "weight": 3},
        {"name": "few", "uri": "s3://bucket/data/few.jsonl", "weight": 1},
    ]
    gang = make_gang(
        tmp_path, s3, model, bucket_prefix="mix", workers=1, processes=2, validation=0, examples=24, datasets=datasets
    )
    result = gang.run().result
    assert result
    assert not {"evalLoss", "evalLossBefore"} & result.metrics.keys()
    assert gang.events("no validation data: nothing will be evaluated")
    assert len(gang.losses()) == 8


def test_a_loss_that_is_no_number_ends_the_run(s3: S3, model: Path, tmp_path: Path) -> None:
    training = {"learningRate": 10, "maxGradNorm": 1000, "warmupRatio": 0, "schedule": "Constant", "maxSteps": 400}
    lora = {"type": "LoRA", "lora": {"rank": 4, "alpha": 65536}}
    gang = make_gang(
        tmp_path, s3, model, bucket_prefix="diverged", workers=1, micro_batch=16, training=training, tuning=lora
    )
    (message,) = gang.start().wait()
    assert message.reason == Reason.DIVERGED
    assert "learningRate" in message.message
    assert gang.processes[0].exitcode == EXIT_CODES[Reason.DIVERGED]
    assert not s3.keys("bucket", "diverged/bot/")


def test_a_gang_of_another_size_is_refused(s3: S3, model: Path, tmp_path: Path) -> None:
    gang = make_gang(tmp_path, s3, model, bucket_prefix="size", workers=1, micro_batch=16)
    gang.env["WORLD_SIZE"] = "2"
    (message,) = gang.start().wait()
    assert message.reason == Reason.RANK_FAILED
    assert message.message == "WORLD_SIZE: found 2; the job asked for 1 processes"
