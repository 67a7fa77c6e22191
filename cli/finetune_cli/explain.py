"""The sum behind a job's sizing, in words: what each stage needs of a GPU, how it would run, and why not otherwise."""

from collections.abc import Iterator

from finetune_api.job import FineTuneJob
from finetune_api.placing import device_of, request_of
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.shape import Request
from finetune_api.sizing import HEADROOM, DoesNotFit, Explanation, ModelShape, Placement, explain, gpu_hours
from finetune_api.sizing import trainable_parameters as trained
from finetune_api.stages import effective
from finetune_api.tuning import Tuning
from finetune_cli.modelsource import Source


def lines(
    job: FineTuneJob, profile: FineTuneProfileSpec, source: Source, tokens: int | None, tflops: float | None
) -> Iterator[str]:
    """For each stage. `tokens`: of the training data; `tflops`: what one GPU does."""
    stages = effective(job.spec)
    device = device_of(profile)
    for stage in stages:
        if stage.generate is not None:
            continue
        if stage.name:
            yield f"stage {stage.name}"
        shape, request = source.shape(stage.spec.tuning), request_of(stages, stage.number)
        yield from _asked(shape, request, stage.spec.tuning)
        try:
            found = explain(shape, request, device)
        except DoesNotFit as error:
            yield f"  does not fit: {error}"
            continue
        yield from _sum(found, device.memory_bytes, device.kind)
        yield from _choice(found, request)
        if tokens and tflops and found.sizing:
            passes = stage.spec.training.epochs or 1
            hours = gpu_hours(
                shape, stage.spec.tuning, round(tokens * passes), tflops, found.sizing.gradient_checkpointing
            )
            yield f"  time       {hours:,.1f} GPU-hours for {passes:g} x {tokens:,} tokens at {tflops:g} TFLOPS"


def _asked(shape: ModelShape, request: Request, tuning: Tuning) -> Iterator[str]:
    count = trained(shape, tuning)
    yield (
        f"  model      {shape.architecture}: {_number(shape.parameters)} parameters, {shape.layers} blocks of "
        f"{shape.hidden_size}, {shape.vocab_size:,} tokens in the vocabulary"
    )
    share = 100 * count / shape.parameters
    yield f"  tuning     {tuning.type}: {_number(count)} parameters are trained ({share:.2g} %)"
    rows = "" if request.sequences == 1 else f", {request.sequences} rows for each example"
    yield (
        f"  batch      {request.global_batch_size} examples of at most {request.sequence_length:,} tokens{rows} over "
        f"{request.world_size} process{'es' if request.world_size > 1 else ''}"
    )


def _sum(found: Explanation, memory: int, kind: str) -> Iterator[str]:
    yield f"  memory of one process with {told(found.placement)}"
    width = max(len(term.name) for term in found.terms)
    for term in found.terms:
        yield f"    {term.name:<{width}}  {_gib(term.bytes):>11}   {term.why}"
    need = sum(term.bytes for term in found.terms)
    where = "the GPU" if kind == "CUDA" else "the process"
    verdict = "fits" if need <= found.budget else "does not fit"
    yield (
        f"    {'sum':<{width}}  {_gib(need):>11}   {verdict}: {_gib(found.budget)} may be filled, {HEADROOM:g} of "
        f"{where}'s {_gib(memory)}"
    )


def _choice(found: Explanation, request: Request) -> Iterator[str]:
    if found.sizing:
        yield (
            f"  taken      {told(found.placement)}, {found.sizing.gradient_accumulation} forward passes for a step of "
            f"each process"
        )
    else:
        yield "  taken      nothing: the job would end as DoesNotFit before a GPU is asked for"
    for other in found.others:
        yield f"  not taken  {told(other.placement)}: {_gib(other.bytes)}, {other.why_not}"


def told(placement: Placement) -> str:
    parts = [placement.strategy, f"micro-batch {placement.micro}"]
    parts += ["activations recomputed"] if placement.checkpointing else []
    hosted = {"Optimizer": "optimizer in the host's memory", "OptimizerAndParameters": "all in the host's memory"}
    parts += [hosted[placement.offload]] if placement.offload in hosted else []
    return ", ".join(parts)


def _gib(amount: float) -> str:
    return f"{amount / 2**30:,.2f} GiB"


def _number(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
