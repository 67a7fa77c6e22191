"""What a stage starts from, and what is left of a stage that is finished: folders on the pod's disk.

Base       the base model, and baseModel.adapterUri's adapter where there is one
Carried    the model that the stage before was trained on; its adapter goes on learning
Merged     that model with the adapter worked into it, on disk: so it works for QLoRA and under ZeRO-3 too
Whole      the model that the stage before left
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from finetune_api.run import PreparedData, RunConfig
from finetune_api.stages import EffectiveStage, effective, origin
from finetune_trainer import log
from finetune_trainer.results import fetch_result
from finetune_trainer.runconfig import stage_config
from finetune_trainer.storage import Store
from finetune_trainer.workdir import WorkDir

if TYPE_CHECKING:
    from finetune_trainer.distributed import Ranks


class Start(NamedTuple):
    """What a model is loaded from."""

    model: Path
    """A whole model."""
    adapter: Path | None
    """An adapter upon it."""


def start_of(work: WorkDir, stages: Sequence[EffectiveStage], number: int) -> Start:
    """What the stage starts from; `make_ready` sees to it that it is there."""
    before, how = origin(stages, number)
    if before is None:
        return Start(work.model, work.adapter if stages[number].spec.base_model.adapter_uri else None)
    if how == "Merged":
        return Start(work.merged(stages[before].name), None)
    return result_of(work, stages, before)


def result_of(work: WorkDir, stages: Sequence[EffectiveStage], number: int) -> Start:
    """What a finished stage left; `make_result_ready` sees to it that it is there."""
    stage, place = stages[number], work.result(stages[number].name)
    if not stage.spec.tuning.is_adapter:
        return Start(place, None)
    return Start(start_of(work, stages, number).model, place)


@dataclass(frozen=True)
class StageRun:
    """The stage that this process trains, and its place among the others; a job without stages is one."""

    job: RunConfig
    """As the pod was told."""
    number: int
    root: Path
    """The work folder."""

    @cached_property
    def stages(self) -> list[EffectiveStage]:
        return effective(self.job.spec)

    @property
    def stage(self) -> EffectiveStage:
        return self.stages[self.number]

    @property
    def is_last(self) -> bool:
        return self.number == len(self.stages) - 1

    @cached_property
    def config(self) -> RunConfig:
        """What a pod would be told of a job that is this stage alone."""
        return stage_config(self.job, self.stage)

    @property
    def work(self) -> WorkDir:
        """With the stage's own folders."""
        return WorkDir(self.root, self.stage.name)

    @cached_property
    def index(self) -> PreparedData:
        """The job's own: what all stages are trained on."""
        return PreparedData.model_validate_json(WorkDir(self.root).index.read_bytes())

    @property
    def start(self) -> Start:
        return start_of(self.work, self.stages, self.number)

    @property
    def origin(self) -> str:
        """In words."""
        return in_words(self.stages, self.number)

    def span(self) -> tuple[float, float]:
        """The share of the job's steps that lies before this stage, and the share that it is."""
        if not self.stage.name:
            return 0.0, 1.0
        steps = [float(_steps(stage, WorkDir(self.root, stage.name).index)) for stage in self.stages]
        return sum(steps[: self.number]) / sum(steps), steps[self.number] / sum(steps)

    def make_ready(self, store: Store, ranks: "Ranks") -> Start:
        """Collective: one rank of each pod fetches and merges what the stage starts from. Raises FineTuneError."""
        if ranks.local_rank == 0:
            make_ready(store, self.job, self.work, self.stages, self.number)
        if ranks.is_main and self.stage.name:
            log.event("stage starts", stage=self.stage.name, number=self.number, origin=self.origin)
        ranks.barrier()
        return self.start


def _steps(stage: EffectiveStage, index: Path) -> int:
    """About as many as it trains: packed rows are counted as if they were full."""
    training, sft = stage.spec.training, stage.spec.method.sft
    if stage.generate:
        return max(1, stage.generate.count // training.global_batch_size)
    if training.max_steps or not index.exists():
        # What an earlier stage writes is not there yet.
        return training.max_steps or 1
    prepared = PreparedData.model_validate_json(index.read_bytes())
    shards = [shard for shard in prepared.shards if shard.split == "train"]
    rows = sum(shard.rows for shard in shards)
    if sft and sft.packing:
        rows = sum(shard.tokens for shard in shards) // training.max_length
    return max(1, round((training.epochs or 1.0) * rows / training.global_batch_size))


def needed(stages: Sequence[EffectiveStage], number: int) -> list[int]:
    """The stages whose results `start_of` this one is made of, first to last."""
    before, how = origin(stages, number)
    if before is None:
        return []
    return [*(() if how == "Whole" else needed(stages, before)), before]


def in_words(stages: Sequence[EffectiveStage], number: int) -> str:
    """What a stage starts from, for a person."""
    before, how = origin(stages, number)
    name = "" if before is None else stages[before].name
    return {
        "Base": "the base model",
        "Carried": f"the adapter of stage {name}, carried on",
        "Merged": f"the adapter of stage {name}, merged into its model",
        "Whole": f"the model of stage {name}",
    }[how]


def make_ready(store: Store, config: RunConfig, work: WorkDir, stages: Sequence[EffectiveStage], number: int) -> None:
    """Fetches and merges what `start_of` names; by one process of a pod. `config`: the job's. Raises FineTuneError."""
    for result in needed(stages, number):
        fetch_result(store, config, work, stages[result])
    for stage in _merges(stages, number):
        _merge(config, work, stages, stage)


def make_result_ready(
    store: Store, config: RunConfig, work: WorkDir, stages: Sequence[EffectiveStage], number: int
) -> None:
    """Fetches and merges what `result_of` names; as `make_ready`."""
    if stages[number].spec.tuning.is_adapter:
        make_ready(store, config, work, stages, number)
    fetch_result(store, config, work, stages[number])


def _merges(stages: Sequence[EffectiveStage], number: int) -> Iterator[int]:
    """The stages whose adapter is worked into its model on the way to this one, first to last."""
    before, how = origin(stages, number)
    if before is None or how == "Whole":
        return
    yield from _merges(stages, before)
    if how == "Merged":
        yield before


def _merge(config: RunConfig, work: WorkDir, stages: Sequence[EffectiveStage], number: int) -> None:
    # Only who merges needs torch: the process that pulls asks this module, too.
    from finetune_trainer import save
    from finetune_trainer.model import dtype_of

    stage = stages[number]
    place = work.merged(stage.name)
    if place.exists():
        return
    model, adapter = result_of(work, stages, number)
    assert adapter
    partial = place.with_name(f"{place.name}.partial")
    dtype = dtype_of(stage.spec, config.devices)
    save.save_merged(model, stage.spec.tuning, dtype, "CAUSAL_LM", (), adapter, partial)
    save.copy_tokenizer(model, partial)
    partial.rename(place)
    log.event("stage merged", stage=stage.name)
