"""Which rows make up which optimizer step: a pure function of (data, seed, step), the same for any number of ranks.

A *row* is what the model sees as one sequence: an example, or several packed ones. All rows of the run form one
stream: epoch after epoch, each a new permutation. Step s takes the next `global_batch` rows of it. Nothing of this is
state, so a resumed run needs the number of its first step and nothing else.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

IGNORED = -100
"""The label of a token that carries no loss."""
WINDOW = 16
"""Global batches among which rows are grouped by length: less padding, and still an almost random order."""
Ints = NDArray[np.int64]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Examples:
    """The tokenised examples of one split, end to end."""

    input_ids: NDArray[np.int32]
    """(tokens,)"""
    labels: NDArray[np.int32]
    """(tokens,), IGNORED where nothing is learned."""
    offsets: Ints
    """(examples + 1,): example i is [offsets[i], offsets[i + 1])."""
    dataset: Ints
    """(examples,): index of the dataset that it comes from."""
    learned: Ints | None = None
    """(examples,): what `trained` counts, where it is known already."""
    chunk: Ints | None = None
    """(examples,): the chunk that it lies in, where the tokens come to the disk by and by (streaming.py)."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        return cast(Ints, np.diff(self.offsets))

    def of(self, ids: Ints) -> "Examples":
        """Some of them, in this order."""
        parts = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in ids]
        tokens = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        ends = np.concatenate([[0], np.cumsum(self.lengths[ids])]).astype(np.int64)
        return Examples(self.input_ids[tokens], self.labels[tokens], ends, self.dataset[ids])

    def trained(self) -> Ints:
        """Tokens of each example that carry loss: the first one has nothing to be predicted from."""
        if self.learned is not None:
            return self.learned
        learned = np.concatenate([[0], np.cumsum(self.labels != IGNORED, dtype=np.int64)])
        first = self.labels[np.minimum(self.offsets[:-1], max(0, len(self.labels) - 1))] != IGNORED
        counted: Ints = learned[self.offsets[1:]] - learned[self.offsets[:-1]] - (first & (self.lengths > 0))
        return counted


@dataclass(frozen=True)
class Rows:
    """Examples arranged in rows: row i holds the examples members[offsets[i]:offsets[i + 1]]."""

    members: Ints
    offsets: Ints
    lengths: Ints
    """(rows,): tokens."""
    trained: Ints
    """(rows,): tokens that carry loss."""
    dataset: Ints
    chunk: Ints | None = None
    """(rows,): as `Examples.chunk`."""

    def __len__(self) -> int:
        return len(self.lengths)

    def examples(self, row: int) -> Ints:
        return self.members[self.offsets[row] : self.offsets[row + 1]]


def rows_of(examples: Examples, packing: bool, max_length: int, seed: int) -> Rows:
    """One row per example or, packed, few rows of at most `max_length` tokens; never two datasets or chunks in one."""
    lengths, trained, chunk = examples.lengths, examples.trained(), examples.chunk
    if not packing:
        members, offsets = np.arange(len(examples), dtype=np.int64), np.arange(len(examples) + 1, dtype=np.int64)
        return Rows(members, offsets, lengths, trained, examples.dataset, chunk)
    group = examples.dataset if chunk is None else chunk
    order: list[Ints] = [np.zeros(0, dtype=np.int64)]
    sizes: list[Ints] = [np.zeros(0, dtype=np.int64)]
    for number in np.unique(group):
        ids = np.flatnonzero(group == number)
        bins = pack(np.random.default_rng((seed, int(number))).permutation(ids), lengths, max_length)
        order.append(np.array([i for row in bins for i in row], dtype=np.int64))
        sizes.append(np.array([len(row) for row in bins], dtype=np.int64))
    members = np.concatenate(order)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
    starts = offsets[:-1]
    first = members[starts]
    return Rows(
        members,
        offsets,
        np.add.reduceat(lengths[members], starts) if len(starts) else members,
        np.add.reduceat(trained[members], starts) if len(starts) else members,
        examples.dataset[first],
        None if chunk is None else chunk[first],
    )


