"""The result of a stage in the job's scratch prefix: `stages/<name>/…`, the manifest last.

An adapter with its configuration or a whole model, the tokenizer, and `record.json`: what was measured up to its end.
A stage with a result that verifies is never run again; the last stage has none, since it publishes the job's output.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from finetune_api.failures import FineTuneError, Reason
from finetune_api.manifest import MANIFEST_KEY, Manifest
from finetune_api.run import RunConfig
from finetune_api.stages import EffectiveStage
from finetune_trainer import log
from finetune_trainer.fence import Fence
from finetune_trainer.publish import fetch_verified, now, publish, read_manifest
from finetune_trainer.storage import Store, join
from finetune_trainer.storage_errors import ObjectMissing
from finetune_trainer.workdir import WorkDir

RECORD = "record.json"
Kind = Literal["Adapter", "Model", "Rows"]


class StageEnd(BaseModel):
    """What is known of a stage at its end."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    origin: str
    """In words: what it started from."""
    metrics: dict[str, float]
    history: list[dict[str, float]] = []
    """As SavedState's."""
    seconds: float = 0.0


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    stages: list[StageEnd] = []
    """Up to the one whose result it lies in."""


def result_uri(config: RunConfig, stage: str) -> str:
    return join(config.scratch_uri, f"stages/{stage}/")


def kind_of_result(stage: EffectiveStage) -> Kind:
    if stage.generate:
        return "Rows"
    return "Adapter" if stage.spec.tuning.is_adapter else "Model"


def publish_result(
    store: Store, config: RunConfig, work: WorkDir, stage: EffectiveStage, directory: Path, step: int
) -> None:
    """Rank 0: every file of `directory`, which becomes `work.result` of the stage."""
    uri = result_uri(config, stage.name)
    Fence.check_own(store, config)
    # An earlier attempt may have left half of it, or something that was found torn.
    store.delete_prefix(uri, config.scratch_uri)
    done = publish(
        store,
        directory,
        uri,
        kind=kind_of_result(stage),
        step=step,
        created_time=now(),
        spec_sha256=config.spec_sha256,
    )
    place = work.result(stage.name)
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    directory.rename(place)
    log.event("stage published", stage=stage.name, uri=uri, bytes=done.size)


def fetch_result(store: Store, config: RunConfig, work: WorkDir, stage: EffectiveStage) -> None:
    """To `work.result`, verified, unless it is there already; by one process of a pod. Raises FineTuneError."""
    place = work.result(stage.name)
    if place.exists():
        return
    partial = place.with_name(f"{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _manifest(store, config, stage)
    fetch_verified(store, join(result_uri(config, stage.name), MANIFEST_KEY), partial)
    partial.rename(place)
    log.event("stage fetched", stage=stage.name)


def is_finished(store: Store, config: RunConfig, stage: EffectiveStage) -> bool:
    """Whether it has a result of this job's spec. Raises what is not the stage's fault: StorageDenied and the like."""
    try:
        _manifest(store, config, stage)
    except ObjectMissing:
        return False
    except FineTuneError as error:
        if error.reason != Reason.DATA_INVALID:
            raise
        log.event("stage result skipped", level="warning", stage=stage.name, why=str(error))
        return False
    return True


def read_record(store: Store, config: RunConfig, stages: Sequence[EffectiveStage], number: int) -> Record:
    """What was measured before the stage of this number began."""
    if number == 0:
        return Record()
    before = stages[number - 1]
    _manifest(store, config, before)
    uri = join(result_uri(config, before.name), RECORD)
    return Record.model_validate_json(store.get_bytes(uri, 64 * 2**20))


def _manifest(store: Store, config: RunConfig, stage: EffectiveStage) -> Manifest:
    manifest = read_manifest(store, join(result_uri(config, stage.name), MANIFEST_KEY))
    if (manifest.kind, manifest.spec_sha256) != (kind_of_result(stage), config.spec_sha256):
        raise FineTuneError(Reason.DATA_INVALID, f"stage {stage.name}: its result is not one of this job's spec")
    return manifest
