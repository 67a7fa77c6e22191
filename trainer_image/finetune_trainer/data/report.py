"""data-report.json: what was read, what was left out and why, and how long the examples are."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_api.run import Split
from finetune_trainer.data.shards import Encoded
from finetune_trainer.data.tokenise import Tokens

DATA_REPORT = "data-report.json"
CASES = 5
"""Places that are named for each cause."""
_EDGES = [2**power for power in range(23)]
SAMPLE = 600


@dataclass
class Lengths:
    """Statistics of the lengths of examples in tokens, in constant memory."""

    rows: int = 0
    tokens: int = 0
    trained: int = 0
    shortest: int = 0
    longest: int = 0
    counts: list[int] = field(default_factory=lambda: [0] * (len(_EDGES) + 1))
    verdicts: dict[str, int] = field(default_factory=dict)
    """Examples of each class, or of each verdict, where there are such."""

    def add(self, tokens: Tokens) -> None:
        length = len(tokens.input_ids)
        self.shortest = min(self.shortest or length, length)
        self.longest = max(self.longest, length)
        self.rows, self.tokens, self.trained = self.rows + 1, self.tokens + length, self.trained + tokens.trained
        self.counts[bisect.bisect_left(_EDGES, length)] += 1

    def to_json(self) -> dict[str, Any]:
        if not self.rows:
            return {"examples": 0}
        return {
            "examples": self.rows,
            "tokens": self.tokens,
            "trainedTokens": self.trained,
            "shortest": self.shortest,
            "longest": self.longest,
            "mean": round(self.tokens / self.rows, 1),
            "atMost": {str(edge): count for edge, count in zip(_EDGES, self.counts, strict=False) if count},
            **({"verdicts": dict(sorted(self.verdicts.items()))} if self.verdicts else {}),
        }


@dataclass
class DatasetReport:
    """What happened to the rows of one data set."""

    name: str
    format: str = ""
    rendered_by: str = ""
    """`template`, `model` (its chat template), `default` (ours) or `plain`."""
    read: int = 0
    files: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    """Objects below the prefix whose names say that they are no data."""
    splits: dict[Split, Lengths] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    warned: dict[str, int] = field(default_factory=dict)
    cases: dict[str, list[str]] = field(default_factory=dict)
    sample: str = ""
    """The beginning of the first example as the model sees it."""

    def drop(self, cause: str, where: str, why: str = "") -> None:
        self._note(self.dropped, cause, where, why)

    def warn(self, cause: str, where: str, why: str = "") -> None:
        self._note(self.warned, cause, where, why)

    def keep(self, split: Split, item: Encoded) -> None:
        lengths = self.splits.setdefault(split, Lengths())
        lengths.add(item.tokens)
        lengths.longest = max(lengths.longest, item.longest)
        verdict = item.label if item.desirable is None else "desirable" if item.desirable else "undesirable"
        if verdict is not None:
            lengths.verdicts[verdict] = lengths.verdicts.get(verdict, 0) + 1

    def _note(self, counts: dict[str, int], cause: str, where: str, why: str) -> None:
        counts[cause] = counts.get(cause, 0) + 1
        cases = self.cases.setdefault(cause, [])
        if len(cases) < CASES:
            cases.append(f"{where}: {why}" if why else where)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "format": self.format,
            "renderedBy": self.rendered_by,
            "files": self.files,
            "ignored": self.ignored,
            "rowsRead": self.read,
            "splits": {split: lengths.to_json() for split, lengths in self.splits.items()},
            "dropped": self.dropped,
            "warned": self.warned,
            "cases": self.cases,
            "sample": self.sample[:SAMPLE],
        }


def worst(reports: Sequence[DatasetReport], limit: int = 400) -> str:
    """What befell the most rows of all data sets, in at most `limit` bytes: `12 left out as invalid (s3://…); …`."""
    found = [
        (count, f"{count:,} {verb} {cause} ({report.cases[cause][0]})")
        for report in reports
        for counts, verb in ((report.dropped, "left out as"), (report.warned, "kept with"))
        for cause, count in counts.items()
    ]
    text = "; ".join(said for _, said in sorted(found, key=lambda item: -item[0])[:3])
    data = text.encode()
    return text if len(data) <= limit else data[: limit - 3].decode(errors="ignore") + "…"
