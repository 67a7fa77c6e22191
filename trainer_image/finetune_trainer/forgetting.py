"""What a stage makes of the stages before it: the language model's loss on their validation data, after each stage."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from finetune_api.run import PreparedData
from finetune_api.stages import EffectiveStage
from finetune_trainer import log, shards
from finetune_trainer.batches import Examples
from finetune_trainer.distributed import Ranks
from finetune_trainer.evaluation.groups import Groups
from finetune_trainer.evaluation.loss import evaluate, figures_of
from finetune_trainer.feed import Data, held_out
from finetune_trainer.shards import Pairs, Unpaired
from finetune_trainer.start import StageRun

ANSWERED = ("Tokens", "Pairs", "Unpaired")
"""Kinds of data that hold answers to learn."""


def retained(run: StageRun, trainer: Any, data: Data, ranks: Ranks) -> dict[str, float]:
    """`<earlier stage>/evalLoss@<this stage>`, nats per token that carries loss; of preferences the good answers'.

    Its own data too where the method's own loss is another one. Nothing for a stage with a new head, whose model does
    not answer. Collective.
    """
    found: dict[str, float] = {}
    if run.stage.has_head:
        return found
    for stage, index in _measured(run, data):
        examples = _answers(run, stage, index, ranks)
        if not len(examples):
            continue
        groups = Groups(np.zeros(len(examples), np.int64), 1)
        sums = evaluate(trainer.model_wrapped, examples, groups, ranks, _batch_size(run, index))
        found[f"{stage.name}/evalLoss@{run.stage.name}"] = figures_of(sums[0].tolist())["evalLoss"]
    if found and ranks.is_main:
        shown: dict[str, Any] = {name: round(value, 4) for name, value in found.items()}
        log.event("earlier stages", **shown)
    return found


def _measured(run: StageRun, data: Data) -> Iterator[tuple[EffectiveStage, PreparedData]]:
    for stage in run.stages[: run.number]:
        path = run.work.of_stage(stage.name).index
        if stage.generate is None and not stage.has_head and path.exists():
            index = PreparedData.model_validate_json(path.read_bytes())
            if index.kind in ANSWERED:
                yield stage, index
    if run.stage.name and data.prepared.kind in ("Pairs", "Unpaired"):
        yield run.stage, data.prepared


def _answers(run: StageRun, stage: EffectiveStage, index: PreparedData, ranks: Ranks) -> Examples:
    work, names = run.work.of_stage(stage.name), [dataset.name for dataset in stage.spec.datasets]
    # An earlier attempt may have trained it, on other pods.
    if ranks.local_rank == 0 and stage.number != run.number:
        shards.decode(index, names, "validation", work)
    ranks.barrier()
    match held_out(index, names, "validation", work).data:
        case Pairs() as pairs:
            return pairs.chosen
        case Unpaired() as rows:
            return rows.examples.of(np.flatnonzero(rows.desirable))
        case Examples() as examples:
            return examples
        case _:
            raise AssertionError(index.kind)


def _batch_size(run: StageRun, index: PreparedData) -> int:
    """As many rows as the stage was sized for, fewer where these are longer."""
    sizing, training = run.config.sizing, run.config.spec.training
    assert sizing
    return max(1, sizing.micro_batch_size * training.max_length // max(training.max_length, index.max_tokens))
