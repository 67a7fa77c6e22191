"""Training data larger than a pod's disk may hold: shards come from S3 when their turn comes, and go again."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune_api.failures import FineTuneError, Reason
from finetune_api.formats import Kind
from finetune_api.run import PreparedData, RunConfig
from finetune_trainer import batches, shards, streaming
from finetune_trainer.batches import Examples, Plan, rows_of
from finetune_trainer.data import shards as written
from finetune_trainer.distributed import Ranks
from finetune_trainer.preferences import rows_of_pairs
from finetune_trainer.pull import pull
from finetune_trainer.storage import join
from finetune_trainer.streaming import Stream, lay_out
from finetune_trainer.workdir import WorkDir
from support.gang import Gang, make_examples, make_gang, make_tiny_model
from support.s3 import S3, running_s3
from support.streamed import encoded, write_prepared

pytestmark = [pytest.mark.integration, pytest.mark.gang]
ROWS = 4
"""Of a shard."""
PAGE = 4096
"""The least that lies on a disk."""


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(autouse=True)
def environment(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(written, "MAX_ROWS", ROWS)


def configured(s3: S3, tmp_path: Path, prefix: str, **arguments: Any) -> RunConfig:
    return make_gang(tmp_path / "gang", s3, tmp_path, bucket_prefix=prefix, **arguments).config


def as_rank(local_rank: int) -> Ranks:
    """A rank that asks the others nothing."""
    return Ranks(local_rank, local_rank, 2, torch.device("cpu"), None)  # type: ignore[arg-type]


def lay_down(work: WorkDir, index: PreparedData, files: Path) -> None:
    """What `pull` leaves of streamed data: the index and the outline."""
    assert index.outline
    work.shard(index.outline.key).parent.mkdir(parents=True)
    work.shard(index.outline.key).write_bytes((files / index.outline.key).read_bytes())


def on_disk(work: WorkDir) -> int:
    """Bytes that the tokens take."""
    paths = [path for prefix in ("", shards.REJECTED) for path in shards.token_paths(work, "train", prefix)]
    return sum(path.stat().st_blocks * 512 for path in paths if path.exists())


def long_examples(count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Of about 600 tokens: 4 of them fill some pages."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(400, 800, count)
    return [(ids := rng.integers(3, 60, length).tolist(), [-100] * 3 + ids[3:]) for length in lengths]


def plan_of(train: Examples, rows: Any = None, epochs: float = 1.5) -> Plan:
    rows = rows or rows_of(train, packing=False, max_length=1024, seed=3)
    return Plan(rows, global_batch=2, weights=(None, None), seed=3, epochs=epochs, max_steps=None)


def test_each_step_finds_its_tokens_and_the_disk_stays_small(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As usual, a chunk has more rows than the steps that share a window take.
    for module in (batches, streaming):
        monkeypatch.setattr(module, "WINDOW", 4)
    config = configured(s3, tmp_path, "stream")
    train = {name: [encoded(e) for e in long_examples(80, seed)] for seed, name in enumerate(("a", "b"))}
    index = write_prepared(tmp_path / "files", s3, config, train, cache_bytes=100 * PAGE)
    assert len(index.shards) == 40
    assert index.train_bytes > 180 * PAGE
    work = WorkDir(tmp_path / "work")
    lay_down(work, index, tmp_path / "files")
    lay_out(index, ["a", "b"], work)
    assert on_disk(work) <= 4 * PAGE
    held = shards.load("train", work)
    everything = [item for items in train.values() for item in items]
    assert held.lengths.tolist() == [len(item.tokens.input_ids) for item in everything]
    assert held.trained().tolist() == [item.tokens.trained for item in everything]
    plan = plan_of(held)
    ranks = [Stream(config, index, plan, work, as_rank(rank)) for rank in (0, 1)]
    peak = 0
    for step in range(plan.total_steps):
        for stream in ranks:
            stream(step)
            for row in plan.step(step):
                ids = held.input_ids[held.offsets[row] : held.offsets[row + 1]]
                assert ids.tolist() == everything[int(row)].tokens.input_ids
        peak = max(peak, on_disk(work))
    # The edges of shards share pages with their neighbours.
    assert peak <= (100 + 20) * PAGE
    assert not list((work.data / "train").glob("*.parquet.part"))


def test_pairs_are_streamed_too(s3: S3, tmp_path: Path) -> None:
    config = configured(s3, tmp_path, "pairs")
    both = zip(long_examples(60, 1), long_examples(60, 2), strict=True)
    pairs = [encoded(good)._replace(rejected=encoded(bad).tokens) for good, bad in both]
    index = write_prepared(tmp_path / "files", s3, config, {"a": pairs}, cache_bytes=200_000, kind="Pairs")
    work = WorkDir(tmp_path / "work")
    lay_down(work, index, tmp_path / "files")
    lay_out(index, ["a"], work)
    held = shards.load_pairs("train", work)
    plan = plan_of(held.chosen, rows_of_pairs(held))
    stream = Stream(config, index, plan, work, as_rank(0))
    for step in range(plan.total_steps):
        stream(step)
        for row in plan.step(step).tolist():
            for side, item in ((held.chosen, pairs[row].tokens), (held.rejected, pairs[row].rejected)):
                assert item
                assert side.input_ids[side.offsets[row] : side.offsets[row + 1]].tolist() == item.input_ids
                assert side.trained()[row] == item.trained


@pytest.mark.parametrize(
    ("kind", "known"), [("Unpaired", {"desirable": True}), ("Classes", {"label": "x"}), ("Prompts", {"reference": "y"})]
)
def test_what_is_known_of_each_row_needs_no_shard(kind: Kind, known: dict[str, Any], s3: S3, tmp_path: Path) -> None:
    config = configured(s3, tmp_path, kind.lower())
    items = [encoded(example)._replace(**known) for example in make_examples(20)]
    index = write_prepared(tmp_path / "files", s3, config, {"a": items}, cache_bytes=1000, kind=kind)
    index = index.model_copy(update={"classes": ["w", "x"]})
    work = WorkDir(tmp_path / "work")
    lay_down(work, index, tmp_path / "files")
    lay_out(index, ["a"], work)
    match kind:
        case "Unpaired":
            assert shards.load_unpaired("train", work).desirable.tolist() == [True] * 20
        case "Classes":
            assert shards.load_classes("train", work, index.classes).label.tolist() == [1] * 20
        case _:
            assert shards.load_prompts("train", work).references == ["y"] * 20


def damaged(s3: S3, tmp_path: Path, prefix: str) -> tuple[Stream, str]:
    """A stream, and the URI of the shards' prefix."""
    config = configured(s3, tmp_path, prefix)
    index = write_prepared(tmp_path / "f", s3, config, {"a": [encoded(e) for e in make_examples(40)]}, cache_bytes=9000)
    work = WorkDir(tmp_path / "work")
    lay_down(work, index, tmp_path / "f")
    lay_out(index, ["a"], work)
    assert config.prepared
    plan = plan_of(shards.load("train", work))
    return Stream(config, index, plan, work, as_rank(1)), config.prepared.index_uri.rpartition("/")[0]


