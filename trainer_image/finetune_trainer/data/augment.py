"""What is put before a question: the passages that a retriever found for it, and examples of how to answer."""

import collections
import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_api.dataset import Dataset, Retrieval
from finetune_trainer.data.formats import BadRow, Chat, Example, Pair, column_of, turns_of, value_of

POOL = 256
"""Examples of a data set that few-shot prompts are drawn from."""
SCAN = 5000
"""Rows, from the first on, among which those are chosen."""
Row = Mapping[str, Any]
_QUESTIONS = {"Instruction": "instruction", "Messages": "messages"}
_ANSWERS = {"Instruction": "output", "Messages": "messages"}


class Passages:
    """The `context` column of one data set."""

    def __init__(self, dataset: Dataset, seed: int, templated: bool) -> None:
        """`templated`: the data set's own template places the passages."""
        self._columns = dataset.columns
        self._column = dataset.columns.context if dataset.columns else None
        self._retrieval, self._seed, self._templated = dataset.retrieval or Retrieval(), seed, templated
        self._others: collections.deque[Any] = collections.deque(maxlen=4)

    @property
    def column(self) -> str | None:
        return self._column

    def placed(self, row: Row, form: str) -> Row:
        """The row with its passages in front of its question. Raises BadRow."""
        if self._column is None or self._templated:
            return row
        text = "\n\n".join(f"[{number}] {passage}" for number, passage in enumerate(self._texts(row), 1))
        # Without the column, which could be taken for an instruction's input.
        rest = {name: value for name, value in row.items() if name != self._column}
        return _edited(rest, form, _QUESTIONS.get(form, "prompt"), self._columns, "user", text, before=True)

    def altered(self, row: Row, form: str, digest: bytes) -> Row | None:
        """A training row without its passages, or with another row's, and with the answer that none is there.

        None where it stays as it is. The row's content decides, with the job's seed.
        """
        if self._column is None or not (self._retrieval.drop_ratio or self._retrieval.swap_ratio):
            return None
        own = row.get(self._column)
        other = next((value for value in reversed(self._others) if value != own), None)
        self._others.append(own)
        place = (
            int.from_bytes(hashlib.blake2b(digest + str(self._seed).encode(), digest_size=7).digest(), "big") / 2**56
        )
        if place >= self._retrieval.drop_ratio + self._retrieval.swap_ratio:
            return None
        swapped = place >= self._retrieval.drop_ratio and other is not None
        empty: Any = "" if isinstance(own, str) else []
        changed = {**row, self._column: other if swapped else empty}
        role = _ANSWERS.get(form, "completion")
        return _edited(changed, form, role, self._columns, "assistant", self._retrieval.absent_answer, before=False)

    def _texts(self, row: Row) -> list[str]:
        value = value_of(row, "context", self._columns)
        found = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(found, list):
            raise BadRow(f"`{self._column}` must be a passage or a list of passages; found {type(value).__name__}")
        return [text for text in (_passage(item, str(self._column)) for item in found) if text]


def _passage(item: Any, name: str) -> str:
    if isinstance(item, dict):
        title, item = item.get("title"), item.get("text")
        item = f"{title}\n{item}" if title and isinstance(item, str) else item
    if not isinstance(item, str):
        raise BadRow(f"`{name}` must hold passages as text, or as objects with text and, if any, title")
    return item.strip()


def _edited(row: dict[str, Any], form: str, role: str, columns: Any, who: str, text: str, before: bool) -> Row:
    """The row with `text` before its question, or in place of its answer: a column's text, or the last such turn's."""
    if not text:
        return row
    name, value = column_of(role, columns, row), value_of(row, role, columns)
    if form != "Messages" and isinstance(value, str):
        return {**row, str(name): f"{text}\n\n{value}" if before else text}
    turns = turns_of(row, role, columns)
    last = next((i for i in range(len(turns) - 1, -1, -1) if turns[i]["role"] == who), None)
    if last is None:
        raise BadRow(f"`{name}` has no turn of the {who}")
    content = f"{text}\n\n{turns[last]['content']}" if before else text
    return {**row, str(name): [*turns[:last], {**turns[last], "content": content}, *turns[last + 1 :]]}


class Shots:
    """Few-shot prompts: examples drawn from a data set's own training rows."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self._seed = count, seed
        self._pool: list[tuple[bytes, Example]] = []
        self._offered = 0
        self._random = random.Random(seed)

    def offer(self, digest: bytes, example: Example) -> None:
        """A training row that may be drawn; of many, POOL are kept, each with the same chance."""
        self._offered += 1
        if len(self._pool) < POOL:
            self._pool.append((digest, example))
        elif (place := self._random.randrange(self._offered)) < POOL:
            self._pool[place] = (digest, example)

    def __len__(self) -> int:
        return len(self._pool)

    def before(self, example: Example, digest: bytes) -> Example:
        """The example after `count` others, never itself. Raises BadRow where there are too few."""
        if not self.count:
            return example
        others = [other for known, other in self._pool if known != digest]
        if len(others) < self.count:
            raise BadRow(f"{self.count} shots are wanted; {len(others)} other training rows can be drawn")
        return _after(random.Random(f"{self._seed}/{digest.hex()}").sample(others, self.count), example)


def _after(shots: Sequence[Example], example: Example) -> Example:
    if isinstance(example, Chat):
        asked = [dict(turn) for shot in shots if isinstance(shot, Chat) for turn in shot.messages]
        own = list(example.messages)
        start = sum(turn["role"] == "system" for turn in own)
        # One system prompt: the row's own.
        said = [turn for turn in asked if turn["role"] != "system"]
        return Chat((*own[:start], *said, *own[start:]), example.tools)
    if isinstance(example, Pair):
        told = "".join(f"{shot.prompt}{shot.completion}\n\n" for shot in shots if isinstance(shot, Pair))
        return Pair(told + example.prompt, example.completion)
    return example