def pack(ids: Ints, lengths: Ints, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each example goes where it leaves the least room; one longer than `capacity` stays alone."""
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> rows with that room
    rooms: list[int] = []  # the keys of by_room, ascending
    for i in ids[np.argsort(-lengths[ids], kind="stable")].tolist():
        length = int(lengths[i])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room]
                rooms.pop(at)
        rows[row].append(i)
        left = room - length
        if left > 0:
            if left not in by_room:
                bisect.insort(rooms, left)
            by_room.setdefault(left, []).append(row)
    return rows


def shares(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Rows that each dataset gives to one epoch, which has as many rows as all datasets together.

    No weights: each gives itself once. Otherwise in proportion to the weights, where an absent one counts as 1.
    """
    if all(weight is None for weight in weights):
        return list(sizes)
    known = np.array([0.0 if not size else 1.0 if w is None else w for size, w in zip(sizes, weights, strict=True)])
    exact = known / known.sum() * sum(sizes)
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: sum(sizes) - int(counts.sum())]:
        counts[i] += 1
    return [int(count) for count in counts]


def by_temperature(sizes: Sequence[int], temperature: float) -> list[float | None]:
    """Weights for `shares`: size to the power of 1 / temperature, so that small datasets are seen more often."""
    return [float(size) ** (1 / temperature) for size in sizes]


