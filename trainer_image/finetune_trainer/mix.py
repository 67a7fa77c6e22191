"""The mix of datasets: what each is to give (the weights of a Plan), and what of each was learned so far."""

from collections.abc import Mapping, Sequence

import numpy as np

from finetune_api.job import FineTuneJobSpec
from finetune_trainer.batches import Ints, Plan, Rows, by_temperature

Seen = Mapping[str, tuple[int, int]]
"""By dataset: rows (packed: packed rows) and tokens, each as often as it was learned."""


def sizes_of(rows: Rows, datasets: int) -> list[int]:
    """Rows of each dataset."""
    return [int(count) for count in np.bincount(rows.dataset, minlength=datasets)]


def weights_of(spec: FineTuneJobSpec, rows: Rows) -> list[float | None]:
    """For `batches.shares`, in the order of spec.datasets."""
    if spec.mixing and spec.mixing.temperature:
        return by_temperature(sizes_of(rows, len(spec.datasets)), spec.mixing.temperature)
    return [dataset.weight for dataset in spec.datasets]


class Mix:
    """Counts step by step: a pure function of the plan and the steps that were added."""

    def __init__(self, plan: Plan, names: Sequence[str], seen: Seen | None = None) -> None:
        """`seen`: what an earlier attempt had counted."""
        self._plan, self._names = plan, names
        known = [(seen or {}).get(name, (0, 0)) for name in names]
        self._rows, self._tokens = (np.array(counts, dtype=np.int64) for counts in zip(*known, strict=True))

    def add(self, step: int) -> None:
        """Step `step` of the plan was learned."""
        ids: Ints = self._plan.step(step)
        datasets, lengths = self._plan.rows.dataset[ids], self._plan.rows.lengths[ids]
        self._rows += np.bincount(datasets, minlength=len(self._names))
        self._tokens += np.bincount(datasets, weights=lengths, minlength=len(self._names)).astype(np.int64)

    @property
    def tokens(self) -> int:
        return int(self._tokens.sum())

    @property
    def seen(self) -> dict[str, tuple[int, int]]:
        return {
            name: (int(rows), int(tokens))
            for name, rows, tokens in zip(self._names, self._rows, self._tokens, strict=True)
        }


def figures_of(seen: Seen, rows: str, tokens: str) -> dict[str, float]:
    """`<rows>.<dataset>` and `<tokens>.<dataset>`; nothing of a single dataset, which is the whole."""
    if len(seen) < 2:
        return {}
    counted = {f"{rows}.{name}": float(counts[0]) for name, counts in seen.items()}
    return counted | {f"{tokens}.{name}": float(counts[1]) for name, counts in seen.items()}


def planned(plan: Plan, names: Sequence[str]) -> dict[str, float]:
    """`plannedShare.<dataset>` of the rows; nothing of a single dataset."""
    if len(names) < 2:
        return {}
    return {f"plannedShare.{name}": round(share, 6) for name, share in zip(names, plan.planned, strict=True)}
