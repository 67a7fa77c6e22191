"""How much memory a rank needs: a sum of named terms.

Formulas: bytes per rank for P parameters of which T are trained, over N ranks (ZeRO: Rajbhandari et al. 2020;
activations: what autograd keeps, counted in transformers' Llama), with w bytes a weight, and 16 bytes for each trained
parameter (fp32 weight and gradient, Adam's two moments). benchmarks/sizing compares them with measured peaks.
"""

from typing import NamedTuple

from finetune_api.shape import Device, ModelShape, Offload, Request, Strategy, trainable_parameters, trained_layers

RUNTIME_BYTES = {"CUDA": 1.5e9, "CPU": 0.7e9}
"""What a process holds before the model: CUDA context and NCCL buffers, or the interpreter with torch loaded."""
GAPS = 1.0
"""Of what a step allocates and frees, the share that glibc keeps in the gaps between: measured on a CPU."""


class Placement(NamedTuple):
    """One way to run a job."""

    strategy: Strategy
    micro: int
    """Examples of a forward pass."""
    checkpointing: bool
    offload: Offload = "None"


class Term(NamedTuple):
    name: str
    bytes: int
    why: str
    """How it comes about, for a person."""


def memory(shape: ModelShape, request: Request, device: Device, placement: Placement) -> int:
    """Estimated peak bytes of one rank."""
    # A shape may contradict itself: more linear weights than weights.
    return max(0, sum(term.bytes for term in terms(shape, request, device, placement)))


def terms(shape: ModelShape, request: Request, device: Device, placement: Placement) -> list[Term]:
    """What the estimate is the sum of."""
    states = _states(shape, request, device, placement)
    step = _activations(shape, request, device, placement)
    trained = next(term for term in states if term.name == "trained weights")
    reference = [Term("reference", trained.bytes, f"{trained.why}: what is trained, as it was before")]
    return [
        *states,
        *(reference if request.reference else ()),
        *step,
        *(_snapshot(shape, request, [*states, *step]) if device.kind == "CPU" else ()),
        Term("runtime", int(RUNTIME_BYTES[device.kind]), f"a process on {device.kind} before it has a model"),
    ]


def _snapshot(shape: ModelShape, request: Request, others: list[Term]) -> list[Term]:
    """What a checkpoint's copy, in the same memory on a CPU, takes beyond what a step has freed by then."""
    count = trainable_parameters(shape, request.tuning)
    gone = ("gradients", "gradient buckets", "activations", "logits")
    freed = sum(term.bytes for term in others if term.name in gone)
    why = f"{_count(count)} x 12 bytes, a checkpoint's copy, less what a step has freed"
    return [Term("snapshot", 12 * count - freed, why)] if 12 * count > freed else []


def weight_bytes(request: Request, device: Device) -> int:
    if request.dtype == "Auto":
        return 2 if device.kind == "CUDA" else 4
    return 4 if request.dtype == "Float32" else 2


def _states(shape: ModelShape, request: Request, device: Device, placement: Placement) -> list[Term]:
    """Weights, gradients and optimizer."""
    n, w, strategy = request.world_size, weight_bytes(request, device), placement.strategy
    trained = trainable_parameters(shape, request.tuning)
    frozen = shape.parameters if request.tuning.is_adapter else shape.parameters - trained
    weights, why = float(w * frozen), f"{_count(frozen)} frozen x {w} bytes"
    if request.tuning.type == "QLoRA":
        rest = shape.parameters - shape.linear_parameters
        weights = 0.52 * shape.linear_parameters + w * rest
        why = f"{_count(shape.linear_parameters)} in 4 bits x 0.52 bytes + {_count(rest)} x {w} bytes"
    t = _count(trained)
    if strategy == "DDP":
        # Several ranks exchange gradients in buckets of their own, beside the gradients.
        buckets = [Term("gradient buckets", 4 * trained, f"{t} x 4 bytes, exchanged by {n} ranks")] if n > 1 else []
        return [
            Term("weights", int(weights), why),
            Term("trained weights", 4 * trained, f"{t} x 4 bytes"),
            Term("gradients", 4 * trained, f"{t} x 4 bytes"),
            Term("optimizer", 8 * trained, f"{t} x 8 bytes, Adam's two moments"),
            *buckets,
        ]
    # ZeRO computes with a copy in the model's precision; the fp32 copy and Adam's moments are split over the ranks.
    copy, gradients, optimizer = float(w * trained), float(w * trained), 12.0 * trained / n
    shared = f" / {n} ranks"
    why_copy = why_gradients = f"{t} x {w} bytes"
    why_optimizer = f"{t} x 12 bytes{shared}: fp32 copy and Adam's two moments"
    if strategy in ("ZeRO2", "ZeRO3"):
        gradients, why_gradients = gradients / n, why_gradients + shared
    if strategy == "ZeRO3":
        # Beyond its share, a rank holds the layer that computes and the one that is fetched ahead.
        gathered = 2 * w * shape.largest_layer_parameters
        weights, why = weights / n + gathered, f"{why}{shared} + two layers of {_count(shape.largest_layer_parameters)}"
        copy, why_copy = copy / n, why_copy + shared
    if placement.offload != "None":
        optimizer, why_optimizer = 0.0, "in the host's memory"
    if placement.offload == "OptimizerAndParameters":
        weights, why = 2.0 * w * shape.largest_layer_parameters, "two layers; the rest in the host's memory"
        copy, why_copy = 0.0, "in the host's memory"
    return [
        Term("weights", int(weights), why),
        Term("trained weights", int(copy), why_copy),
        Term("gradients", int(gradients), why_gradients),
        Term("optimizer", int(optimizer), why_optimizer),
    ]


def _activations(shape: ModelShape, request: Request, device: Device, placement: Placement) -> list[Term]:
    """Activations and logits."""
    w, h = weight_bytes(request, device), shape.hidden_size
    tokens = (request.sequence_length + request.tuning.virtual_tokens) * request.sequences * placement.micro
    # What autograd keeps of a block of a Llama: six inputs of its width and two norms in fp32, keys and values, four
    # of the MLP's width.
    kept = w * (6 * h + 2 * (shape.key_value_size or h) + 4 * (shape.intermediate_size or 4 * h)) + 8 * h
    layers = trained_layers(shape, request.tuning)
    inner, why = tokens * kept * layers, f"{tokens:,} tokens x {kept:,} bytes x {layers} blocks"
    if placement.checkpointing:
        inner = tokens * (w * h * layers + kept)
        why = f"{tokens:,} tokens x {h:,} x {w} bytes x {layers} blocks + one block's {kept:,} bytes a token"
    found = [Term("activations", inner, why)]
    if not request.head:
        found.append(
            Term("logits", 10 * tokens * shape.vocab_size, f"{tokens:,} tokens x {shape.vocab_size:,} x 10 bytes")
        )
    if device.kind == "CPU":
        gaps = int(GAPS * sum(term.bytes for term in found))
        found.append(Term("allocator", gaps, "as much again stays with glibc between steps"))
    return found


def _count(number: int) -> str:
    """1234567 -> 1.23M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
