"""The figures of the run, over all its attempts: what is saved with each checkpoint and told at the end."""

import time
from collections.abc import Mapping, Sequence

from finetune_trainer import mix
from finetune_trainer.batches import Plan
from finetune_trainer.curves import key_of
from finetune_trainer.mix import Mix
from finetune_trainer.state import SavedState


class Journal:
    def __init__(self, saved: SavedState | None, plan: Plan, datasets: Sequence[str]) -> None:
        """`datasets`: their names, in the order of the plan."""
        self.history: list[dict[str, float]] = [dict(entry) for entry in saved.history] if saved else []
        self.before: dict[str, float] = dict(saved.before) if saved else {}
        self.mix = Mix(plan, datasets, saved.seen if saved else None)
        self._planned = mix.planned(plan, datasets)
        self.first_step = self.step = saved.step if saved else 0
        self.sound: int | None = saved.sound if saved else None
        """The newest step with a checkpoint that was saved while nothing was suspicious."""
        self.best_step: int | None = None
        """The step whose weights are published, where it was chosen."""
        self._seconds = saved.seconds if saved else 0.0
        self._started = self._logged = time.monotonic()
        self._tokens_logged = self.tokens

    def start(self) -> None:
        self._started = self._logged = time.monotonic()

    @property
    def tokens(self) -> int:
        """Learned, padding excluded."""
        return self.mix.tokens

    @property
    def seconds(self) -> float:
        return self._seconds + time.monotonic() - self._started

    @property
    def published_step(self) -> int:
        return self.step if self.best_step is None else self.best_step

    def learned(self, step: int) -> None:
        """`step` optimizer steps are done, one more than before."""
        self.mix.add(step - 1)
        self.step = step

    def logged(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The entry of this step, which is now the newest of the history."""
        counts = mix.figures_of(self.mix.seen, "rows", "tokens")
        entry = {"step": float(self.step), **figures, "tokens_per_second": self._tokens_per_second(), **counts}
        self.history.append(entry)
        return entry

    def evaluated(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Adds figures on the validation data to this step's entry; those of single datasets are told at the end."""
        found = {key_of(name): value for name, value in figures.items() if "." not in name}
        self.history[-1] |= found
        return found

    def is_evaluated(self) -> bool:
        """Whether this step is."""
        newest = self.history[-1] if self.history else {}
        return newest.get("step") == self.step and any(name.startswith("eval_") for name in newest)

    def saved(self, adam_steps: int, loss_scale: dict[str, float]) -> SavedState:
        return SavedState(
            step=self.step,
            optimizer_step=adam_steps,
            tokens=self.tokens,
            seconds=self.seconds,
            before=self.before,
            history=self.history,
            loss_scale=loss_scale,
            seen=self.mix.seen,
            sound=self.sound,
        )

    def after(self) -> dict[str, float]:
        """Figures of the training itself, for the result."""
        loss = {"trainLoss": self.history[-1]["loss"]} if self.history else {}
        counts = mix.figures_of(self.mix.seen, "trainRows", "trainTokens")
        whole = {
            "trainSeconds": round(self.seconds, 3),
            "trainTokens": float(self.tokens),
            "tokensPerSecond": round(self.tokens / max(1e-9, self.seconds), 1),
        }
        best = {"bestStep": float(self.best_step)} if self.best_step is not None else {}
        return loss | whole | counts | self._planned | best

    def remaining_seconds(self, total_steps: int) -> float | None:
        """By this attempt's own steps."""
        done = self.step - self.first_step
        return (time.monotonic() - self._started) / done * (total_steps - self.step) if done else None

    def _tokens_per_second(self) -> float:
        """Since the last entry."""
        now = time.monotonic()
        rate = (self.tokens - self._tokens_logged) / max(1e-9, now - self._logged)
        self._logged, self._tokens_logged = now, self.tokens
        return rate
