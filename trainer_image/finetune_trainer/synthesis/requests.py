"""PURE: what the model is asked to continue, and what of its continuation is a row."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TASK, ANSWER = "### Task {}:", "### Answer {}:"
PREAMBLE = "Each task below is followed by its answer. No two tasks are alike.\n\n"
ASKED = (
    "Below are {shots} tasks, each followed by its answer. Write one more of the same kind, unlike those shown, and "
    "its answer, in the same form.\n\n"
)
"""What a model with a chat template is asked; it answers with the task that comes next."""


class Pair(NamedTuple):
    instruction: str
    answer: str


class Request(NamedTuple):
    number: int
    seeds: list[int]
    """Places of the rows that it shows."""
    text: str
    """What the model continues; without the words of a chat template."""


def request(pool: Sequence[Pair], number: int, shots: int, seed: int) -> Request:
    """The request of a number shows the same rows on every rank and in every attempt. `pool` is not empty."""
    rng = np.random.default_rng((seed, number, 4))
    chosen = rng.choice(len(pool), size=min(shots, len(pool)), replace=False)
    seeds = [int(place) for place in chosen]
    parts = [
        f"{TASK.format(n)}\n{pool[place].instruction}\n\n{ANSWER.format(n)}\n{pool[place].answer}\n\n"
        for n, place in enumerate(seeds, 1)
    ]
    return Request(number, seeds, "".join(parts))


def opening(asked: Request) -> str:
    """The words with which the next task begins; the model goes on from here."""
    return f"{TASK.format(len(asked.seeds) + 1)}\n"


def parse(asked: Request, continuation: str) -> Pair | None:
    """The task and the answer that the model wrote after `opening`; None where either is missing."""
    number = len(asked.seeds) + 1
    instruction, found, rest = continuation.partition(ANSWER.format(number))
    answer = rest.partition(TASK.format(number + 1))[0]
    pair = Pair(instruction.strip(), answer.strip())
    # A task that holds another's heading is one that never came to its answer.
    return pair if found and all(pair) and "### Task" not in pair.instruction else None
