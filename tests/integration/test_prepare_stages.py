"""prepare of a job with stages: each has data below its own name, and none trains on what another holds out."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from finetune_api.failures import FineTuneError, Reason, TerminationMessage
from finetune_api.manifest import Manifest
from finetune_api.run import PreparedData, PreparedSummary, RunConfig
from finetune_api.stages import effective
from finetune_trainer.prepare import prepare
from finetune_trainer.publish import publish
from finetune_trainer.pull import pull
from finetune_trainer.storage import Store
from finetune_trainer.workdir import WorkDir
from support.runs import make_run_config
from support.s3 import S3, running_s3
from support.tiny import make_tiny_model

pytestmark = pytest.mark.integration
Row = dict[str, Any]


def jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS = [{"prompt": f"What is {i}?", "completion": f" It is the number {i}."} for i in range(60)]
PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " No idea."} for r in ROWS]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with running_s3() as server:
        for path in make_tiny_model(tmp_path_factory.mktemp("model")).iterdir():
            server.put(f"s3://bucket/models/tiny/{path.name}", path.read_bytes())
        server.put("s3://bucket/data/rows.jsonl", jsonl(ROWS))
        server.put("s3://bucket/data/pairs.jsonl", jsonl(PAIRS))
        server.put("s3://bucket/data/held.jsonl", jsonl(ROWS[:5]))
        server.put(
            "s3://bucket/data/others.jsonl", jsonl([{"prompt": "Who?", "completion": f" {i}."} for i in range(9)])
        )
        yield server


@pytest.fixture(autouse=True)
def pod(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FINETUNE_WORK_DIR", str(tmp_path))


def dataset(name: str) -> list[Row]:
    return [{"name": name, "uri": f"s3://bucket/data/{name}.jsonl"}]


SFT = {"name": "sft", "datasets": dataset("rows")}
DPO = {
    "name": "dpo",
    "method": {"type": "DPO"},
    "datasets": dataset("pairs"),
    "tuning": {"type": "LoRA", "lora": {"rank": 2}},
}


def configured(s3: S3, *stages: Row, **spec: Any) -> RunConfig:
    fields = {"datasets": dataset("rows"), "stages": list(stages), "output": {"uri": "s3://bucket/out/"}} | spec
    return make_run_config(endpoint=s3.endpoint, **fields)


def index_of(s3: S3, config: RunConfig, stage: str = "") -> PreparedData:
    name = f"data/{stage}/index.json" if stage else "data/index.json"
    return PreparedData.model_validate_json(s3.get(config.scratch_uri + name))


def prompts_of(s3: S3, config: RunConfig, stage: str, split: str) -> set[tuple[int, ...]]:
    """The chosen or only sequences of a split."""
    found: set[tuple[int, ...]] = set()
    for shard in index_of(s3, config, stage).shards:
        if shard.split == split:
            table = pq.read_table(io.BytesIO(s3.get(f"{config.scratch_uri}data/{stage}/{shard.key}")))
            found |= {tuple(ids) for ids in table.column("input_ids").to_pylist()}
    return found


def test_every_stage_has_data_of_its_own(s3: S3, tmp_path: Path) -> None:
    config = configured(s3, SFT, DPO, validation={"fraction": 0.25})
    told = prepare(config).prepared
    assert told
    job, sft, dpo = (index_of(s3, config, name) for name in ("", "sft", "dpo"))
    assert (job.shards, sft.kind, dpo.kind) == ([], "Tokens", "Pairs")
    assert job.base_model == sft.base_model == dpo.base_model
    assert job.datasets_sha256 == {"sft/rows": sft.datasets_sha256["rows"], "dpo/pairs": dpo.datasets_sha256["pairs"]}
    assert told.train_examples == sum(s.rows for i in (sft, dpo) for s in i.shards if s.split == "train")
    assert [part.max_tokens for part in told.stages] == [sft.max_tokens, dpo.max_tokens]
    assert all(part.target_features > 0 for part in told.stages)

    work = WorkDir(tmp_path / "pod")
    pull(config.model_copy(update={"prepared": told}), work)
    assert work.finished.read_text() == "0"
    for name, index in (("sft", sft), ("dpo", dpo)):
        place = work.of_stage(name)
        assert PreparedData.model_validate_json(place.index.read_bytes()) == index
        assert all(place.shard(shard.key).exists() for shard in index.shards)


def test_what_one_stage_holds_out_no_other_trains_on(s3: S3) -> None:
    config = configured(s3, SFT, DPO, validation={"fraction": 0.25}, dataPolicy={"similarity": 1})
    prepare(config)
    held = prompts_of(s3, config, "sft", "validation")
    assert held == prompts_of(s3, config, "dpo", "validation")
    assert len(held) > 3
    assert not held & (prompts_of(s3, config, "sft", "train") | prompts_of(s3, config, "dpo", "train"))


@pytest.mark.parametrize("first", ["own", "specs"])
def test_a_held_out_dataset_of_one_stage_is_looked_for_in_all(s3: S3, first: str) -> None:
    """spec.validation's datasets are of the stages that learn from spec.datasets; the other one has the rows."""
    leaky, own = {"name": "leaky", "datasets": dataset("rows")}, {"name": "own"}
    stages = [own, leaky] if first == "own" else [leaky, own]
    fields: Row = {"datasets": dataset("others"), "validation": {"datasets": dataset("held")}}
    with pytest.raises(
        FineTuneError, match=r"spec.stages\[\d\].datasets\[0\]: .* is held out by another stage"
    ) as caught:
        prepare(configured(s3, *stages, **fields))
    assert caught.value.reason == Reason.DATA_LEAKAGE
    config = configured(s3, *stages, **fields, dataPolicy={"leakage": "Drop", "similarity": 1})
    assert prepare(config).reason is None
    assert len(prompts_of(s3, config, "leaky", "train")) == len(ROWS) - 5
    assert index_of(s3, config).dropped["leakage"] == 5


