"""Does it fit, and how: model shape + spec + GPU -> strategy, micro-batch, memory; or a sentence on what would fit."""

from collections.abc import Iterator
from typing import Annotated, NamedTuple

from pydantic import Field

from finetune_api.bounds import MOST
from finetune_api.memory import Placement, Term, memory, terms
from finetune_api.model import ApiModel
from finetune_api.shape import Count, Device, ModelShape, Offload, Request, Strategy, trainable_parameters
from finetune_api.tuning import Tuning

__all__ = [
    "Device",
    "DoesNotFit",
    "Explanation",
    "ModelShape",
    "Other",
    "Placement",
    "Request",
    "Sizing",
    "Strategy",
    "Term",
    "at_most",
    "explain",
    "gpu_hours",
    "memory",
    "size",
    "terms",
    "trainable_parameters",
]

HEADROOM = 0.9
"""The share of a device's memory that an estimate may fill; the rest is for the allocator's gaps."""
MAX_MICRO_BATCH = 64
ALL_STRATEGIES: tuple[Strategy, ...] = ("DDP", "ZeRO1", "ZeRO2", "ZeRO3")
STRATEGIES: dict[str, tuple[Strategy, ...]] = {
    # bitsandbytes' packed weights cannot be partitioned, nor would DeepSpeed leave them as they are.
    "QLoRA": ("DDP",),
    # The norm of the base weights is taken outside of their layer, where ZeRO-3 has not gathered them.
    "DoRA": ("DDP", "ZeRO1", "ZeRO2"),
    # peft reads these factors outside of their own module's forward pass.
    "IA3": ("DDP", "ZeRO1", "ZeRO2"),
    # peft reads these embeddings outside of the forward pass too.
    "PromptTuning": ("DDP", "ZeRO1", "ZeRO2"),
    "PrefixTuning": ("DDP", "ZeRO1", "ZeRO2"),
}
"""By tuning, where not all of them work."""
OFFLOADING: dict[Offload, tuple[Strategy, ...]] = {
    "None": ALL_STRATEGIES,
    "Optimizer": ("ZeRO2", "ZeRO3"),
    "OptimizerAndParameters": ("ZeRO3",),
}
"""The strategies that can do it."""
RECOMPUTATION: dict[str, tuple[bool, ...]] = {"PrefixTuning": (False,)}
"""Whether activations may be recomputed, where not both work: a block's second run would meet its prefix twice."""


class DoesNotFit(Exception):
    """The job cannot run on what it asks for; the text says what would."""


class Sizing(ApiModel):
    strategy: Strategy
    micro_batch_size: Annotated[int, Field(ge=1)]
    gradient_accumulation: Annotated[int, Field(ge=1)]
    gradient_checkpointing: bool = False
    offload: Offload = "None"
    memory_per_gpu: Annotated[Count, Field(alias="memoryPerGPU")]
    """Estimated peak bytes of one rank."""
    estimated_gpu_hours: Annotated[float | None, Field(alias="estimatedGPUHours", ge=0, le=MOST)] = None


class Other(NamedTuple):
    """A way to run a job that was not taken."""

    placement: Placement
    bytes: int
    """Of one rank."""
    why_not: str


class Explanation(NamedTuple):
    sizing: Sizing | None
    """None: nothing fits."""
    placement: Placement
    """What was taken; where nothing fits, what needs least."""
    terms: list[Term]
    """Of the placement: their sum is the estimate."""
    budget: int
    """Bytes that an estimate may fill."""
    others: list[Other]


def size(shape: ModelShape, request: Request, device: Device) -> Sizing:
    """The first plan that fits. Raises DoesNotFit.

    DDP comes before ZeRO (it is 1.3-6 times faster where it fits), the lowest stage first, recomputation only where
    needed, then the largest micro-batch; offloading comes last of all, where it may be chosen.
    """
    micros = _micro_batches(request)
    budget = device.memory_bytes * HEADROOM
    for way in _ways(request):
        for micro in micros:
            placement = way._replace(micro=micro)
            need = memory(shape, request, device, placement)
            if need <= budget:
                return Sizing(
                    strategy=placement.strategy,
                    micro_batch_size=micro,
                    gradient_accumulation=request.global_batch_size // request.world_size // micro,
                    gradient_checkpointing=placement.checkpointing,
                    offload=placement.offload,
                    memory_per_gpu=need,
                )
    raise DoesNotFit(_advice(shape, request, device, micros[-1]))


def at_most(micro: int, sizing: Sizing, shape: ModelShape, request: Request, device: Device) -> Sizing:
    """The same way to run with a micro-batch of no more than `micro` >= 1: the global batch stays, more of it is
    accumulated. Nothing else changes, though more might fit: it was too much once."""
    per_rank = request.global_batch_size // request.world_size
    size = max(m for m in range(1, min(micro, sizing.micro_batch_size) + 1) if per_rank % m == 0)
    placement = Placement(sizing.strategy, size, sizing.gradient_checkpointing, sizing.offload)
    return sizing.model_copy(
        update={
            "micro_batch_size": size,
            "gradient_accumulation": per_rank // size,
            "memory_per_gpu": memory(shape, request, device, placement),
        }
    )


