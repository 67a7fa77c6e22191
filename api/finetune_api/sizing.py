"""Does it fit, and how: model shape + method + GPU -> strategy, micro-batch, memory; or a sentence on what would fit.

Formulas: bytes per GPU for P parameters of which T are trained, over N ranks (ZeRO: Rajbhandari et al. 2020;
activations: Korthikanti et al. 2022), with w bytes a weight, and 16 bytes for each trained parameter (fp32 weight and
gradient, Adam's two moments). Estimates are of peak memory, before allocator fragmentation, which HEADROOM covers.
"""

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.model import ApiModel, ShortText
from finetune_api.tuning import Freeze, LoRA, Tuning

Strategy = Literal["DDP", "ZeRO1", "ZeRO2", "ZeRO3"]
Count = Annotated[int, Field(ge=0)]

HEADROOM = 0.9
"""The share of a device's memory that an estimate may fill."""
RUNTIME_BYTES = {"CUDA": 1.5e9, "CPU": 0.7e9}
"""What a process holds before the model: CUDA context and NCCL buffers, or the interpreter with torch loaded."""
MAX_MICRO_BATCH = 64
ALL_STRATEGIES: tuple[Strategy, ...] = ("DDP", "ZeRO1", "ZeRO2", "ZeRO3")
STRATEGIES: dict[str, tuple[Strategy, ...]] = {
    # bitsandbytes' packed weights cannot be partitioned, nor would DeepSpeed leave them as they are.
    "QLoRA": ("DDP",),
    # The norm of the base weights is taken outside of their layer, where ZeRO-3 has not gathered them.
    "DoRA": ("DDP", "ZeRO1", "ZeRO2"),
    # peft reads these embeddings outside of the forward pass too.
    "PromptTuning": ("DDP", "ZeRO1", "ZeRO2"),
    "PrefixTuning": ("DDP", "ZeRO1", "ZeRO2"),
}
"""By tuning, where not all of them work."""
RECOMPUTATION: dict[str, tuple[bool, ...]] = {"PrefixTuning": (False,)}
"""Whether activations may be recomputed, where not both work: a block's second run would meet its prefix twice."""


class DoesNotFit(Exception):
    """The job cannot run on what it asks for; the text says what would."""


class ModelShape(ApiModel):
    """What memory depends on, from config.json and the safetensors headers."""

    architecture: ShortText
    parameters: Count
    hidden_size: Count
    layers: Count
    vocab_size: Count
    linear_parameters: Count
    """Weights of the linear layers but the head: what QLoRA quantises."""
    target_features: Count
    """Sum of inputs + outputs over the modules that the tuning targets: a LoRA of rank r trains r times as many."""
    target_outputs: Count = 0
    """Sum of outputs alone over the same modules: IA3 trains as many, DoRA as many more than LoRA."""
    block_parameters: Count = 0
    """Weights of one block, the mean of them."""
    key_value_size: Count = 0
    """Width of a layer's keys: less than hidden_size where heads share them."""
    largest_layer_parameters: Count
    max_positions: Count
    dtype: Literal["BFloat16", "Float16", "Float32"]
    """Of the weights as stored."""


class Device(ApiModel):
    """What one rank has."""

    kind: Literal["CPU", "CUDA"]
    memory_bytes: Count


class Sizing(ApiModel):
    strategy: Strategy
    micro_batch_size: Annotated[int, Field(ge=1)]
    gradient_accumulation: Annotated[int, Field(ge=1)]
    gradient_checkpointing: bool = False
    offload: Literal["None", "Optimizer", "OptimizerAndParameters"] = "None"
    memory_per_gpu: Annotated[Count, Field(alias="memoryPerGPU")]
    """Estimated peak bytes of one rank."""
    estimated_gpu_hours: Annotated[float | None, Field(alias="estimatedGPUHours", ge=0)] = None