def test_what_is_nearly_held_out_is_not_trained_on_by_another_stage(s3: S3) -> None:
    """Each row of the second dataset is one of the first with another last word: many fall into another split."""
    for name in ("one", "two"):
        words = [" ".join(f"{i}x{j}" for j in range(40)) for i in range(40)]
        rows = [{"prompt": f"Row {i}?", "completion": f" {text} {name}"} for i, text in enumerate(words)]
        s3.put(f"s3://bucket/data/{name}.jsonl", jsonl(rows))
    stages = [{"name": name, "datasets": dataset(name)} for name in ("one", "two")]
    config = configured(s3, *stages, validation={"fraction": 0.4})
    prepare(config)
    assert index_of(s3, config, "two").dropped["nearDuplicate"] > 5
    alone = configured(s3, stages[1], validation={"fraction": 0.4})
    prepare(alone)
    assert not index_of(s3, alone, "two").dropped


def test_an_error_names_the_stage_where_the_user_wrote_it(s3: S3) -> None:
    missing = {"name": "second", "datasets": [{"name": "none", "uri": "s3://bucket/data/none.jsonl"}]}
    with pytest.raises(FineTuneError, match=r"^spec.stages\[1\].datasets\[0\].uri: "):
        prepare(configured(s3, SFT, missing))
    target = {"name": "second", "tuning": {"type": "LoRA", "lora": {"targetModules": ["q_prj"]}}}
    with pytest.raises(FineTuneError, match=r"^spec.stages\[1\].tuning.lora.targetModules: .*did you mean q_proj"):
        prepare(configured(s3, SFT, target))


def test_sixteen_stages_fit_into_a_termination_message(s3: S3) -> None:
    stages = [SFT | {"name": f"a-stage-with-a-name-that-is-as-long-as-names-may-ever-be-{i:04d}"} for i in range(16)]
    message = prepare(configured(s3, *stages))
    data = message.encode()
    assert len(data) <= 4096
    told = TerminationMessage.decode(data.decode())
    assert told
    assert isinstance(told.prepared, PreparedSummary)
    assert len(told.prepared.stages) == 16


def test_what_is_finished_is_found_and_what_is_torn_is_made_again(s3: S3, tmp_path: Path) -> None:
    third = {"name": "third", "datasets": dataset("rows")}
    config = configured(s3, SFT, DPO, third)
    config = config.model_copy(update={"prepared": prepare(config).prepared})
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")

    def leave(stage: str, spec_sha256: str = config.spec_sha256) -> None:
        with Store(config.storage) as store:
            uri = f"{config.scratch_uri}stages/{stage}/"
            store.delete_prefix(uri, config.scratch_uri)
            publish(
                store, folder, uri, kind="Adapter", step=8, created_time="2026-01-01T00:00:00Z", spec_sha256=spec_sha256
            )

    def finished(pod: str) -> tuple[str, list[str]]:
        work = WorkDir(tmp_path / pod)
        pull(config, work)
        return work.finished.read_text(), sorted(path.name for path in (work.root / "stages").glob("*"))

    leave("dpo")
    assert finished("none") == ("0", []), "the first stage is not finished, so neither is what came of it"
    leave("sft")
    assert finished("two") == ("2", ["dpo", "sft"])
    leave("dpo", "1" * 64)
    assert finished("another") == ("1", ["sft"]), "a result of another spec"
    leave("dpo")
    s3.put(f"{config.scratch_uri}stages/sft/adapter_model.safetensors", b"WEIGHTS")
    assert finished("torn")[0] == "0"
    assert Manifest.model_validate_json(s3.get(f"{config.scratch_uri}stages/sft/manifest.json")).kind == "Adapter"
    assert [stage.name for stage in effective(config.spec)] == ["sft", "dpo", "third"]
