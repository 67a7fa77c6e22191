"""Prompts of held-out data and what answers them: the tokens up to the first that carries loss, and those that do."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune_trainer.batches import IGNORED, Examples, Ints
from finetune_trainer.shards import Pairs, Prompts, Unpaired

Tokens = NDArray[np.int32]


class Question(NamedTuple):
    place: int
    """Of the example in its split."""
    prompt: Tokens
    reference: str
    """Without white space at its ends."""


def questions_of(data: object, most: int, decode: Callable[[Sequence[int]], str]) -> list[Question]:
    """At most `most` of each dataset, in the order of the data; which ones depends on their content alone.

    Of pairs the chosen answer is the reference, of judged answers the good ones. Classes have nothing to answer, and
    neither have texts that are learned from their first token on.
    """
    match data:
        case Examples():
            examples, allowed = data, np.arange(len(data))
        case Pairs():
            examples, allowed = data.chosen, np.arange(len(data.chosen))
        case Unpaired():
            examples, allowed = data.examples, np.flatnonzero(data.desirable)
        case Prompts():
            examples = data.examples
            allowed = np.array([i for i, known in enumerate(data.references) if known is not None], dtype=np.int64)
        case _:
            return []
    found = []
    for place in _chosen(examples, allowed, most):
        span = slice(int(examples.offsets[place]), int(examples.offsets[place + 1]))
        ids, labels = np.asarray(examples.input_ids[span]), np.asarray(examples.labels[span])
        if isinstance(data, Prompts):
            found.append(Question(place, ids, (data.references[place] or "").strip()))
            continue
        start, stop = answer_of(labels)
        # What a text begins with is no question, and the mark of its beginning neither.
        if start > 1:
            found.append(Question(place, ids[:start], decode(ids[start:stop].tolist()).strip()))
    return found


def answer_of(labels: Tokens) -> tuple[int, int]:
    """[start, stop) of the first run of learned tokens; the first token is never learned. (0, 0) without any."""
    learned = np.flatnonzero(labels[1:] != IGNORED) + 1
    if not len(learned):
        return 0, 0
    gaps = np.flatnonzero(np.diff(learned) > 1)
    return int(learned[0]), int(learned[gaps[0]] if len(gaps) else learned[-1]) + 1


def last_tokens(data: object) -> set[int]:
    """The tokens that end an answer somewhere: a template may have one of its own."""
    examples = data.chosen if isinstance(data, Pairs) else data.examples if isinstance(data, Unpaired) else data
    if not isinstance(examples, Examples) or not len(examples):
        return set()
    ends = np.asarray(examples.labels)[examples.offsets[1:] - 1]
    return set(np.unique(ends[ends != IGNORED]).tolist())


def _chosen(examples: Examples, allowed: Ints, most: int) -> list[int]:
    chosen: list[int] = []
    for dataset in np.unique(examples.dataset[allowed]):
        ids = allowed[examples.dataset[allowed] == dataset].tolist()
        if len(ids) > most:
            ids = sorted(ids, key=lambda i: (_digest(examples, i), i))[:most]
        chosen += ids
    return sorted(chosen)


def _digest(examples: Examples, i: int) -> bytes:
    span = slice(int(examples.offsets[i]), int(examples.offsets[i + 1]))
    return hashlib.blake2b(np.asarray(examples.input_ids[span]).tobytes(), digest_size=8).digest()