class Request(ApiModel):
    """What is to be placed: the parts of a spec that memory depends on."""

    tuning: Tuning
    dtype: Literal["Auto", "BFloat16", "Float16", "Float32"] = "Auto"
    sequence_length: Annotated[int, Field(ge=1)]
    """Tokens of the longest row that a rank sees."""
    sequences: Annotated[int, Field(ge=1)] = 1
    """Rows of one example: two where a pair goes through the model together."""
    head: bool = False
    """Whether a head in place of the vocabulary reads the last token of a row: no logits for each token then."""
    global_batch_size: Annotated[int, Field(ge=1)]
    micro_batch_size: Count = 0
    world_size: Annotated[int, Field(ge=1)]
    strategy: Literal["Auto", "DDP", "ZeRO1", "ZeRO2", "ZeRO3"] = "Auto"
    offload: Literal["None", "Optimizer", "OptimizerAndParameters"] = "None"


def trainable_parameters(shape: ModelShape, tuning: Tuning) -> int:
    """T. For PEFT methods the adapter's size, for Freeze the last blocks and the head."""
    match tuning.type:
        case "LoRA" | "QLoRA" | "DoRA":
            rank = (tuning.lora or LoRA()).rank
            magnitudes = shape.target_outputs if tuning.type == "DoRA" else 0
            return rank * shape.target_features + magnitudes
        case "IA3":
            return shape.target_outputs
        case "PromptTuning":
            return tuning.virtual_tokens * shape.hidden_size
        case "PrefixTuning":
            return tuning.virtual_tokens * 2 * shape.layers * (shape.key_value_size or shape.hidden_size)
        case "Freeze":
            blocks = min((tuning.freeze or Freeze()).trainable_layers, shape.layers)
            per_block = shape.block_parameters or shape.linear_parameters // max(1, shape.layers)
            return blocks * per_block + shape.vocab_size * shape.hidden_size
        case "Full":
            return shape.parameters


def memory(
    shape: ModelShape, request: Request, device: Device, strategy: Strategy, micro: int, checkpointing: bool
) -> int:
    """Estimated peak bytes of one rank."""
    return int(
        RUNTIME_BYTES[device.kind]
        + _states(shape, request, device, strategy)
        + _activations(shape, request, device, micro, checkpointing)
    )


def _weight_bytes(request: Request, device: Device) -> int:
    if request.dtype == "Auto":
        return 2 if device.kind == "CUDA" else 4
    return 4 if request.dtype == "Float32" else 2


def _states(shape: ModelShape, request: Request, device: Device, strategy: Strategy) -> float:
    """Weights, gradients and optimizer."""
    n, w = request.world_size, _weight_bytes(request, device)
    trained = trainable_parameters(shape, request.tuning)
    frozen = shape.parameters if request.tuning.type not in ("Full", "Freeze") else shape.parameters - trained
    weights = float(w * frozen)
    if request.tuning.type == "QLoRA":
        weights = 0.52 * shape.linear_parameters + w * (shape.parameters - shape.linear_parameters)
    if strategy == "DDP":
        # Several ranks exchange gradients in buckets of their own, beside the gradients.
        return weights + (16.0 if n == 1 else 20.0) * trained
    # ZeRO computes with a copy in the model's precision; the fp32 copy and Adam's moments are split over the ranks.
    copy, gradients, optimizer = float(w * trained), float(w * trained), 12.0 * trained / n
    if strategy in ("ZeRO2", "ZeRO3"):
        gradients /= n
    if strategy == "ZeRO3":
        # Beyond its share, a rank holds the layer that computes and the one that is fetched ahead.
        weights, copy = weights / n + 2 * w * shape.largest_layer_parameters, copy / n
    if request.offload != "None":
        optimizer = 0.0
    if request.offload == "OptimizerAndParameters":
        weights, copy = 2.0 * w * shape.largest_layer_parameters, 0.0
    return weights + copy + gradients + optimizer


