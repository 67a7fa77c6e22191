"""PURE: which of the rows that a model wrote are kept: not too short or too long, unlike all others, well-liked."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from rapidfuzz.distance import Indel
from rapidfuzz.process import extractOne

from finetune_api.stage import Generate
from finetune_trainer.synthesis.requests import Pair

_WORD = re.compile(r"\w+")


class Filters:
    """Asked of one row after the other: what is kept counts as existing for the next."""

    def __init__(self, options: Generate, existing: Iterable[str]) -> None:
        """`existing`: the instructions of all rows that there are, held-out ones among them."""
        self._options = options
        self._known = [words(text) for text in existing]
        self.dropped: Counter[str] = Counter()
        """Rows left out, by cause: unreadable, length, similar, score."""

    def resume(self, kept: Iterable[str], dropped: Mapping[str, int]) -> None:
        """What was decided before: instructions that were kept, and rows left out by cause."""
        self._known += [words(text) for text in kept]
        self.dropped.update(dropped)

    def keep(self, pair: Pair | None, score: float) -> bool:
        """`score`: the mean log-probability per token that the model gave what it wrote."""
        cause = self._cause(pair, score)
        if cause:
            self.dropped[cause] += 1
        elif pair:
            self._known.append(words(pair.instruction))
        return not cause

    def _cause(self, pair: Pair | None, score: float) -> str | None:
        options = self._options
        if pair is None:
            return "unreadable"
        if not all(options.min_words <= len(words(text)) <= options.max_words for text in pair):
            return "length"
        if options.min_score is not None and score < options.min_score:
            return "score"
        return "similar" if self._is_similar(words(pair.instruction)) else None

    def _is_similar(self, found: list[str]) -> bool:
        # ROUGE-L's F-measure is 2 * longest common subsequence / (m + n), which is the normalised Indel similarity.
        nearest = extractOne(
            found, self._known, scorer=Indel.normalized_similarity, score_cutoff=self._options.max_similarity
        )
        return nearest is not None


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