def explain(shape: ModelShape, request: Request, device: Device) -> Explanation:
    """What `size` weighs: the terms of what it takes, and of each other way the least it needs, and why not.

    Raises DoesNotFit where the batch cannot be divided: there is nothing to sum up then.
    """
    micros = _micro_batches(request)
    budget = int(device.memory_bytes * HEADROOM)
    try:
        sizing: Sizing | None = size(shape, request, device)
    except DoesNotFit:
        sizing = None
    ways = [way._replace(micro=micros[-1]) for way in _ways(request)]
    least = {way: memory(shape, request, device, way) for way in ways}
    if sizing:
        taken = Placement(sizing.strategy, sizing.micro_batch_size, sizing.gradient_checkpointing, sizing.offload)
    else:
        taken = min(ways, key=lambda way: least[way])
    others = [
        Other(way, need, f"does not fit at micro-batch {way.micro}" if need > budget else "fits too, and is slower")
        for way, need in least.items()
        if way._replace(micro=taken.micro) != taken
    ]
    return Explanation(sizing, taken, terms(shape, request, device, taken), budget, others)


def gpu_hours(shape: ModelShape, tuning: Tuning, tokens: int, tflops: float, recomputed: bool = False) -> float:
    """Hours of one GPU that does `tflops` in this job, over `tokens` tokens, padding and repetitions included.

    A token costs 2 P operations forward, 2 P for what flows back, 2 T for the gradients of what is trained (Kaplan et
    al. 2020, with T = P), and recomputation the forward pass once more; attention's own share is left out.
    """
    flops = (4 + 2 * recomputed) * shape.parameters + 2 * trainable_parameters(shape, tuning)
    return min(tokens * flops / (tflops * 1e12) / 3600, MOST)


def _micro_batches(request: Request) -> list[int]:
    """The sizes that may be chosen, the largest first. Raises DoesNotFit."""
    per_rank, rest = divmod(request.global_batch_size, request.world_size)
    if rest or per_rank == 0:
        lower = max(1, per_rank) * request.world_size
        raise DoesNotFit(
            f"training.globalBatchSize: found {request.global_batch_size}; it must be a multiple of the "
            f"{request.world_size} processes (workers x gpusPerWorker), for example {lower}"
        )
    if not request.micro_batch_size:
        return [m for m in range(min(per_rank, MAX_MICRO_BATCH), 0, -1) if per_rank % m == 0]
    if per_rank % request.micro_batch_size:
        raise DoesNotFit(
            f"training.microBatchSize: found {request.micro_batch_size}; it must divide the {per_rank} examples "
            f"that each process takes of a global batch of {request.global_batch_size}"
        )
    return [request.micro_batch_size]


def _ways(request: Request) -> Iterator[Placement]:
    """Everything that may be tried but the micro-batch, the fastest first."""
    offloads: tuple[Offload, ...] = tuple(OFFLOADING) if request.offload == "Auto" else (request.offload,)
    for offload in offloads:
        for strategy in _strategies(request, offload):
            for checkpointing in RECOMPUTATION.get(request.tuning.type, (False, True)):
                yield Placement(strategy, 1, checkpointing, offload)


def _strategies(request: Request, offload: Offload = "None") -> list[Strategy]:
    if request.strategy != "Auto":
        # One that cannot do it leaves nothing to try; `combinations` says so before it comes to this.
        return [request.strategy] if request.strategy in OFFLOADING[offload] or request.offload != "Auto" else []
    known = [s for s in STRATEGIES.get(request.tuning.type, ALL_STRATEGIES) if s in OFFLOADING[offload]]
    # One rank has nobody to share with, but the host.
    return known if request.world_size > 1 or offload != "None" else ["DDP"]


def _advice(shape: ModelShape, request: Request, device: Device, micro: int) -> str:
    usable = device.memory_bytes * HEADROOM

    def least(wanted: Request) -> int:
        return min((memory(shape, wanted, device, way._replace(micro=micro)) for way in _ways(wanted)), default=0)

    best = min(_ways(request), key=lambda way: memory(shape, request, device, way._replace(micro=micro)))
    text = (
        f"{shape.parameters / 1e9:.2f}B parameters with {request.tuning.type} need {_gib(least(request))} of memory "
        f"per process at the least ({best.strategy}, micro-batch {micro}, {request.sequence_length} tokens); "
        f"{_gib(usable)} of {_gib(device.memory_bytes)} can be used"
    )
    shorter = request.sequence_length // 2
    # What learns the same comes first, for an adapter what is small.
    host = ("distribution.offload Auto", {"strategy": "Auto", "offload": "Auto"})
    for words, change in (
        *(() if request.tuning.is_adapter else (host,)),
        ("tuning.type QLoRA", {"tuning": Tuning(type="QLoRA", lora=request.tuning.lora), "strategy": "Auto"}),
        ("distribution.strategy ZeRO3", {"strategy": "ZeRO3"}),
        (f"training.maxLength {shorter}", {"sequence_length": shorter}),
    ):
        other = request.model_copy(update=change)
        if other != request and shorter and 0 < least(other) <= usable:
            return f"{text}; {words} would fit"
    return f"{text}; a profile with more memory per GPU is needed"


def _gib(amount: float) -> str:
    return f"{amount / 1024**3:.1f} GiB"