class Plan:
    """The rows of every optimizer step: the same arguments give the same steps on every rank and in every attempt."""

    def __init__(
        self,
        rows: Rows,
        *,
        global_batch: int,
        weights: Sequence[float | None],
        seed: int,
        epochs: float | None,
        max_steps: int | None,
        repeats: int = 1,
    ) -> None:
        """`repeats`: optimizer steps that follow one another on the same rows."""
        self.rows, self.global_batch, self.seed, self.repeats = rows, global_batch, seed, repeats
        self._ids = [np.flatnonzero(rows.dataset == d) for d in range(len(weights))]
        self._shares = shares([len(ids) for ids in self._ids], weights)
        self.epoch_rows = len(rows)
        exact = (epochs if epochs is not None else 1.0) * self.epoch_rows / global_batch
        self.total_steps = max_steps if max_steps is not None else repeats * max(1, int(np.ceil(round(exact, 9))))
        self._batches = -(-self.total_steps // repeats)
        self._window: tuple[int, list[Ints]] = (-1, [])
        self._epochs: dict[int, Ints] = {}

    @property
    def planned(self) -> list[float]:
        """Each dataset's share of the rows."""
        return [share / self.epoch_rows for share in self._shares]

    def epoch_at(self, step: int) -> float:
        """Passes over the mix after `step` steps."""
        return step / self.repeats * self.global_batch / self.epoch_rows

    def step(self, step: int) -> Ints:
        """(global_batch,) row ids, longest first: neighbours have like lengths."""
        window, place = self.window_of(step), step // self.repeats % WINDOW
        if self._window[0] != window:
            self._window = (window, self._make_window(window))
        return self._window[1][place]

    def trained_tokens(self, step: int) -> int:
        """Tokens that carry loss in the whole global batch; what the loss is divided by."""
        return max(1, int(self.rows.trained[self.step(step)].sum()))

    def micro_steps(self, step: int, rank: int, world_size: int, micro_batch: int) -> list[Ints]:
        """The rows of one rank for each micro-step. Ranks that compute at the same time get like lengths."""
        per_micro_step = world_size * micro_batch
        ids = self.step(step)
        assert len(ids) % per_micro_step == 0
        return [
            ids[start + rank * micro_batch : start + (rank + 1) * micro_batch]
            for start in range(0, len(ids), per_micro_step)
        ]

    def window_of(self, step: int) -> int:
        """Steps of the same window take their rows from the same part of the stream."""
        return step // self.repeats // WINDOW

    def coming(self, step: int, count: int) -> Ints:
        """(at most `count`,) row ids that are trained on next, from the beginning of the window of `step` on."""
        start = self.window_of(step) * WINDOW * self.global_batch
        return self._stream(start, min(start + count, self._batches * self.global_batch))

    def _make_window(self, window: int) -> list[Ints]:
        steps = min(WINDOW, max(1, self._batches - window * WINDOW))
        start = window * WINDOW * self.global_batch
        ids = self._stream(start, start + steps * self.global_batch)
        rng = np.random.default_rng((self.seed, window, 1))
        order = np.argsort(-self.rows.lengths[ids], kind="stable")
        batches = ids[order].reshape(steps, self.global_batch)
        return list(batches[rng.permutation(steps)])

    def _stream(self, start: int, stop: int) -> Ints:
        """Rows [start, stop) of the endless stream of epochs."""
        first, last = start // self.epoch_rows, (stop - 1) // self.epoch_rows
        # The next window begins in the last of them.
        self._epochs = {epoch: self._epoch(epoch) for epoch in range(first, last + 1)}
        epochs = np.concatenate(list(self._epochs.values())) if last > first else self._epochs[first]
        return epochs[start - first * self.epoch_rows : stop - first * self.epoch_rows]

    def _epoch(self, epoch: int) -> Ints:
        """The datasets' own streams, taken from in random turns."""
        if epoch in self._epochs:
            return self._epochs[epoch]
        rng = np.random.default_rng((self.seed, epoch, 2))
        turns = rng.permutation(np.repeat(np.arange(len(self._shares)), self._shares))
        mixed = np.zeros(len(turns), dtype=np.int64)
        for dataset, share in enumerate(self._shares):
            if share:
                mixed[turns == dataset] = self._take(dataset, epoch * share, (epoch + 1) * share)
        return mixed

    def _take(self, dataset: int, start: int, stop: int) -> Ints:
        """Rows [start, stop) of one dataset's own stream: pass after pass, each row before any again."""
        size = len(self._ids[dataset])
        first, last = start // size, (stop - 1) // size
        passes = np.concatenate([self._pass(dataset, turn) for turn in range(first, last + 1)])
        return passes[start - first * size : stop - first * size]

    def _pass(self, dataset: int, turn: int) -> Ints:
        """All rows of one dataset in a new order; where there are chunks, one chunk after the other."""
        ids = self._ids[dataset]
        rng = np.random.default_rng((self.seed, dataset, turn, 3))
        shuffled: Ints = ids[rng.permutation(len(ids))]
        if self.rows.chunk is None:
            return shuffled
        chunk = self.rows.chunk[shuffled]
        return shuffled[np.argsort(rng.permutation(int(chunk.max()) + 1)[chunk], kind="stable")]


def collate(examples: Examples, rows: Sequence[Ints], packed: bool, flat: bool = False, multiple: int = 8) -> Batch:
    """Rows as tensors (batch, length), padded on the right to a multiple of `multiple`.

    There is no attention mask: under causal attention no token sees the padding to its right, and without a mask the
    fastest kernels apply. Packed rows carry `position_ids` that restart with each example, which is how transformers
    keeps them apart; padding is one more example then. The first label of an example is not learned.

    `flat`: packed rows end to end as one, (1, batch * length): the only form in which flash attention keeps them apart.
    """
    longest = max(sum(int(examples.lengths[i]) for i in row) for row in rows)
    width = max(multiple, -(-longest // multiple) * multiple)
    input_ids = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            start, stop = examples.offsets[i], examples.offsets[i + 1]
            end = at + int(stop - start)
            input_ids[r, at:end] = examples.input_ids[start:stop]
            labels[r, at:end] = examples.labels[start:stop]
            labels[r, at : at + 1] = IGNORED
            positions[r, at:end] = np.arange(end - at)
            at = end
        positions[r, at:] = np.arange(width - at)
    batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
    if packed:
        batch["position_ids"] = torch.from_numpy(positions)
    return {name: tensor.reshape(1, -1) for name, tensor in batch.items()} if packed and flat else batch


class MicroBatches:
    """This rank's micro-batches from step `first_step` on: what the Trainer iterates over as its data loader."""

    def __init__(
        self, plan: Plan, examples: Examples, *, rank: int, world_size: int, micro_batch: int, packed: bool, flat: bool
    ) -> None:
        self.plan, self.examples, self.packed, self.flat = plan, examples, packed, flat
        self.rank, self.world_size, self.micro_batch = rank, world_size, micro_batch
        self.first_step = 0
        self.fetch: Callable[[int], None] = lambda step: None
        """Brings the tokens of a step to the pod's disk, where they do not all lie there."""

    def __len__(self) -> int:
        return self.plan.total_steps * (self.plan.global_batch // (self.world_size * self.micro_batch))

    def steps(self) -> Iterator[int]:
        """The steps that are still to be taken; when one comes, its tokens are there."""
        for step in range(self.first_step, self.plan.total_steps):
            self.fetch(step)
            yield step

    def __iter__(self) -> Iterator[Batch]:
        for step in self.steps():
            items = torch.tensor(self.plan.trained_tokens(step))
            for ids in self.plan.micro_steps(step, self.rank, self.world_size, self.micro_batch):
                rows = [self.plan.rows.examples(int(row)) for row in ids]
                yield collate(self.examples, rows, self.packed, self.flat) | {"num_items": items}
