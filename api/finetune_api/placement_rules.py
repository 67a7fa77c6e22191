"""Batches, strategies and offloading that cannot be had with a stage's processes and tuning: said before it is sized"""

from collections.abc import Iterator

from finetune_api.model import Problem
from finetune_api.sizing import ALL_STRATEGIES, OFFLOADING, STRATEGIES
from finetune_api.stages import EffectiveStage


def problems(stage: EffectiveStage) -> Iterator[Problem]:
    yield from _elastic(stage)
    if stage.generate is None:
        distribution = stage.spec.distribution
        yield from _batches(stage, distribution.workers, "workers")
        if distribution.min_workers and distribution.min_workers != distribution.workers:
            yield from _batches(stage, distribution.min_workers, "minWorkers")
        yield from _strategy(stage)


def _elastic(stage: EffectiveStage) -> Iterator[Problem]:
    """What distribution.minWorkers needs to have an effect."""
    spec, path = stage.spec, ("spec", "distribution", "minWorkers")
    least = spec.distribution.min_workers
    if least is None:
        return
    if spec.run_policy.pre_running_deadline_seconds is None:
        text = "runPolicy.preRunningDeadlineSeconds, which says how long all workers are waited for, must be given too"
        yield Problem(path, f"found {least}; {text}")
    if spec.queue and spec.queue.name:
        text = f"the queue {spec.queue.name} admits all workers or none: leave one of the two out"
        yield Problem(path, f"found {least}; {text}")


def _batches(stage: EffectiveStage, workers: int, name: str) -> Iterator[Problem]:
    training, distribution = stage.spec.training, stage.spec.distribution
    processes = workers * distribution.gpus_per_worker
    rollout = stage.spec.method.rollout
    answers = rollout.answers if rollout else 1
    what = "examples" if answers == 1 else f"answers, {answers} to a prompt,"
    per_process, rest = divmod(training.global_batch_size * answers, processes)
    path = stage.path("training")
    if rest:
        text = f"found {training.global_batch_size}; it must be a multiple of the {processes} processes"
        example = max(1, training.global_batch_size // processes) * processes
        yield Problem((*path, "globalBatchSize"), f"{text} ({name} x gpusPerWorker), for example {example}")
    elif training.micro_batch_size and per_process % training.micro_batch_size:
        text = f"found {training.micro_batch_size}; it must divide the {per_process} {what} that each process takes"
        yield Problem((*path, "microBatchSize"), f"{text} of a global batch of {training.global_batch_size}")


def _strategy(stage: EffectiveStage) -> Iterator[Problem]:
    tuning, distribution = stage.spec.tuning, stage.spec.distribution
    wanted, offload = distribution.strategy, distribution.offload
    possible = STRATEGIES.get(tuning.type, ALL_STRATEGIES)
    if wanted not in ("Auto", *possible):
        return  # told by `combinations`
    if offload != "None" and offload != "Auto":
        able = [strategy for strategy in OFFLOADING[offload] if strategy in possible]
        if not able:
            text = f"found {offload}; {tuning.type} trains under {' or '.join(possible)}, which cannot offload it: None"
            yield Problem(("spec", "distribution", "offload"), text)
        elif wanted not in ("Auto", *able):
            text = f"found {offload}; strategy {wanted} cannot offload it: {' or '.join(able)} (or Auto)"
            yield Problem(("spec", "distribution", "offload"), text)
    elif offload == "None" and wanted.startswith("ZeRO") and distribution.workers * distribution.gpus_per_worker == 1:
        text = f"found {wanted}; one process has none to share with: DDP (or Auto), more workers, or offload"
        yield Problem(("spec", "distribution", "strategy"), text)
