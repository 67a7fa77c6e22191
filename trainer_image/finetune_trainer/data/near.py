"""Texts that are nearly the same: MinHash over runs of five words, found again through bands of the signature.

Two texts are compared by the share of runs that both have (Jaccard). 128 hashes estimate it to about 0.03. What is
remembered of a text has 200 bytes, and at most `CAPACITY` texts are: of more, the oldest are forgotten.
"""

import re
import zlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CAPACITY = 2**18
SHORT = 20
"""Of fewer words, one that differs is another text: these are only ever equal."""
_RUN = 5
_LONGEST = 4096
"""Words; of a longer text its beginning is compared."""
_HASHES, _BANDS = 128, 16
_ROWS = 4
"""Bytes of a signature that make a band. At a similarity of 0.7 one of the bands agrees in 99 cases of 100."""
_REMEMBERED = 2**17
# A script without spaces has a word in every character.
_ALONE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3"
_WORDS = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
_random = np.random.default_rng(20_250_101)
_FACTORS = _random.integers(0, 2**63, (_HASHES, 1), dtype=np.uint64) * 2 + 1
_OFFSETS = _random.integers(0, 2**63, (_HASHES, 1), dtype=np.uint64)
_MIX = _random.integers(0, 2**63, _RUN, dtype=np.uint64) * 2 + 1
_SLOTS = _random.integers(0, 2**31, _BANDS, dtype=np.uint64) * 2 + 1


class _Hash(dict[str, int]):
    """CRC-32 of words: most of a text are words that were there before."""

    def __missing__(self, word: str) -> int:
        if len(self) == _REMEMBERED:
            self.clear()
        value = self[word] = zlib.crc32(word.encode(errors="replace"))
        return value


_HASH = _Hash()


class Sketch(NamedTuple):
    """What is remembered of a text."""

    signature: NDArray[np.uint8]
    """(128,): one byte of each of the smallest hashes."""
    answer: int
    """A hash of a short answer: the same long passage with another answer is another example. 0 for a long one."""


class Match(NamedTuple):
    number: int
    """Of the text as `add` gave it."""
    similarity: float


def sketch(text: str, answer: str = "") -> Sketch | None:
    """`answer`: the part of an example that is learned, beside `text`. None where both together are short."""
    words, said = _WORDS.findall(text.lower()), _WORDS.findall(answer.lower())
    if len(words) + len(said) < SHORT:
        return None
    hashes = np.fromiter(map(_HASH.__getitem__, (words + said)[:_LONGEST]), np.uint64)
    count = len(hashes) - _RUN + 1
    runs = np.zeros(count, dtype=np.uint64)
    for place, factor in enumerate(_MIX):
        runs = (runs ^ hashes[place : place + count]) * factor
    smallest = (runs * _FACTORS + _OFFSETS).min(axis=1)
    short = 0 < len(said) < SHORT
    return Sketch((smallest >> np.uint64(24)).astype(np.uint8), zlib.crc32(" ".join(said).encode()) if short else 0)


class NearTexts:
    def __init__(self, similarity: float, capacity: int = CAPACITY) -> None:
        """`similarity`: from which on texts are nearly the same, 0.7 to 1."""
        self._similarity, self.capacity = similarity, capacity
        self._count = 0
        self._signatures = np.zeros((min(1024, capacity), _HASHES), dtype=np.uint8)
        self._answers = np.zeros(len(self._signatures), dtype=np.uint32)
        self._rebuild()

    def find(self, text: Sketch) -> Match | None:
        """The most similar of the remembered texts, where it is similar enough."""
        if not self._count:
            return None
        found = np.unique(self._table[np.arange(_BANDS), self._slots(text.signature[None])[0]])
        found = found[found >= 0]
        found = found[self._answers[found] == text.answer]
        if not len(found):
            return None
        alike = (self._signatures[found] == text.signature).mean(axis=1)
        best = int(alike.argmax())
        if alike[best] < self._similarity:
            return None
        place = int(found[best])
        # The newest text at a place is the one that is remembered.
        size = len(self._signatures)
        return Match(place + (self._count - 1 - place) // size * size, float(alike[best]))

    def add(self, text: Sketch) -> int:
        """Its number: 0, 1, 2, …"""
        if self._count == len(self._signatures) < self.capacity:
            more = min(self.capacity, 2 * self._count)
            self._signatures = np.resize(self._signatures, (more, _HASHES))
            self._answers = np.resize(self._answers, more)
            self._rebuild()
        number = self._count
        place = number % len(self._signatures)
        self._signatures[place], self._answers[place] = text.signature, text.answer
        self._table[np.arange(_BANDS), self._slots(text.signature[None])[0]] = place
        self._count += 1
        return number

    def _rebuild(self) -> None:
        self._bits = max(4, int(len(self._signatures) - 1).bit_length() + 1)
        self._table = np.full((_BANDS, 2**self._bits), -1, dtype=np.int32)
        for start in range(0, self._count, 2**14):
            places = np.arange(start, min(start + 2**14, self._count))
            self._table[np.arange(_BANDS), self._slots(self._signatures[places])] = places[:, None]

    def _slots(self, signatures: NDArray[np.uint8]) -> NDArray[np.int64]:
        """(texts, bands): where each band of each signature stands in the table."""
        bands = np.ascontiguousarray(signatures[:, : _BANDS * _ROWS]).view(np.uint32).astype(np.uint64)
        mixed = (bands * _SLOTS) & np.uint64(2**32 - 1)
        return (mixed >> np.uint64(32 - self._bits)).astype(np.int64)
