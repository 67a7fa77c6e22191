"""What prepare makes of data that are held out: test and retention splits, slices, and leakage into any of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import PreparedData, RunConfig
from finetune_trainer import shards
from finetune_trainer.feed import held_out
from finetune_trainer.prepare import prepare
from finetune_trainer.pull import pull
from finetune_trainer.workdir import WorkDir
from support.runs import make_run_config
from support.s3 import S3, running_s3
from support.tiny import make_tiny_model, make_tokenizer

pytestmark = pytest.mark.integration
Row = dict[str, Any]
LANGUAGES = ("de", "fr", "en/GB")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with running_s3() as server:
        for path in make_tiny_model(tmp_path_factory.mktemp("models") / "tiny").iterdir():
            server.put(f"s3://bucket/models/tiny/{path.name}", path.read_bytes())
        yield server


@pytest.fixture(autouse=True)
def pod(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FINETUNE_WORK_DIR", str(tmp_path / "prepare"))


def rows(start: int, count: int) -> list[Row]:
    return [
        {"prompt": f"What is {i}?", "completion": f" It is the number {i}.", "language": LANGUAGES[i % 3]}
        for i in range(start, start + count)
    ]


def put(s3: S3, name: str, data: list[Row]) -> Row:
    uri = f"s3://bucket/data/{name}.jsonl"
    s3.put(uri, "".join(json.dumps(row) + "\n" for row in data).encode())
    return {"name": name, "uri": uri}


def prepared(s3: S3, tmp_path: Path, **spec: Any) -> tuple[RunConfig, PreparedData, WorkDir]:
    """As a pod of the gang finds it, every held-out split decoded."""
    config = make_run_config(endpoint=s3.endpoint, **spec)
    summary = prepare(config).prepared
    config, work = config.model_copy(update={"prepared": summary}), WorkDir(tmp_path / "pod")
    pull(config, work)
    index = PreparedData.model_validate_json(work.index.read_bytes())
    return config, index, work


def decoded(index: PreparedData, work: WorkDir, names: list[str], split: Any) -> Any:
    shards.decode(index, names, split, work)
    return held_out(index, names, split, work)


def texts(held: Any) -> list[str]:
    tokenizer, data = make_tokenizer(), held.data
    return [tokenizer.decode(data.input_ids[a:b]) for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True)]


def test_slices_are_groups_of_what_is_held_out(s3: S3, tmp_path: Path) -> None:
    sliced = put(s3, "sliced", rows(0, 60)) | {"columns": {"slice": "language"}}
    plain = put(s3, "plain", rows(100, 40))
    datasets = [sliced, plain]
    _, index, work = prepared(s3, tmp_path, datasets=datasets, validation={"fraction": 0.4}, test={"fraction": 0.2})
    counts = {split: sum(shard.rows for shard in index.shards if shard.split == split) for split in ("train", "test")}
    assert counts["train"] > 20
    assert counts["test"] > 5
    for split in ("validation", "test"):
        held = decoded(index, work, ["sliced", "plain"], split)
        found = dict(held.groups.members())
        assert set(found) <= {"", ".sliced", ".plain", ".sliced.de", ".sliced.fr", ".sliced.en_GB"}
        assert {".sliced", ".plain"} <= set(found)
        assert len(found[".sliced"]) + len(found[".plain"]) == len(found[""]) == len(held.data)
        parts = [name for name in found if name.startswith(".sliced.")]
        assert sorted(i for name in parts for i in found[name]) == sorted(found[".sliced"])
        said = texts(held)
        for place, name in enumerate(("de", "fr", "en_GB")):
            for i in found.get(f".sliced.{name}", []):
                assert int(said[i].split("What is ")[1].split("?")[0]) % 3 == place


def test_a_row_without_its_slice_is_named(s3: S3, tmp_path: Path) -> None:
    bad = rows(0, 8)
    del bad[5]["language"]
    dataset = put(s3, "bad", bad) | {"columns": {"slice": "language"}}
    with pytest.raises(FineTuneError, match=r"bad\.jsonl line 6: the column 'language' is missing"):
        prepared(s3, tmp_path, datasets=[dataset])
    bad[5]["language"] = ["de"]
    dataset = put(s3, "bad", bad) | {"columns": {"slice": "language"}}
    with pytest.raises(FineTuneError, match=r"line 6: `language` must be text, a number or a truth value; found list"):
        prepared(s3, tmp_path, datasets=[dataset])
    bad[5]["language"] = None
    dataset = put(s3, "bad", bad) | {"columns": {"slice": "language"}}
    assert prepared(s3, tmp_path, datasets=[dataset])[1].shards


@pytest.mark.parametrize("method", ["SFT", "DPO"])
def test_retention_data_are_answers_whatever_is_learned(method: str, s3: S3, tmp_path: Path) -> None:
    pairs = [{"prompt": f"Is {i} good?", "chosen": f" Yes {i}.", "rejected": f" No {i}."} for i in range(30)]
    trained = put(s3, "trained", rows(0, 30) if method == "SFT" else pairs)
    known = put(s3, "known", rows(500, 12))
    config, index, work = prepared(
        s3, tmp_path, method={"type": method}, datasets=[trained], evaluation={"retention": {"datasets": [known]}}
    )
    assert {shard.split for shard in index.shards} == {"train", "retention"}
    assert "retention/known" in index.datasets_sha256
    held = decoded(index, work, ["trained"], "retention")
    assert sorted(texts(held)) == sorted(f"What is {i}? It is the number {i}." for i in range(500, 512))
    assert config.prepared
    assert config.prepared.validation_examples == 0


@pytest.mark.parametrize("split", ["validation", "test", "retention"])
@pytest.mark.parametrize("repeated", [" It is the number 7.", " It is the number 7 !"])
def test_what_is_held_out_is_never_trained_on(split: str, repeated: str, s3: S3, tmp_path: Path) -> None:
    long = "Please answer this question in as few words as you can, and say nothing that was not asked for: "
    data = [{"prompt": long + row["prompt"], "completion": row["completion"]} for row in rows(0, 20)]
    trained = put(s3, "trained", data)
    held = put(s3, "held", [{"prompt": long + "What is 7?", "completion": repeated}])
    where = {"datasets": [held]}
    spec: Row = {"evaluation": {"retention": where}} if split == "retention" else {split: where}
    with pytest.raises(FineTuneError) as error:
        prepared(s3, tmp_path, datasets=[trained], **spec)
    assert error.value.reason == Reason.DATA_LEAKAGE
    assert f"of the {split} data" in str(error.value) or f"in the {split} data" in str(error.value)
    _, index, work = prepared(s3, tmp_path, datasets=[trained], dataPolicy={"leakage": "Drop"}, **spec)
    assert index.dropped["leakage"] >= 1
    assert len(decoded(index, work, ["trained"], split).data) == 1
