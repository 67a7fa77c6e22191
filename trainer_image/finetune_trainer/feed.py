"""What a run learns from: from the shards on the pod's disk to each rank's micro-batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import PreparedData, RunConfig, Split
from finetune_trainer import log, shards, streaming
from finetune_trainer.batches import Examples, MicroBatches, Plan, Rows, rows_of
from finetune_trainer.distributed import Ranks
from finetune_trainer.evaluation.groups import Groups, groups_of
from finetune_trainer.labelled import ClassBatches
from finetune_trainer.mix import weights_of
from finetune_trainer.preferences import PairBatches, UnpairedBatches, rows_of_pairs
from finetune_trainer.prompting import PromptBatches
from finetune_trainer.shards import Classes, Pairs, Prompts, Unpaired
from finetune_trainer.workdir import WorkDir

HELD_OUT: tuple[Split, ...] = ("validation", "test", "retention")
Held = Examples | Pairs | Unpaired | Classes | Prompts


class HeldOut(NamedTuple):
    """A split that is measured and never learned from."""

    data: Held
    groups: Groups


class Data(NamedTuple):
    prepared: PreparedData
    train: Held
    plan: Plan
    held: dict[Split, HeldOut]
    """Validation, test and retention data, where there are any."""
    fetch: Callable[[int], None]
    """See `MicroBatches.fetch`."""

    @property
    def held_out(self) -> int:
        """Examples that are evaluated."""
        return sum(len(sequences(held.data)) for held in self.held.values())


def load_data(config: RunConfig, work: WorkDir, ranks: Ranks) -> Data:
    """Collective: one rank of each pod decodes the shards, all map the result."""
    spec, training = config.spec, config.spec.training
    index, names = PreparedData.model_validate_json(work.index.read_bytes()), [d.name for d in spec.datasets]
    if ranks.local_rank == 0:
        if index.outline:
            streaming.lay_out(index, names, work)
        for split in HELD_OUT if index.outline else ("train", *HELD_OUT):
            shards.decode(index, names, split, work)
    ranks.barrier()
    train = _load(index, "train", work)
    held = {split: held_out(index, names, split, work) for split in HELD_OUT}
    if not len(sequences(train)):
        raise FineTuneError(Reason.DATA_INVALID, "spec.datasets: no training examples are left after cleaning")
    rows = _rows(train, config)
    plan = Plan(
        rows,
        global_batch=training.global_batch_size,
        weights=weights_of(spec, rows),
        seed=training.seed,
        epochs=training.epochs,
        max_steps=training.max_steps,
        repeats=rollout.updates if (rollout := spec.method.rollout) else 1,
    )
    known = {split: part for split, part in held.items() if len(part.groups.leaf)}
    fetch = streaming.Stream(config, index, plan, work, ranks) if index.outline else _nothing
    data = Data(index, train, plan, known, fetch)
    counts: dict[str, Any] = {split: len(part.groups.leaf) for split, part in data.held.items()}
    if ranks.is_main:
        log.event(
            "data",
            examples=len(sequences(train)),
            rows=len(plan.rows),
            steps=plan.total_steps,
            **counts,
        )
        if not data.held_out:
            log.event("no validation data: nothing will be evaluated", level="warning")
    return data


def micro_batches(data: Data, config: RunConfig, ranks: Ranks, micro_batch: int, flat: bool) -> MicroBatches:
    """`flat`: see `batches.collate`."""
    batches = _micro_batches(data, config, ranks, micro_batch, flat)
    batches.fetch = data.fetch
    return batches


def _micro_batches(data: Data, config: RunConfig, ranks: Ranks, micro_batch: int, flat: bool) -> MicroBatches:
    places = {"rank": ranks.rank, "world_size": ranks.world_size, "micro_batch": micro_batch}
    match data.train:
        case Pairs():
            return PairBatches(data.plan, data.train, **places)
        case Unpaired():
            # An answer with another prompt is no longer than the longest sequence that the model was sized for.
            return UnpairedBatches(data.plan, data.train, max_length=data.prepared.max_tokens, **places)
        case Classes():
            return ClassBatches(data.plan, data.train, **places)
        case Prompts():
            rollout = config.spec.method.rollout
            return PromptBatches(data.plan, data.train, answers=rollout.answers if rollout else 1, **places)
        case Examples():
            return MicroBatches(data.plan, data.train, packed=packed(config), flat=flat, **places)


def _nothing(step: int) -> None:
    """All tokens lie on the disk."""


def packed(config: RunConfig) -> bool:
    return bool(config.spec.method.sft and config.spec.method.sft.packing)


def sequences(data: Held) -> Examples:
    """One sequence of each example: of pairs the chosen one."""
    match data:
        case Pairs():
            return data.chosen
        case Unpaired() | Classes() | Prompts():
            return data.examples
        case Examples():
            return data


def held_out(index: PreparedData, names: list[str], split: Split, work: WorkDir) -> HeldOut:
    """What `shards.decode` wrote of a split."""
    data = _load(index, split, work)
    known = shards.datasets_of(index, names, split)
    return HeldOut(data, groups_of(sequences(data).dataset, known, shards.load_slices(split, work)))


def _load(index: PreparedData, split: Split, work: WorkDir) -> Held:
    match shards.kind_of(index, split):
        case "Pairs":
            return shards.load_pairs(split, work)
        case "Unpaired":
            return shards.load_unpaired(split, work)
        case "Classes":
            return shards.load_classes(split, work, index.classes)
        case "Prompts":
            return shards.load_prompts(split, work)
        case "Tokens":
            return shards.load(split, work)


def _rows(train: Held, config: RunConfig) -> Rows:
    if isinstance(train, Pairs):
        return rows_of_pairs(train)
    training = config.spec.training
    return rows_of(sequences(train), packed(config), training.max_length, training.seed)
