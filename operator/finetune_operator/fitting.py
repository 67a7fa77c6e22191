"""PURE. Job + profile + what was prepared, and what was tried -> how the next attempt is placed on its GPUs."""

from collections.abc import Sequence
from typing import NamedTuple

from finetune_api import placing
from finetune_api.failures import Reason
from finetune_api.job import FineTuneJob
from finetune_api.jobstatus import Attempt
from finetune_api.profile import FineTuneProfile
from finetune_api.run import PreparedSummary
from finetune_api.shape import ModelShape
from finetune_api.sizing import DoesNotFit, Sizing, at_most, size
from finetune_api.sizing import gpu_hours as flops_hours
from finetune_api.stages import effective
from finetune_operator.attempts import LESS_MEMORY, ran_out_of_memory


class NothingSmaller(Exception):
    """A GPU's memory was too small for a micro-batch of one; the text says what else there is to do."""


class Fit(NamedTuple):
    sizings: list[Sizing]
    """One for each stage."""
    smaller: str = ""
    """In words, where it has less in a micro-batch than what ran out of memory."""

    @property
    def largest(self) -> Sizing:
        """Of the stage that needs most."""
        return max(self.sizings, key=lambda sizing: sizing.memory_per_gpu)


def fit(
    job: FineTuneJob, profile: FineTuneProfile, prepared: PreparedSummary, attempts: Sequence[Attempt], workers: int
) -> Fit:
    """After an OutOfMemory every stage takes half of its micro-batch at a time: which one it was is not told for sure,
    and it costs the others some speed and nothing of what they learn. Raises DoesNotFit, NothingSmaller."""
    sizings = sized(job, profile, prepared, workers)
    short = ran_out_of_memory(attempts)
    if short is None:
        return Fit(sizings)
    # The estimate that was too low is that of the attempt's own number of workers.
    tried = sized(job, profile, prepared, short.workers or workers)
    if all(sizing.micro_batch_size == 1 for sizing in tried):
        raise NothingSmaller(f"{short.message or Reason.OUT_OF_MEMORY}; its micro-batch is 1 already; {LESS_MEMORY}")
    limits = [max(1, sizing.micro_batch_size // 2) for sizing in tried]
    halved = sized(job, profile, prepared, workers, limits)
    stage = max(range(len(tried)), key=lambda number: tried[number].memory_per_gpu)
    was, now = tried[stage], halved[stage]
    return Fit(
        halved,
        f"micro-batch {now.micro_batch_size} instead of {was.micro_batch_size} and gradient accumulation "
        f"{now.gradient_accumulation} instead of {was.gradient_accumulation}",
    )


def sized(
    job: FineTuneJob,
    profile: FineTuneProfile,
    prepared: PreparedSummary,
    workers: int | None = None,
    limits: Sequence[int] = (),
) -> list[Sizing]:
    """One for each stage. `workers`: None: as many as the spec asks for; `limits`: of the stages' micro-batches.
    Raises DoesNotFit."""
    count = len(effective(job.spec))
    return [_sized(job, profile, prepared, number, workers, limits) for number in range(count)]


def gpu_hours(
    job: FineTuneJob, profile: FineTuneProfile, prepared: PreparedSummary, sizings: Sequence[Sizing]
) -> float | None:
    """What all stages take together, by the profile's accelerator.tflops; None where that is not said, or where a model
    writes answers or rows, which takes longer than to learn from them."""
    accelerator, stages = profile.spec.accelerator, effective(job.spec)
    tflops = accelerator.tflops if accelerator else None
    if tflops is None or any(stage.generate or stage.spec.method.rollout for stage in stages):
        return None
    hours = 0.0
    for stage, sizing in zip(stages, sizings, strict=True):
        training = stage.spec.training
        tokens = prepared.stages[stage.number].train_tokens if prepared.stages else prepared.train_tokens
        seen = tokens * (training.epochs or 1)
        if training.max_steps:
            row = prepared.train_tokens / max(1, prepared.train_examples)
            seen = row * training.global_batch_size * training.max_steps
        shape = _shape(prepared, stage.number)
        hours += flops_hours(shape, stage.spec.tuning, round(seen), tflops, sizing.gradient_checkpointing)
    return hours


def _shape(prepared: PreparedSummary, number: int) -> ModelShape:
    """The model as one stage trains it."""
    if not prepared.stages:
        return prepared.model
    own = prepared.stages[number]
    targets = {"target_features": own.target_features, "target_outputs": own.target_outputs}
    return prepared.model.model_copy(update=targets)


def _sized(
    job: FineTuneJob,
    profile: FineTuneProfile,
    prepared: PreparedSummary,
    number: int,
    workers: int | None,
    limits: Sequence[int],
) -> Sizing:
    stages = effective(job.spec)
    shape, name = _shape(prepared, number), stages[number].name
    max_tokens = prepared.stages[number].max_tokens if prepared.stages else prepared.max_tokens
    request = placing.request_of(stages, number, max_tokens, workers)
    device = placing.device_of(profile.spec)
    try:
        found = size(shape, request, device)
    except DoesNotFit as error:
        raise (DoesNotFit(f"stage {name}: {error}") if name else error) from error
    return at_most(limits[number], found, shape, request, device) if limits else found
