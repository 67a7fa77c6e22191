"""Which figures an example counts in: those over everything, those of its dataset, and those of its slice."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.batches import Ints

MAX_SLICES = 20
"""Of one dataset; what the rarer ones hold counts as one slice, OTHER."""
OTHER = "other"
Floats = NDArray[np.float64]
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Groups:
    """Examples by leaf: one slice of one dataset, or what of it is in no slice. Every figure is of a set of leaves."""

    leaf: Ints
    """(examples,)"""
    leaves: int
    sets: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """What is appended to a figure's name, and the leaves that it is of; without the set of all."""

    def told(self, sums: Floats, figures: Callable[[list[float]], Figures]) -> dict[str, float]:
        """Figures of everything and of every set, by name. `sums`: (leaves, n); `figures`: n sums -> figures."""
        found = dict(figures(sums.sum(0).tolist()))
        for suffix, members in self.sets:
            found |= {f"{name}{suffix}": value for name, value in figures(sums[list(members)].sum(0).tolist()).items()}
        return found

    def members(self) -> list[tuple[str, Ints]]:
        """Everything under "", then every set: what is appended to a figure's name, and the examples."""
        parts = [(suffix, np.flatnonzero(np.isin(self.leaf, members))) for suffix, members in self.sets]
        return [("", np.arange(len(self.leaf), dtype=np.int64)), *parts]


def whole(examples: int) -> Groups:
    """All examples as one group."""
    return Groups(np.zeros(examples, dtype=np.int64), 1)


def groups_of(dataset: Ints, names: Sequence[str], slices: Sequence[str | None] | None = None) -> Groups:
    """`dataset`: (examples,) places in `names`; `slices`: (examples,), None where an example is in no slice.

    Datasets are told apart where there are several; of each the MAX_SLICES most frequent slices.
    """
    known = [None] * len(dataset) if slices is None else _bounded(dataset, slices)
    keys = list(zip(dataset.tolist(), known, strict=True))
    places = {key: place for place, key in enumerate(sorted(set(keys), key=lambda key: (key[0], key[1] or "")))}
    leaf = np.array([places[key] for key in keys], dtype=np.int64)
    found = sorted(set(dataset.tolist()))
    sets: list[tuple[str, tuple[int, ...]]] = []
    if len(found) > 1:
        sets += [(f".{names[d]}", tuple(place for (e, _), place in places.items() if e == d)) for d in found]
    sets += [(f".{names[d]}.{value}", (place,)) for (d, value), place in places.items() if value is not None]
    return Groups(leaf, max(1, len(places)), tuple(sets))


def _bounded(dataset: Ints, slices: Sequence[str | None]) -> list[str | None]:
    counts = Counter((d, s) for d, s in zip(dataset.tolist(), slices, strict=True) if s is not None)
    kept: dict[Any, str] = {}
    for d in {d for d, _ in counts}:
        # The most frequent first; among equals by name, so that the order of the rows has no say.
        ranked = sorted((key for key in counts if key[0] == d), key=lambda key: (-counts[key], key[1]))
        cut = MAX_SLICES if len(ranked) <= MAX_SLICES else MAX_SLICES - 1
        kept |= {key: key[1] if place < cut else OTHER for place, key in enumerate(ranked)}
    return [None if s is None else kept[d, s] for d, s in zip(dataset.tolist(), slices, strict=True)]
