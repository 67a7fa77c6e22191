"""The training loop with our part of it: what precedes the first step, what follows each, how it ends."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import RunConfig
from finetune_trainer import distributed, heartbeat, log, model, state
from finetune_trainer.callbacks import Progress, Seeds, Signals, Slowness, Steering
from finetune_trainer.checkpoint import Checkpoints, Resumed
from finetune_trainer.control import Control
from finetune_trainer.distributed import Ranks
from finetune_trainer.feed import Data, packed
from finetune_trainer.journal import Journal
from finetune_trainer.pace import Pace
from finetune_trainer.report import Reporter
from finetune_trainer.stragglers import Clock


class Course:
    """One stage's way through its steps.

    `measure_before`: figures of the model as it was, by name. `publish_sound`: makes a checkpoint's folder and its step
    something that a job can start from, and says how; on rank 0.
    """

    def __init__(
        self,
        trainer: Any,
        config: RunConfig,
        data: Data,
        ranks: Ranks,
        signals: Signals,
        reporter: Reporter,
        checkpoints: Checkpoints,
        journal: Journal,
        resumed: Resumed | None,
        measure_before: Callable[[], dict[str, float]],
        publish_sound: Callable[[Path, int], str],
    ) -> None:
        self._trainer, self._config, self._data = trainer, config, data
        self._ranks, self._signals, self._reporter = ranks, signals, reporter
        self._checkpoints, self._journal, self._resumed = checkpoints, journal, resumed
        self._measure_before, self._publish_sound = measure_before, publish_sound
        total, scaled = data.plan.total_steps, bool(trainer.args.fp16)
        self._control = Control(config.spec, journal, total, scaled, "validation" in data.held)
        self._pace = Pace(config.spec.checkpoint.interval, config.devices.workers, config.attempt or 0)
        self._steering = Steering(ranks, signals, self._due, self._control.evaluates, self._ready)
        clock = Clock()
        trainer.compute_loss = clock.timed(trainer.compute_loss)
        trainer.save_state, trainer.evaluate_state = self._save, self._evaluate
        for callback in (
            Seeds(config.spec.training.seed, ranks.rank),
            Progress(journal, self._control, data.plan, reporter, ranks),
            self._steering,
            Slowness(clock, ranks, reporter),
        ):
            trainer.add_callback(callback)

    def run(self) -> None:
        """Trains; the model is then the one to be published. Collective. Raises Preempted and Diverged."""
        journal, ranks = self._journal, self._ranks
        try:
            self._trainer.train()
        except FineTuneError as error:
            raise self._with_last_sound(error) if error.reason == Reason.DIVERGED else error from None
        if self._steering.stopped:
            self._checkpoints.wait()
            text = f"the pod was asked to end after step {journal.step} of {self._data.plan.total_steps}"
            if trouble := self._checkpoints.trouble(journal.step):
                text += f"; its checkpoint could not be stored: {trouble}"
            distributed.stop(ranks)
            raise FineTuneError(Reason.PREEMPTED, text)
        best = self._control.best
        if best is None:
            return
        if ranks.is_main:
            early = "stopped early" if self._control.stopped_early else "best checkpoint"
            log.event(early, step=journal.step, best=best.step, value=round(best.value, 4))
        journal.best_step = best.step
        if best.step != journal.step:
            at = self._checkpoints.fetch(best.step)
            state.restore(self._trainer, at.directory, at.saved)

    # What the Trainer and its callbacks call

    def _ready(self) -> None:
        """Once the model is wrapped, before the first step."""
        trainer, journal = self._trainer, self._journal
        if packed(self._config):
            model.assert_packing(trainer.model_wrapped, trainer.batches.flat, self._ranks.device)
        trainer.begin()
        self._checkpoints.prepare(trainer)
        if self._resumed:
            state.restore(trainer, self._resumed.directory, self._resumed.saved)
            trainer.start_at(self._resumed.saved.step)
            self._catch_up()
        else:
            heartbeat.enter("Evaluating")
            journal.before = self._measure_before()
        self._reporter.phase("Training")
        # From here on a signal waits for the end of the step, and after the last one for the adapter.
        self._signals.deferred = True
        journal.start()
        self._pace.started(journal.step, time.monotonic())

    def _catch_up(self) -> None:
        """Whoever was asked to end saved without evaluating; and who had stopped early is not to go on."""
        if self._control.evaluates(self._journal.step) and not self._journal.is_evaluated():
            self._evaluate()
        self._reporter.warn("over-fitting", self._control.warning)
        if self._control.stops:
            self._trainer.batches.first_step = self._data.plan.total_steps

    def _due(self, step: int) -> bool:
        self._checkpoints.check()
        return not self._checkpoints.uploading and self._pace.due(step, time.monotonic())

    def _evaluate(self) -> None:
        held, journal, control = self._data.held["validation"], self._journal, self._trainer.control
        micro_batch = self._trainer.batches.micro_batch
        heartbeat.enter("Evaluating")
        measured = self._trainer.measure(held.data, self._ranks, micro_batch, held.groups)
        # Rank 0's numbers, so that no rank decides otherwise by a last bit.
        found = journal.evaluated(self._ranks.from_main(measured))
        heartbeat.enter("Training")
        total, warned = self._data.plan.total_steps, self._control.warning
        if self._ranks.is_main:
            shown: dict[str, Any] = {name: round(value, 4) for name, value in found.items()}
            log.event("evaluated", when="training", step=journal.step, **shown)
            if warned:
                log.event("over-fitting", level="warning", step=journal.step, message=warned)
            figures = journal.before | {"loss": journal.history[-1]["loss"]} | found
            self._reporter.progress(journal.step, total, figures, journal.remaining_seconds(total))
        self._reporter.warn("over-fitting", warned)
        best = self._control.best
        if best and best.step == journal.step:
            control.should_save = True
        if self._control.stops:
            control.should_training_stop = control.should_save = True

    def _save(self) -> None:
        journal, best = self._journal, self._control.best
        step, sound = journal.step, self._control.is_sound
        ends = step >= self._data.plan.total_steps or self._trainer.control.should_training_stop
        if not (sound or ends or (best and best.step == step)):
            if self._ranks.is_main:
                log.event("checkpoint put off", level="warning", step=step, why="the loss is far above what it was")
            return
        if sound:
            journal.sound = step
        heartbeat.enter("Saving")
        held = {at for at in (journal.sound, best.step if best else None) if at is not None}
        seconds = self._checkpoints.save(
            self._trainer, lambda count: journal.saved(count, state.loss_scale(self._trainer)), held
        )
        heartbeat.enter("Training")
        self._pace.saved(step, time.monotonic(), seconds)

    def _with_last_sound(self, error: FineTuneError) -> FineTuneError:
        """Collective: what diverges does so on all ranks, in the same step."""
        step, checkpoints = self._journal.sound, self._checkpoints
        kept = self._ranks.from_main(step is not None and self._ranks.is_main and checkpoints.has(step))
        if step is None or not kept:
            return FineTuneError(error.reason, f"{error}; there is no earlier checkpoint")
        said = self._ranks.from_main(self._sound(step) if self._ranks.is_main else "")
        return FineTuneError(error.reason, f"{error}; {said}")

    def _sound(self, step: int) -> str:
        """What is left of a run that diverged, in words. Where it cannot be published the checkpoint is there still."""
        kept = f"the last good checkpoint is of step {step}: {self._checkpoints.uri(step)}"
        try:
            return f"{kept}; {self._publish_sound(self._checkpoints.download(step), step)}"
        except FineTuneError as error:
            return f"{kept}; what a job could start from could not be published: {error}"