def test_a_shard_that_was_overwritten_is_named(s3: S3, tmp_path: Path) -> None:
    stream, prefix = damaged(s3, tmp_path, "overwritten")
    for number in range(10):
        s3.put(join(prefix, f"train/{number:05}.parquet"), b"something else")
    with pytest.raises(FineTuneError, match=rf"{prefix}/train/0000\d\.parquet.*SHA-256") as caught:
        stream(0)
    assert caught.value.reason == Reason.DATA_INVALID


def test_a_shard_that_is_gone_is_named(s3: S3, tmp_path: Path) -> None:
    stream, prefix = damaged(s3, tmp_path, "gone")
    bucket, _, key = prefix.removeprefix("s3://").partition("/")
    for found in s3.keys(bucket, f"{key}/train/"):
        s3.client().delete_object(Bucket=bucket, Key=found)
    with pytest.raises(FineTuneError, match=rf"prepared data is gone: .*{prefix}/train/0000\d\.parquet") as caught:
        stream(0)
    assert caught.value.reason == Reason.DATA_INVALID


def test_a_disk_without_holes_is_refused_before_training(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, start: int, stop: int) -> None:
        raise OSError(95, os.strerror(95), str(path))

    monkeypatch.setattr(streaming, "punch", refused)
    with pytest.raises(FineTuneError, match=r"volume has no holes in files .*ext4, xfs, btrfs and tmpfs") as caught:
        damaged(s3, tmp_path, "holes")
    assert caught.value.reason == Reason.DOES_NOT_FIT


