"""What each rank runs of one stage, `python -m finetune_trainer.train`, from top to bottom.

    run.json -> process group -> data and model from the pod's disk -> newest checkpoint -> evaluate -> train
    -> evaluate -> save -> publish -> outcome

The launcher has pulled everything and set RANK and its like, and FINETUNE_STAGE. How it ended stands in
`WorkDir.outcome(rank)`.
"""

import logging
import os
import sys
import warnings
from typing import Any

import torch
import transformers
from transformers import TrainingArguments
from transformers.trainer_utils import set_seed

from finetune_api.failures import FineTuneError, Reason, TerminationMessage, TrainingResult
from finetune_api.run import RunConfig
from finetune_api.sizing import Sizing
from finetune_api.stages import keeps_reference
from finetune_trainer import arguments, distributed, heartbeat, log, model, state, tuning
from finetune_trainer.batches import Plan
from finetune_trainer.between import prepare_between
from finetune_trainer.callbacks import Signals
from finetune_trainer.checkpoint import Checkpoints
from finetune_trainer.cleanup import clean_up
from finetune_trainer.control import best_step
from finetune_trainer.evaluation.evaluator import Evaluator
from finetune_trainer.evaluation.gates import check
from finetune_trainer.facts import Evidence
from finetune_trainer.feed import load_data, micro_batches
from finetune_trainer.fence import Fence
from finetune_trainer.forgetting import retained
from finetune_trainer.journal import Journal
from finetune_trainer.methods import make_trainer, task_of
from finetune_trainer.methods.reference import FirstValues
from finetune_trainer.outcome import failure_of, write_outcome
from finetune_trainer.output import Trained, publish_output, publish_sound, publish_stage, save_output
from finetune_trainer.report import Reporter
from finetune_trainer.reward_model import load_rewards
from finetune_trainer.runconfig import read_config
from finetune_trainer.soundness import check_finite
from finetune_trainer.start import StageRun
from finetune_trainer.steering import Course
from finetune_trainer.storage import Store
from finetune_trainer.synthesis.write import generate
from finetune_trainer.workdir import WorkDir


def train(run: StageRun, signals: Signals, reporter: Reporter, end: "End") -> None:
    config, work = run.config, run.work
    spec, sizing = config.spec, sizing_of(config)
    reporter.stage(run.stage.name, *run.span())
    reporter.phase("Loading")
    ranks = distributed.start(config.devices, zero=sizing.strategy != "DDP")
    store = Store(config.storage)
    if known := ranks.from_main(published_before(run, store) if ranks.is_main else None):
        distributed.stop(ranks)
        if ranks.is_main:
            end.publish(run, TrainingResult.model_validate(known))
            clean_up(store, run.job)
        return
    start = run.make_ready(store, ranks)
    if run.number == 0:
        # What later stages start from is our own.
        share = ranks.local_rank, config.devices.processes_per_worker
        check_finite(start.model, "spec.baseModel.uri", *share)
        if start.adapter:
            check_finite(start.adapter, "spec.baseModel.adapterUri", *share)
    prepare_between(run, store, ranks)
    data = load_data(config, work, ranks)

    # The arguments come before the model: under ZeRO-3 it is partitioned while it loads.
    dtype = model.dtype_of(spec, config.devices)
    args = make_arguments(config, work, data.plan, dtype)
    place = ranks.device if sizing.strategy != "ZeRO3" else None
    attention = model.attention_of(dtype, config.devices)
    task, classes = task_of(spec.method, data.prepared.kind), data.prepared.classes
    # A head that the base model lacks is made of random numbers.
    set_seed(spec.training.seed)
    quantization = model.quantization_of(spec.tuning, dtype)
    base = model.load_model(start.model, dtype, attention, place, quantization, task, classes)
    tuned = tuning.tune(
        base,
        spec.tuning,
        spec.base_model.uri,
        spec.training.seed,
        sizing.gradient_checkpointing,
        masters=sizing.strategy == "DDP",
        earlier=start.adapter,
        task=task,
    )
    # Whatever the model does, training, measuring or writing, begins here.
    tuned.get_input_embeddings().register_forward_pre_hook(lambda *_: heartbeat.beat())
    initial = tuning.initial_of(tuned, spec.tuning)

    checkpoints = Checkpoints(store, config.scratch_uri, work, config.spec_sha256, ranks, spec.checkpoint.keep)
    checkpoints.on_uploaded = reporter.checkpoint
    checkpoints.on_trouble = lambda message: reporter.warn("checkpoint", message)
    checkpoints.leans_on = lambda saved: best_step(spec, saved.history)
    resumed = checkpoints.newest()
    names = [dataset.name for dataset in spec.datasets]
    end.journal = journal = Journal(resumed.saved if resumed else None, data.plan, names)
    batches = micro_batches(data, config, ranks, sizing.micro_batch_size, flat=attention == "flash_attention_2")
    rewards = load_rewards(run, store, ranks) if spec.method.rollout else None
    trainer = make_trainer(spec.method, tuned, args, batches, rewards)
    if keeps_reference(run.stages, run.number):
        trainer.reference = FirstValues()
    evaluator = Evaluator(config, work, start.model, data, ranks, store)
    course = Course(
        trainer,
        config,
        data,
        ranks,
        signals,
        reporter,
        checkpoints,
        journal,
        resumed,
        measure_before=lambda: evaluator.before(trainer),
        publish_sound=lambda folder, step: publish_sound(
            run,
            store,
            Trained(tuned, trainer.published(state.parameters_of(folder)), initial, dtype, task, classes),
            step,
        ),
    )
    course.run()

    reporter.phase("Evaluating")
    metrics = journal.before | journal.after() | evaluator.after(trainer)
    metrics |= retained(run, trainer, data, ranks)
    reporter.progress(journal.step, data.plan.total_steps, metrics, 0)
    reporter.phase("Saving")
    parameters = trainer.published(state.on_cpu(trainer))
    distributed.stop(ranks)
    if ranks.is_main:
        kind = save_output(run, Trained(tuned, parameters, initial, dtype, task, classes))
        # A stage's checkpoints may go once its result is there, and not before the last of them is.
        checkpoints.wait()
        checkpoints.close()
        if run.is_last:
            evidence = Evidence(classes, trainer.confusion, evaluator.samples)
            end.publish(run, publish_output(run, store, journal, metrics, reporter, kind, evidence))
            clean_up(store, run.job)
        else:
            publish_stage(run, store, journal, metrics)
            checkpoints.remove()


