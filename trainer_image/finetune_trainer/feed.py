"""What a run learns from: from the shards on the pod's disk to each rank's micro-batches."""

from typing import NamedTuple

from finetune_api.failures import FineTuneError, Reason
from finetune_api.formats import Kind
from finetune_api.run import PreparedData, RunConfig, Split
from finetune_trainer import log, shards
from finetune_trainer.batches import Examples, MicroBatches, Plan, Rows, rows_of
from finetune_trainer.distributed import Ranks
from finetune_trainer.mix import weights_of
from finetune_trainer.preferences import PairBatches, UnpairedBatches, rows_of_pairs
from finetune_trainer.shards import Pairs, Unpaired
from finetune_trainer.workdir import WorkDir

Held = Examples | Pairs | Unpaired


class Data(NamedTuple):
    prepared: PreparedData
    train: Held
    validation: Held
    plan: Plan

    @property
    def held_out(self) -> int:
        """Examples that are evaluated."""
        return len(sequences(self.validation))


def load_data(config: RunConfig, work: WorkDir, ranks: Ranks) -> Data:
    """Collective: one rank of each pod decodes the shards, all map the result."""
    spec, training = config.spec, config.spec.training
    index = PreparedData.model_validate_json(work.index.read_bytes())
    if ranks.local_rank == 0:
        for split in ("train", "validation"):
            shards.decode(index, [dataset.name for dataset in spec.datasets], split, work)
    ranks.barrier()
    train, validation = _load(index.kind, "train", work), _load(index.kind, "validation", work)
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
    )
    data = Data(index, train, validation, plan)
    if ranks.is_main:
        log.event(
            "data",
            examples=len(sequences(train)),
            rows=len(plan.rows),
            validation=data.held_out,
            steps=plan.total_steps,
        )
        if not data.held_out:
            log.event("no validation data: nothing will be evaluated", level="warning")
    return data


def micro_batches(data: Data, config: RunConfig, ranks: Ranks, micro_batch: int, flat: bool) -> MicroBatches:
    """`flat`: see `batches.collate`."""
    places = {"rank": ranks.rank, "world_size": ranks.world_size, "micro_batch": micro_batch}
    match data.train:
        case Pairs():
            return PairBatches(data.plan, data.train, **places)
        case Unpaired():
            # An answer with another prompt is no longer than the longest sequence that the model was sized for.
            return UnpairedBatches(data.plan, data.train, max_length=data.prepared.max_tokens, **places)
        case Examples():
            return MicroBatches(data.plan, data.train, packed=packed(config), flat=flat, **places)


def packed(config: RunConfig) -> bool:
    return bool(config.spec.method.sft and config.spec.method.sft.packing)


def sequences(data: Held) -> Examples:
    """One sequence of each example: of pairs the chosen one."""
    match data:
        case Pairs():
            return data.chosen
        case Unpaired():
            return data.examples
        case Examples():
            return data


def _load(kind: Kind, split: Split, work: WorkDir) -> Held:
    match kind:
        case "Pairs":
            return shards.load_pairs(split, work)
        case "Unpaired":
            return shards.load_unpaired(split, work)
        case "Tokens":
            return shards.load(split, work)
        case _:
            raise FineTuneError(Reason.INVALID_SPEC, f"spec.method: this version does not train on {kind.lower()}")


def _rows(train: Held, config: RunConfig) -> Rows:
    if isinstance(train, Pairs):
        return rows_of_pairs(train)
    training = config.spec.training
    return rows_of(sequences(train), packed(config), training.max_length, training.seed)