def test_pull_leaves_streamed_shards_where_they_are(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(s3, tmp_path, "pulled")
    examples = [encoded(e) for e in make_examples(40)]
    index = write_prepared(tmp_path / "files", s3, config, {"a": examples}, examples[:3], cache_bytes=9000)
    assert config.prepared
    data = index.model_dump_json(by_alias=True, exclude_none=True).encode()
    s3.put(config.prepared.index_uri, data)
    prepared = config.prepared.model_copy(update={"index_sha256": hashlib.sha256(data).hexdigest()})
    work = WorkDir(tmp_path / "work")
    monkeypatch.setenv("FINETUNE_ATTEMPT_UID", "attempt-0")
    pull(config.model_copy(update={"prepared": prepared}), work)
    names = sorted(str(path.relative_to(work.data)) for path in work.data.rglob("*.parquet"))
    assert names == ["train/outline.parquet", "validation/00000.parquet"]


@dataclass
class StreamedGang(Gang):
    cache_bytes: int | None = None
    peaks: list[int] = field(default_factory=list)

    def _index(self) -> PreparedData:
        train = {name: [encoded(e) for e in examples] for name, examples in self.train.items()}
        held = [encoded(e) for e in self.validation]
        index = write_prepared(self.directory / "shards", self.s3, self.config, train, held, self.cache_bytes)
        for rank in range(self.config.devices.world_size):
            if index.outline and not self.work(rank).shard(index.outline.key).exists():
                lay_down(self.work(rank), index, self.directory / "shards")
        return index


def make_streamed(directory: Path, s3: S3, model: Path, cache_bytes: int | None, **arguments: Any) -> StreamedGang:
    gang = make_gang(directory, s3, model, examples=96, **arguments)
    known = {f.name: getattr(gang, f.name) for f in dataclasses.fields(gang)}
    return StreamedGang(**known | {"validation": gang.validation}, cache_bytes=cache_bytes)


def test_ranks_of_one_pod_and_of_two_learn_the_same(
    s3: S3, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = make_tiny_model(tmp_path_factory.mktemp("model"))
    training = {"globalBatchSize": 4, "maxSteps": 36}
    gangs = [
        make_streamed(tmp_path / name, s3, model, 4000, bucket_prefix=name, training=training, **places)
        for name, places in (("pod", {"workers": 1, "processes": 2}), ("pods", {"workers": 2}))
    ]
    for gang in gangs:
        gang.run()
        index = json.loads((gang.work(0).data / "index.json").read_text())
        assert sum(shard["tokens"] * 8 for shard in index["shards"]) > 3 * 4000
        # A rank has only those that it fetched, in its array alone.
        assert not [path for path in gang.work(0).data.glob("train/0*.parquet") if path.exists()]
    one, two = (gang.losses() for gang in gangs)
    assert len(one) == 36
    assert one == pytest.approx(two, abs=2e-5)
    assert np.mean(one[-4:]) < np.mean(one[:4])
