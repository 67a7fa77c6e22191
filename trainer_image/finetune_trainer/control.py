"""What follows from the figures of a run: when is evaluated, which step is the best, when it ends before its last step.

All of it is a function of the history, which is saved with every checkpoint: a resumed run decides as one that nothing
interrupted, and every rank decides the same.
"""

import math
from collections.abc import Mapping

from finetune_api.failures import FineTuneError, Reason
from finetune_api.formats import kind_of
from finetune_api.job import FineTuneJobSpec
from finetune_api.watched import watched
from finetune_trainer.arguments import warmup_steps
from finetune_trainer.curves import Best, History, best_of, diverged, evaluates_at, overfitting, stops, suspicious
from finetune_trainer.journal import Journal

SIGNED = ("PPO", "GRPO")
"""Methods whose loss may be negative: how large it is says nothing."""


def best_of_run(spec: FineTuneJobSpec, history: History) -> Best | None:
    """The best evaluation so far; None where nobody stops early. Raises InvalidSpec for a metric that is unknown."""
    stopping = spec.training.early_stopping
    if stopping is None or spec.validation is None:
        return None
    found = watched(stopping.metric, spec.method.type, kind_of(spec.method.type, spec.datasets))
    if found is None:
        text = f"spec.training.earlyStopping.metric: found {stopping.metric}; {spec.method.type} does not measure it"
        raise FineTuneError(Reason.INVALID_SPEC, text)
    return best_of(history, found, stopping.min_delta)


def best_step(spec: FineTuneJobSpec, history: History) -> int | None:
    best = best_of_run(spec, history)
    return best.step if best else None


class Control:
    def __init__(self, spec: FineTuneJobSpec, journal: Journal, total_steps: int, scaled: bool, held_out: bool) -> None:
        """`scaled`: gradients in float16, of which some overflow by design; `held_out`: there are validation data."""
        self._spec, self._journal, self._total = spec, journal, total_steps
        self._scaled, self._held_out = scaled, held_out
        self._bounded = spec.method.type not in SIGNED
        self._stopping = spec.training.early_stopping if held_out else None

    def evaluates(self, step: int) -> bool:
        """Whether the validation data are evaluated after this step."""
        every = self._spec.evaluation.every_steps
        return self._held_out and evaluates_at(step, self._total, every, self._stopping is not None)

    @property
    def best(self) -> Best | None:
        return best_of_run(self._spec, self._journal.history)

    @property
    def stops(self) -> bool:
        """Whether it is time to stop early."""
        return self._stopping is not None and stops(self.best, self._stopping)

    @property
    def stopped_early(self) -> bool:
        return self.stops and self._journal.step < self._total

    @property
    def warning(self) -> str:
        return overfitting(self._journal.history)

    @property
    def is_sound(self) -> bool:
        """Whether the loss is where one expects it: else a checkpoint must not take the place of a good one."""
        return not (self._bounded and suspicious(self._journal.history))

    def check(self, figures: Mapping[str, float]) -> None:
        """What the newest step was logged with. Raises Diverged."""
        for name, words in (("loss", "the training loss"), ("grad_norm", "the norm of the gradients")):
            overflows = self._scaled and name == "grad_norm"
            if not overflows and not math.isfinite(figures.get(name, 0.0)):
                raise self._diverged(f"{words} is not a number")
        history, warmup = self._journal.history, warmup_steps(self._spec.training, self._total)
        if self._bounded and diverged(history, warmup):
            usual = history[-1 - suspicious(history)]["loss"]
            raise self._diverged(f"the training loss has risen from {usual:.4g} to {history[-1]['loss']:.4g} and stays")

    def _diverged(self, what: str) -> FineTuneError:
        return FineTuneError(
            Reason.DIVERGED,
            f"{what} at step {self._journal.step} of {self._total}; a lower training.learningRate (now "
            f"{self._spec.training.learning_rate:g}) or a longer warm-up may help",
        )
