"""What happens at each step besides learning: random numbers, agreement of the ranks, logs and figures."""

import math
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_api.failures import FineTuneError, Reason
from finetune_trainer import log
from finetune_trainer.batches import Plan
from finetune_trainer.distributed import Ranks
from finetune_trainer.report import Reporter
from finetune_trainer.state import SavedState

FIGURES = ("loss", "learning_rate", "grad_norm", "reward_margin", "preference_accuracy")
"""What the Trainer logs at a step that is kept and reported."""


class Signals:
    """SIGTERM and SIGINT end the program at once or, while `deferred`, at the end of the step."""

    def __init__(self) -> None:
        self.received = self.deferred = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if not self.deferred:
            raise FineTuneError(Reason.PREEMPTED, "the pod was asked to end; nothing was being trained")


class Journal:
    """The figures of the run, over all its attempts."""

    def __init__(self, saved: SavedState | None) -> None:
        self.history: list[dict[str, float]] = list(saved.history) if saved else []
        self.before: dict[str, float] = dict(saved.before) if saved else {}
        self.tokens = saved.tokens if saved else 0
        self.first_step = self.step = saved.step if saved else 0
        self._seconds = saved.seconds if saved else 0.0
        self._started = self._logged = time.monotonic()
        self._tokens_logged = self.tokens

    def start(self) -> None:
        self._started = self._logged = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._seconds + time.monotonic() - self._started

    def tokens_per_second(self) -> float:
        """Since it was asked last."""
        now = time.monotonic()
        rate = (self.tokens - self._tokens_logged) / max(1e-9, now - self._logged)
        self._logged, self._tokens_logged = now, self.tokens
        return rate

    def saved(self, adam_steps: int, loss_scale: dict[str, float]) -> SavedState:
        return SavedState(
            step=self.step,
            optimizer_step=adam_steps,
            tokens=self.tokens,
            seconds=self.seconds,
            before=self.before,
            history=self.history,
            loss_scale=loss_scale,
        )

    def after(self) -> dict[str, float]:
        """Figures of the training itself, for the result."""
        loss = {"trainLoss": self.history[-1]["loss"]} if self.history else {}
        return loss | {
            "trainSeconds": round(self.seconds, 3),
            "trainTokens": float(self.tokens),
            "tokensPerSecond": round(self.tokens / max(1e-9, self.seconds), 1),
        }

    def remaining_seconds(self, total_steps: int) -> float | None:
        """By this attempt's own steps."""
        done = self.step - self.first_step
        return (time.monotonic() - self._started) / done * (total_steps - self.step) if done else None


class Seeds(TrainerCallback):  # type: ignore[misc]
    """The random numbers of a step (dropout) depend on (seed, step, rank) alone: a resumed run draws the same."""

    def __init__(self, seed: int, rank: int) -> None:
        self._seed, self._rank = seed, rank

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        words = np.random.SeedSequence((self._seed, state.global_step, self._rank)).generate_state(1)
        torch.manual_seed(int(words[0]))


class Steering(TrainerCallback):  # type: ignore[misc]
    """At the end of each step all ranks agree whether to save and whether to stop: one signalled pod is enough."""

    def __init__(self, ranks: Ranks, signals: Signals, due: Callable[[int], bool], ready: Callable[[], None]) -> None:
        """`due`: does rank 0 want a checkpoint after this step; `ready`: called once the model is wrapped."""
        self._ranks, self._signals, self._due, self._ready = ranks, signals, due, ready
        self.stopped = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._ready()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        due = self._ranks.is_main and not last and self._due(state.global_step)
        stop, save = self._ranks.any([self._signals.received, due])
        if stop and not last:
            self.stopped = control.should_training_stop = True
        if save or last or self.stopped:
            # What was learned since the last line is logged first, so that the checkpoint's history is whole.
            control.should_log = control.should_save = True


class Progress(TrainerCallback):  # type: ignore[misc]
    """The figures of each logged step: to the log, the history and the progress server. Raises Diverged."""

    def __init__(self, journal: Journal, plan: Plan, reporter: Reporter, ranks: Ranks) -> None:
        self._journal, self._plan, self._reporter, self._ranks = journal, plan, reporter, ranks

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._journal.step = state.global_step
        self._journal.tokens += int(self._plan.rows.lengths[self._plan.step(state.global_step - 1)].sum())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise FineTuneError(
                Reason.DIVERGED,
                f"the training loss is not a number at step {state.global_step} of {state.max_steps}; a lower "
                f"training.learningRate (now {args.learning_rate:g}) or a longer warm-up may help",
            )
        entry = {"step": float(state.global_step)}
        entry |= {name: float(logs[name]) for name in FIGURES if name in logs}
        entry["tokens_per_second"] = self._journal.tokens_per_second()
        self._journal.history.append(entry)
        if self._ranks.is_main:
            self._show(entry, state)

    def _show(self, entry: dict[str, float], state: TrainerState) -> None:
        remaining = self._journal.remaining_seconds(state.max_steps)
        further: dict[str, Any] = {name: round(entry[name], 4) for name in FIGURES[3:] if name in entry}
        log.event(
            "step",
            step=state.global_step,
            of=state.max_steps,
            epoch=round(self._plan.epoch_at(state.global_step), 2),
            loss=round(entry["loss"], 4),
            lr=float(f"{entry.get('learning_rate', 0):.3g}"),
            grad_norm=round(entry.get("grad_norm", 0.0), 3),
            tokens_per_second=round(entry["tokens_per_second"]),
            remaining_seconds=None if remaining is None else round(remaining),
            **further,
        )
        metrics = self._journal.before | {name: value for name, value in entry.items() if name != "step"}
        self._reporter.progress(state.global_step, state.max_steps, metrics, remaining)