def published_before(run: StageRun, store: Store) -> dict[str, Any] | None:
    """Rank 0: the job's result, where an earlier attempt published it and its last word was lost. Raises Superseded."""
    fence = Fence.of(store, run.job)
    result = fence.enter() if fence else None
    return result.to_json() if result else None


def sizing_of(config: RunConfig) -> Sizing:
    if config.sizing is None or config.prepared is None:
        raise FineTuneError(Reason.INVALID_SPEC, "run.json: `sizing` and `prepared` are required for training")
    return config.sizing


def make_arguments(config: RunConfig, work: WorkDir, plan: Plan, dtype: torch.dtype) -> TrainingArguments:
    sizing, training = sizing_of(config), config.spec.training
    name = next(name for name, known in model.DTYPES.items() if known == dtype)
    kind = config.devices.kind
    return TrainingArguments(
        **arguments.training_arguments(
            training,
            sizing,
            output=work.output,
            total_steps=plan.total_steps,
            dtype=name,
            device=kind,
            deepspeed=arguments.deepspeed_config(sizing, training, name, kind),
        )
    )


class End:
    """What is known when the program ends, however it ends."""

    journal: Journal | None = None
    result: TrainingResult | None = None

    def publish(self, run: StageRun, result: TrainingResult) -> None:
        """What there is, and whether it is good enough. Raises GateNotMet."""
        self.result = result
        check(run.job.spec.evaluation, result.metrics, [stage.name for stage in run.stages if stage.name])

    def message(self, rank: int, error: BaseException | None) -> TerminationMessage:
        # Where a gate is not met there is a result, too.
        said = (failure_of(explained(error)) if error else TerminationMessage()).model_copy(
            update={"result": self.result}
        )
        known = (
            {"step": self.journal.step, "resumed_from_step": self.journal.first_step or None} if self.journal else {}
        )
        return said.model_copy(update=known | {"rank": rank if error else None})


def explained(error: BaseException) -> BaseException:
    if isinstance(error, torch.OutOfMemoryError):
        return FineTuneError(
            Reason.OUT_OF_MEMORY,
            f"the GPU's memory is exhausted; a smaller training.microBatchSize or maxLength would need less "
            f"({str(error).splitlines()[0]})",
        )
    if isinstance(error, MemoryError):
        return FineTuneError(Reason.HOST_OUT_OF_MEMORY, "the pod's memory is exhausted")
    return error


def quiet_libraries() -> None:
    """Our own lines say what happens; the libraries' deprecations are for us to read when a version changes."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("accelerate", "peft", "DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate|deepspeed)(\.|$)")


def main() -> int:
    work, rank, end = WorkDir.from_env(), int(os.environ["RANK"]), End()
    number = int(os.environ.get("FINETUNE_STAGE", "0"))
    heartbeat.start(work.heartbeat(f"rank-{rank}"))
    quiet_libraries()
    # Our own reports say more; both would be posted.
    os.environ["DISABLE_KUBEFLOW_INTEGRATION"] = "TRUE"
    reporter = Reporter.from_env(enabled=rank == 0)
    try:
        run, signals = StageRun(read_config(), number, work.root), Signals()
        if run.stage.generate:
            generate(run, signals, reporter)
        else:
            train(run, signals, reporter, end)
    except Exception as error:
        if not isinstance(error, FineTuneError):
            log.stack(error)
        write_outcome(work.outcome(rank), message := end.message(rank, error))
        log.event("rank ended", level="error", reason=message.reason, message=message.message, step=message.step)
        reporter.close()
        return message.exit_code
    write_outcome(work.outcome(rank), end.message(rank, None))
    reporter.close()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is said. After a failure the peers may be gone, and an orderly end could wait for them for ever; after
    # success it would only give back, piece by piece, what the kernel takes at once.
    os._exit(code)
