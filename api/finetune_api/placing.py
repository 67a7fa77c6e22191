"""A stage of a job under a profile -> what sizing is asked: the same for the operator and for `lint --explain`."""

from collections.abc import Sequence

from finetune_api.formats import kind_of
from finetune_api.model import quantity
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.shape import Device, Request
from finetune_api.stages import EffectiveStage, keeps_reference


def request_of(
    stages: Sequence[EffectiveStage], number: int, max_tokens: int = 0, workers: int | None = None
) -> Request:
    """`max_tokens`: of the longest sequence that was prepared; 0 where that is not known, so that it may be any.
    `workers`: how many there are; None: as many as the spec asks for."""
    spec, stage = stages[number].spec, stages[number]
    packing = spec.method.sft is not None and spec.method.sft.packing
    longest = spec.training.max_length if packing else min(spec.training.max_length, max_tokens or 2**31)
    rollout = spec.method.rollout
    return Request(
        tuning=spec.tuning,
        dtype=spec.base_model.dtype,
        # What was prepared are prompts: the answers follow them.
        sequence_length=longest + (rollout.max_new_tokens if rollout else 0),
        sequences=2 if kind_of(spec.method.type, spec.datasets) == "Pairs" else 1,
        head=stage.has_head,
        reference=keeps_reference(stages, number),
        global_batch_size=spec.training.global_batch_size * (rollout.answers if rollout else 1),
        micro_batch_size=spec.training.micro_batch_size,
        world_size=(workers or spec.distribution.workers) * spec.distribution.gpus_per_worker,
        strategy=spec.distribution.strategy,
        offload=spec.distribution.offload,
    )


def device_of(profile: FineTuneProfileSpec) -> Device:
    accelerator = profile.accelerator
    memory = accelerator.memory if accelerator else profile.resources.memory
    return Device(kind="CUDA" if accelerator else "CPU", memory_bytes=int(quantity(memory)))
