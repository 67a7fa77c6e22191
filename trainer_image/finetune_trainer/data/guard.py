"""Special tokens in the data: what a row says is text, and never ends a turn or opens one.

A special token that stands in a row is marked inside, so that no tokeniser sees it whole, and encoded in two pieces.
Rows of format Text are left as they are: they are rendered already, and may say with them what a template would.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from finetune_trainer.data.formats import MARK, BadRow
from finetune_trainer.data.tokenise import Text


class Guarded(NamedTuple):
    row: dict[str, Any]
    found: str
    """The first special token that the row holds; empty where it holds none."""


class Guard:
    def __init__(self, tokens: Iterable[str], eos: str) -> None:
        """`tokens`: the tokeniser's special ones, in text."""
        # One character cannot be cut; the longest comes first, so that no token is found in another.
        known = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, known)) or r"(?!)")
        self._eos = eos

    def row(self, row: Mapping[str, Any]) -> Guarded:
        """The row with its special tokens marked. Raises BadRow where it has the mark itself."""
        found: list[str] = []
        value = {name: self._walk(value, found) for name, value in row.items()}
        return Guarded(value, found[0] if found else "")

    def _walk(self, value: Any, found: list[str]) -> Any:
        if isinstance(value, str):
            return self._mark(value, found)
        if isinstance(value, list):
            return [self._walk(item, found) for item in value]
        if isinstance(value, dict):
            return {name: self._walk(item, found) for name, item in value.items()}
        return value

    def _mark(self, text: str, found: list[str]) -> str:
        if MARK in text:
            raise BadRow("the text has the noncharacter U+FDD2")
        if not self._pattern.search(text):
            return text
        # Many data sets end their answers with the token that the trainer adds.
        if self._eos and (ended := text.rstrip()).endswith(self._eos):
            text = ended.removesuffix(self._eos)
        found += self._pattern.findall(text)
        return self._pattern.sub(lambda match: match[0][0] + MARK + match[0][1:], text)


def unmarked(text: Text) -> Text:
    """The text as it was, with the places where it is cut for the tokeniser."""
    if MARK not in text.text:
        return text
    marks = [match.start() for match in re.finditer(MARK, text.text)]

    def moved(place: int) -> int:
        return place - sum(mark < place for mark in marks)

    spans = [(moved(start), moved(stop)) for start, stop in text.spans]
    return Text(plain(text.text), spans, text.special, tuple(moved(mark) for mark in marks))


def plain(text: str) -> str:
    return text.replace(MARK, "")