def _activations(shape: ModelShape, request: Request, device: Device, micro: int, checkpointing: bool) -> float:
    """Activations and logits; the figures of facts are for two-byte values."""
    scale = _weight_bytes(request, device) / 2
    tokens = (request.sequence_length + request.tuning.virtual_tokens) * request.sequences * micro
    block = 34 * tokens * shape.hidden_size * scale
    inner = 2 * tokens * shape.hidden_size * shape.layers * scale + block if checkpointing else block * shape.layers
    return inner if request.head else inner + 10 * tokens * shape.vocab_size


def size(shape: ModelShape, request: Request, device: Device) -> Sizing:
    """The first plan that fits. Raises DoesNotFit.

    DDP comes before ZeRO (it is 1.3-6 times faster where it fits), the lowest stage first, recomputation only where
    needed, then the largest micro-batch.
    """
    per_rank, rest = divmod(request.global_batch_size, request.world_size)
    if rest or per_rank == 0:
        lower = max(1, per_rank) * request.world_size
        raise DoesNotFit(
            f"training.globalBatchSize: found {request.global_batch_size}; it must be a multiple of the "
            f"{request.world_size} processes (workers x gpusPerWorker), for example {lower}"
        )
    micros = [m for m in range(min(per_rank, MAX_MICRO_BATCH), 0, -1) if per_rank % m == 0]
    if request.micro_batch_size:
        if per_rank % request.micro_batch_size:
            raise DoesNotFit(
                f"training.microBatchSize: found {request.micro_batch_size}; it must divide the {per_rank} examples "
                f"that each process takes of a global batch of {request.global_batch_size}"
            )
        micros = [request.micro_batch_size]
    budget = device.memory_bytes * HEADROOM
    for strategy in _strategies(request):
        for checkpointing in RECOMPUTATION.get(request.tuning.type, (False, True)):
            for micro in micros:
                need = memory(shape, request, device, strategy, micro, checkpointing)
                if need <= budget:
                    return Sizing(
                        strategy=strategy,
                        micro_batch_size=micro,
                        gradient_accumulation=per_rank // micro,
                        gradient_checkpointing=checkpointing,
                        offload=request.offload,
                        memory_per_gpu=need,
                    )
    raise DoesNotFit(_advice(shape, request, device, micros[-1]))


def _strategies(request: Request) -> tuple[Strategy, ...]:
    if request.strategy != "Auto":
        return (request.strategy,)
    # One rank has nobody to share with.
    return ("DDP",) if request.world_size == 1 else STRATEGIES.get(request.tuning.type, ALL_STRATEGIES)


def _advice(shape: ModelShape, request: Request, device: Device, micro: int) -> str:
    strategies = _strategies(request)
    least = min(
        memory(shape, request, device, s, micro, RECOMPUTATION.get(request.tuning.type, (True,))[-1])
        for s in strategies
    )
    text = (
        f"{shape.parameters / 1e9:.2f}B parameters with {request.tuning.type} need {_gib(least)} of memory per process "
        f"at the least ({strategies[-1]}, micro-batch {micro}, {request.sequence_length} tokens); "
        f"{_gib(device.memory_bytes * HEADROOM)} of {_gib(device.memory_bytes)} can be used"
    )
    for words, change in (
        ("tuning.type QLoRA", {"tuning": Tuning(type="QLoRA", lora=request.tuning.lora), "strategy": "Auto"}),
        ("distribution.strategy ZeRO3", {"strategy": "ZeRO3"}),
        (f"training.maxLength {request.sequence_length // 2}", {"sequence_length": request.sequence_length // 2}),
    ):
        other = request.model_copy(update=change)
        if other != request and memory(shape, other, device, _strategies(other)[-1], micro, True) <= (
            device.memory_bytes * HEADROOM
        ):
            return f"{text}; {words} would fit"
    return f"{text}; a profile with more memory per GPU is needed"


def _gib(amount: float) -> str:
    return f"{amount / 1024**3:.1f} GiB"
