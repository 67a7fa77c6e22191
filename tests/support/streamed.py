"""Prepared data in small shards, as `prepare` leaves them where a pod's disk cannot hold all."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune_api.formats import Kind
from finetune_api.run import Outline, PreparedData, RunConfig, Shard, Split
from finetune_trainer.data.shards import Encoded, OutlineWriter, ShardWriter
from finetune_trainer.data.tokenise import Tokens
from finetune_trainer.storage import sha256_of
from support.gang import SHAPE, Example
from support.runs import JOB_UID
from support.s3 import S3


def encoded(example: Example) -> Encoded:
    return Encoded(Tokens(*example))


def write_prepared(
    directory: Path,
    s3: S3,
    config: RunConfig,
    train: Mapping[str, Sequence[Encoded]],
    validation: Sequence[Encoded] = (),
    cache_bytes: int | None = None,
    kind: Kind = "Tokens",
) -> PreparedData:
    """Shards and outline below the index of `config` in S3, and their files in `directory`."""
    assert config.prepared
    prefix, numbers = config.prepared.index_uri.rpartition("/")[0], dict.fromkeys(("train", "validation"), -1)
    directory.mkdir(parents=True, exist_ok=True)

    def upload(path: Path, key: str) -> tuple[int, str]:
        (directory / key).parent.mkdir(exist_ok=True)
        (directory / key).write_bytes(path.read_bytes())
        s3.put(f"{prefix}/{key}", path.read_bytes())
        return path.stat().st_size, sha256_of(path)

    def number(split: Split) -> int:
        numbers[split] += 1
        return numbers[split]

    def write(split: Split, name: str, items: Sequence[Encoded], outline: OutlineWriter | None) -> list[Shard]:
        writer = ShardWriter(split, name, kind, directory, upload, number, outline)
        for item in items:
            writer.add(item)
        writer.flush()
        return writer.shards

    outline = OutlineWriter(directory / "outline.parquet")
    shards = [shard for name, items in train.items() for shard in write("train", name, items, outline)]
    outline.close()
    shards += write("validation", next(iter(train)), validation, None)
    known = None
    if cache_bytes is not None:
        size, sha256 = upload(outline.path, key := "train/outline.parquet")
        known = Outline(key=key, size=size, sha256=sha256, cache_bytes=cache_bytes)
    return PreparedData.model_validate(
        {
            "jobUid": JOB_UID,
            "specSha256": config.spec_sha256,
            "inputs": [],
            "datasetsSha256": dict.fromkeys(train, "d" * 64),
            "baseModel": [],
            "baseModelSha256": "b" * 64,
            "model": SHAPE,
            "kind": kind,
            "shards": shards,
            "outline": known,
            "maxTokens": max(item.longest for items in train.values() for item in items),
        }
    )
