"""Brings the base model and this job's shards into the work folder, once per pod: `python -m finetune_trainer.pull`.

A process of its own, so that the launcher stays small and a signal ends it at once.
"""

import hashlib
import itertools
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from finetune_api.failures import FineTuneError, Reason
from finetune_api.manifest import MANIFEST_KEY
from finetune_api.run import PinnedObject, PreparedData, RunConfig
from finetune_api.stage import Generate
from finetune_api.stages import effective
from finetune_trainer import heartbeat, log
from finetune_trainer.fence import Fence
from finetune_trainer.outcome import guarded
from finetune_trainer.publish import MANIFEST_LIMIT, parse_manifest
from finetune_trainer.results import fetch_result, is_finished
from finetune_trainer.runconfig import read_config
from finetune_trainer.start import needed
from finetune_trainer.storage import Store, Wanted, join
from finetune_trainer.storage_errors import ObjectChanged, ObjectMissing
from finetune_trainer.workdir import WorkDir

INDEX_LIMIT = 64 * 2**20


def read_index(store: Store, uri: str, expected: str) -> bytes:
    """An index.json, exactly as `prepare` wrote it."""
    data = store.get_bytes(uri, INDEX_LIMIT)
    if hashlib.sha256(data).hexdigest() != expected:
        raise FineTuneError(Reason.DATA_INVALID, f"{uri} is not the index that `prepare` wrote for this job")
    return data


def model_files(config: RunConfig, index: PreparedData, work: WorkDir) -> list[Wanted]:
    prefix = config.spec.base_model.uri.rstrip("/") + "/"
    return [Wanted(pinned, work.model / pinned.uri.removeprefix(prefix)) for pinned in index.base_model]


def teacher_files(generate: Generate, index: PreparedData, work: WorkDir) -> list[Wanted]:
    """Of the model that a stage asks; none where it asks the job's own."""
    prefix = generate.teacher.uri.rstrip("/") + "/" if generate.teacher else ""
    return [Wanted(pinned, work.teacher / pinned.uri.removeprefix(prefix)) for pinned in index.teacher]


def adapter_files(store: Store, pinned: list[PinnedObject], place: Path) -> list[Wanted]:
    """An adapter's files, each with its hash where there is a manifest to say it."""
    pins = {pin.uri.rpartition("/")[2]: pin for pin in pinned}
    manifest = pins.pop(MANIFEST_KEY, None)
    files = parse_manifest(store.get_bytes(manifest, MANIFEST_LIMIT), manifest.uri).files if manifest else []
    known = {entry.key: entry.sha256 for entry in files}
    return [Wanted(pin, place / name, known.get(name)) for name, pin in pins.items()]


def reward_model_files(store: Store, index: PreparedData, work: WorkDir) -> list[Wanted]:
    """Both kinds lie in one folder: their names are the last parts of their URIs."""
    return adapter_files(store, index.reward_model, work.reward_model)


def shard_files(store: Store, index_uri: str, index: PreparedData, work: WorkDir) -> list[Wanted]:
    """Pinned as they are now: it is their hash that says whether they are what `prepare` wrote.

    Of training shards that are streamed, their outline.
    """
    prefix = index_uri.rpartition("/")[0]
    files = [(shard.key, shard.sha256) for shard in index.shards if not (index.outline and shard.split == "train")]
    if index.outline:
        files.append((index.outline.key, index.outline.sha256))
    pins = store.pin_all([join(prefix, key) for key, _ in files])
    return [Wanted(pinned, work.shard(key), sha256) for pinned, (key, sha256) in zip(pins, files, strict=True)]


class Part(NamedTuple):
    """What lies below one index: of a job with stages each has its own."""

    uri: str
    data: bytes
    prepared: PreparedData


def _part(store: Store, uri: str, sha256: str) -> Part:
    data = read_index(store, uri, sha256)
    return Part(uri, data, PreparedData.model_validate_json(data))


def _write_index(part: Part, work: WorkDir) -> None:
    work.data.mkdir(parents=True, exist_ok=True)
    work.index.write_bytes(part.data)


