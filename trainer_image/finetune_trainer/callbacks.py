"""What happens at each step besides learning: random numbers, agreement of the ranks, logs and figures."""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_api.failures import FineTuneError, Reason
from finetune_trainer import heartbeat, log
from finetune_trainer.batches import Plan
from finetune_trainer.control import Control
from finetune_trainer.distributed import Ranks
from finetune_trainer.journal import Journal
from finetune_trainer.report import Reporter
from finetune_trainer.stragglers import WINDOW, Clock, Stragglers

FIGURES = (
    "loss",
    "learning_rate",
    "grad_norm",
    "reward_margin",
    "preference_accuracy",
    "reward",
    "kl",
    "answer_tokens",
)
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


class Seeds(TrainerCallback):  # type: ignore[misc]
    """The random numbers of a step (dropout) depend on (seed, step, rank) alone: a resumed run draws the same."""

    def __init__(self, seed: int, rank: int) -> None:
        self._seed, self._rank = seed, rank

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        words = np.random.SeedSequence((self._seed, state.global_step, self._rank)).generate_state(1)
        torch.manual_seed(int(words[0]))


class Steering(TrainerCallback):  # type: ignore[misc]
    """At the end of each step all ranks agree whether to save and whether to stop: one signalled pod is enough."""

    def __init__(
        self,
        ranks: Ranks,
        signals: Signals,
        due: Callable[[int], bool],
        evaluates: Callable[[int], bool],
        ready: Callable[[], None],
    ) -> None:
        """`due`: does rank 0 want a checkpoint after this step; `ready`: called once the model is wrapped."""
        self._ranks, self._signals, self._due, self._ready = ranks, signals, due, ready
        self._evaluates = evaluates
        self.stopped = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._ready()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        heartbeat.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        due = self._ranks.is_main and not last and self._due(state.global_step)
        stop, save = self._ranks.any([self._signals.received, due])
        heartbeat.step(state.global_step)
        if stop and not last:
            self.stopped = control.should_training_stop = True
        # Who is asked to end saves at once; what is due then is evaluated when the run is resumed.
        evaluate = not self.stopped and self._evaluates(state.global_step)
        if save or last or self.stopped or evaluate:
            # What was learned since the last line is logged first, so that the checkpoint's history is whole.
            control.should_log = True
        control.should_evaluate = evaluate
        control.should_save = save or last or self.stopped


class Slowness(TrainerCallback):  # type: ignore[misc]
    """Tells of ranks that are steadily slower than the others: to the log and the status. Collective."""

    def __init__(self, clock: Clock, ranks: Ranks, reporter: Reporter) -> None:
        self._clock, self._ranks, self._reporter = clock, ranks, reporter
        self._stragglers = Stragglers()
        self._told: set[int] = set()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._ranks.world_size == 1 or state.global_step % WINDOW:
            return
        self._stragglers.window(self._ranks.each(self._clock.take()))
        factors = self._stragglers.factors
        node = os.environ.get("FINETUNE_NODE_NAME", "unknown")
        said = [
            f"rank {rank} on node {self._ranks.from_rank(rank, node)} is steadily slow: its forward passes take "
            f"{factor:.1f} times as long as the others'"
            for rank, factor in sorted(factors.items())
        ]
        if self._ranks.is_main and factors.keys() - self._told:
            log.event("slow rank", level="warning", step=state.global_step, message="; ".join(said))
        self._told = set(factors)
        self._reporter.warn("slow rank", "; ".join(said))


class Progress(TrainerCallback):  # type: ignore[misc]
    """The figures of each logged step: to the log, the history and the progress server. Raises Diverged."""

    def __init__(self, journal: Journal, control: Control, plan: Plan, reporter: Reporter, ranks: Ranks) -> None:
        self._journal, self._control, self._plan = journal, control, plan
        self._reporter, self._ranks = reporter, ranks

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._journal.learned(state.global_step)

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
        entry = self._journal.logged({name: float(logs[name]) for name in FIGURES if name in logs})
        if self._ranks.is_main:
            self._show(entry, state)
        self._control.check(logs)

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
        shown = {name: entry[name] for name in (*FIGURES, "tokens_per_second") if name in entry}
        self._reporter.progress(state.global_step, state.max_steps, self._journal.before | shown, remaining)
