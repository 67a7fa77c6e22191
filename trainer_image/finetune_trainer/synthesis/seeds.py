"""The rows that a model writes more of: taken down while the data are prepared, read by the ranks that ask it."""

import json
from pathlib import Path
from typing import NamedTuple

from finetune_api.run import Split
from finetune_trainer.data.formats import Chat, Example
from finetune_trainer.data.formats import Pair as Plainly
from finetune_trainer.synthesis.requests import Pair

KEY = "seeds.jsonl"
LIMIT = 20_000
"""Rows that are taken down: what new ones are compared with is held in memory."""


class Seeds(NamedTuple):
    pool: list[Pair]
    """Of the training split: shown as examples."""
    held_out: list[str]
    """Instructions that nothing new may be like, and that are never shown."""


class SeedWriter:
    def __init__(self, path: Path) -> None:
        self.path, self._file, self._count = path, path.open("w", encoding="utf-8"), 0

    def add(self, split: Split, example: Example) -> None:
        pair = pair_of(example)
        if pair and self._count < LIMIT:
            self._count += 1
            self._file.write(json.dumps([split, *pair], ensure_ascii=False) + "\n")

    def close(self) -> int:
        """How many rows were taken down; the file is whole from here on."""
        self._file.close()
        return self._count


def pair_of(example: Example) -> Pair | None:
    """One question and its answer; None of a longer conversation and of plain text."""
    match example:
        case Plainly(prompt, completion):
            pair = Pair(prompt.strip(), completion.strip())
        case Chat(messages):
            turns = [turn for turn in messages if turn.get("role") != "system"]
            if [turn.get("role") for turn in turns] != ["user", "assistant"]:
                return None
            question, answer = (turn.get("content") for turn in turns)
            pair = Pair(str(question or "").strip(), str(answer or "").strip())
        case _:
            return None
    return pair if all(pair) else None


def read_seeds(data: bytes) -> Seeds:
    rows = [json.loads(line) for line in data.decode().splitlines()]
    return Seeds(
        [Pair(instruction, answer) for split, instruction, answer in rows if split == "train"],
        [instruction for split, instruction, _ in rows if split != "train"],
    )