def fetch_part(store: Store, uri: str, sha256: str, work: WorkDir) -> None:
    """An index and its shards, for the stage whose folders `work` names."""
    part = _part(store, uri, sha256)
    store.download_many(shard_files(store, uri, part.prepared, work))
    _write_index(part, work)


def pull(config: RunConfig, work: WorkDir) -> None:
    """Raises ModelInvalid or DataInvalid where something is no longer what was prepared."""
    prepared = config.prepared
    if prepared is None:
        raise FineTuneError(Reason.INVALID_SPEC, "run.json: `prepared` is required for training")
    with Store(config.storage) as store:
        fence = Fence.of(store, config)
        if fence and fence.published():
            # What would be fetched may be gone; the last stage's ranks tell the result.
            work.root.mkdir(parents=True, exist_ok=True)
            work.finished.write_text(str(len(effective(config.spec)) - 1))
            return
        uri = prepared.index_uri
        data = read_index(store, uri, prepared.index_sha256)
        index = PreparedData.model_validate_json(data)
        parts = {"": Part(uri, data, index)} | {
            name: _part(store, join(uri.rpartition("/")[0], f"{name}/index.json"), sha256)
            for name, sha256 in index.stages.items()
        }
        models = {
            "spec.baseModel.uri": model_files(config, index, work),
            "spec.baseModel.adapterUri": adapter_files(store, index.adapter, work.adapter),
            # All stages are judged by the same.
            "spec.evaluation.rewardModel.uri": adapter_files(
                store, next((part.prepared.judge for part in parts.values() if part.prepared.judge), []), work.judge
            ),
        } | {
            f"spec.stages[{stage.number}].generate.teacher.uri": teacher_files(
                stage.generate, parts[stage.name].prepared, work.of_stage(stage.name)
            )
            for stage in effective(config.spec)
            if stage.generate
        }
        for name, part in parts.items():
            models[f"rewardModel.uri of {name or 'spec.method'}"] = reward_model_files(
                store, part.prepared, work.of_stage(name)
            )
        shards = [
            wanted
            for name, part in parts.items()
            for wanted in shard_files(store, part.uri, part.prepared, work.of_stage(name))
        ]
        total = sum(wanted.pinned.size for wanted in itertools.chain(shards, *models.values()))
        work.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(work.root).free
        decoded = sum(part.prepared.decoded_bytes for part in parts.values())
        if total + decoded > free:
            raise FineTuneError(
                Reason.DOES_NOT_FIT,
                f"the work volume has {free:,} bytes free; the base model and the data need {total + decoded:,}",
            )
        progress = log.Progress("pull", total, "bytes")

        def arrived(count: int) -> None:
            heartbeat.beat()
            progress.add(count)

        for field, files in models.items():
            try:
                store.download_many(files, arrived)
            except (ObjectChanged, ObjectMissing) as error:
                raise FineTuneError(Reason.MODEL_INVALID, f"{field}: {error}") from error
        store.download_many(shards, arrived)
        progress.close()
        for name, part in parts.items():
            _write_index(part, work.of_stage(name))
        work.finished.write_text(str(_finished(store, config, work)))


def _finished(store: Store, config: RunConfig, work: WorkDir) -> int:
    """How many stages need not run again; what the next one starts from is there then."""
    stages = effective(config.spec)
    count = 0
    # The last stage publishes the job's output and leaves nothing else.
    while count < len(stages) - 1 and is_finished(store, config, stages[count]):
        count += 1
    for number in needed(stages, count):
        try:
            fetch_result(store, config, work, stages[number])
        except (ObjectChanged, ObjectMissing) as error:
            log.event("stage result skipped", level="warning", stage=stages[number].name, why=str(error))
            return number
    return count


if __name__ == "__main__":
    place = WorkDir.from_env()
    heartbeat.start(place.heartbeat("pull"))
    heartbeat.enter("Pulling")
    sys.exit(guarded(lambda: pull(read_config(), place), place.outcomes / "pull.json"))
