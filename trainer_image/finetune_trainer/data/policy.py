"""dataPolicy over rows: which ones are left out, which end the job, which are only told of.

Held-out data sets come first. Rows that a fraction holds out come mixed with the others; equal ones fall into the same
split, and of nearly equal ones only the first is kept (unless `duplicates` says otherwise), whichever split it is in.
"""

from pathlib import Path
from typing import NamedTuple, get_args

from finetune_api.dataset import DataPolicy
from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import Split
from finetune_trainer import log
from finetune_trainer.data.digests import Digests
from finetune_trainer.data.near import NearTexts, Sketch
from finetune_trainer.data.report import DatasetReport
from finetune_trainer.data.sources import Source
from finetune_trainer.outcome import one_line

WHY = 600
"""Characters that are told of what is wrong with a row."""


class Candidate(NamedTuple):
    """A row as this module sees it."""

    source: Source
    where: str
    split: Split
    digest: bytes
    sketch: Sketch | None
    learned: bytes = b""
    """`records.Digests.learned`."""


class _Near:
    """Texts with where they stand and the split that they are in."""

    def __init__(self, similarity: float) -> None:
        self._texts = NearTexts(similarity)
        self._known: dict[int, tuple[str, Split]] = {}

    def find(self, row: Candidate) -> tuple[str, Split, float] | None:
        match = self._texts.find(row.sketch) if row.sketch else None
        return (*self._known[match.number], match.similarity) if match else None

    def add(self, row: Candidate) -> None:
        if row.sketch:
            number = self._texts.add(row.sketch)
            self._known[number] = (row.where, row.split)
            self._known.pop(number - self._texts.capacity, None)


class _HeldOut:
    """Contents with the split that they are in."""

    def __init__(self, path: Path) -> None:
        self._digests = Digests(path)

    def find(self, digest: bytes) -> Split | None:
        tag = self._digests.find(digest)
        return None if tag is None else _HELD_OUT[tag]

    def add(self, digest: bytes, split: Split) -> None:
        self._digests.add(digest, _HELD_OUT.index(split))

    def close(self) -> None:
        self._digests.close()


_HELD_OUT: tuple[Split, ...] = tuple(split for split in get_args(Split) if split != "train")


class Repeats:
    """Duplicates within training data, and training data that is held out too."""

    def __init__(self, policy: DataPolicy, folder: Path) -> None:
        """`folder`: takes what is remembered of each row."""
        self._policy = policy
        self._seen, self._held_out = Digests(folder / "seen"), _HeldOut(folder / "held-out")
        self._near, self._near_held_out = _Near(policy.similarity), _Near(policy.similarity)

    def close(self) -> None:
        self._seen.close()
        self._held_out.close()

    def passes(self, report: DatasetReport, row: Candidate) -> bool:
        """Whether the row stays. Raises DataLeakage or DataInvalid where the policy is Fail."""
        if not self._held_apart(report, row):
            return False
        if row.source.split is not None:
            self._near_held_out.add(row)
        elif not self._is_new(report, row):
            return False
        else:
            self._near.add(row)
        if row.split == "train":
            self._seen.add(row.digest)
        else:
            self._held_out.add(row.digest, row.split)
        return True

    def is_held_out(self, row: Candidate) -> bool:
        """Whether a training row is in the held-out data sets too, or nearly so."""
        return self._held_out.find(row.digest) is not None or self._near_held_out.find(row) is not None

    def _held_apart(self, report: DatasetReport, row: Candidate) -> bool:
        other = self._held_out.find(row.digest)
        if other is not None and other != row.split:
            return self._leak(report, row, f"{row.where} is in the {other} data too")
        near = self._near_held_out.find(row)
        if near and near[1] != row.split:
            return self._leak(report, row, f"{row.where} is nearly the same as {_told(near)} of the {near[1]} data")
        return True

    def _is_new(self, report: DatasetReport, row: Candidate) -> bool:
        if row.split == "train" and self._seen.find(row.digest) is not None:
            return self._duplicate(report, row, "duplicate", f"{row.where} has the content of an earlier row")
        near = self._near.find(row)
        if not near or (near[1] == row.split != "train"):
            return True
        said = f"{row.where} is nearly the same as {_told(near)}"
        if near[1] != row.split and self._policy.duplicates != "Drop":
            return self._leak(report, row, f"{said}, and one of them is held out")
        return self._duplicate(report, row, "nearDuplicate", said)

    def _leak(self, report: DatasetReport, row: Candidate, said: str) -> bool:
        return _leak(self._policy, report, row, said)

    def _duplicate(self, report: DatasetReport, row: Candidate, cause: str, said: str) -> bool:
        if self._policy.duplicates == "Fail":
            raise FineTuneError(Reason.DATA_INVALID, f"{row.source.field}: {said} (dataPolicy.duplicates is Fail)")
        return _keep_or_drop(report, row, cause, said, self._policy.duplicates == "Drop")


class AcrossStages:
    """What one stage holds out no other trains on; the same rows may well be trained on by several."""

    def __init__(self, policy: DataPolicy, folder: Path) -> None:
        """`folder`: takes what is remembered of each row."""
        self._policy = policy
        self._trained, self._held_out = Digests(folder / "trained"), Digests(folder / "held-out-of-stages")
        self._near = _Near(policy.similarity)

    def close(self) -> None:
        self._trained.close()
        self._held_out.close()

    def passes(self, report: DatasetReport, row: Candidate) -> bool:
        """Whether the row stays; `Repeats` has let it pass. Raises DataLeakage where the policy is Fail."""
        trains = row.split == "train"
        if (self._held_out if trains else self._trained).find(row.learned) is not None:
            other = "is held out by another stage" if trains else "is trained on by another stage"
            if not _leak(self._policy, report, row, f"{row.where} {other}"):
                return False
        near = self._near.find(row)
        if near and (near[1] == "train") != trains:
            said = f"{row.where} is nearly the same as {_told(near)} of another stage, and one of them is held out"
            if self._policy.duplicates != "Drop":
                return _leak(self._policy, report, row, said)
            return _keep_or_drop(report, row, "nearDuplicate", said, drop=True)
        self._near.add(row)
        (self._trained if trains else self._held_out).add(row.learned)
        return True


def _leak(policy: DataPolicy, report: DatasetReport, row: Candidate, said: str) -> bool:
    if policy.leakage == "Fail":
        raise FineTuneError(
            Reason.DATA_LEAKAGE, f"{row.source.field}: {said} (dataPolicy.leakage is Fail; Drop leaves such rows out)"
        )
    return _keep_or_drop(report, row, "leakage", said, policy.leakage == "Drop")


def _told(near: tuple[str, Split, float]) -> str:
    return f"{near[0]} ({near[2]:.0%} of their five-word runs)"


def _keep_or_drop(report: DatasetReport, row: Candidate, cause: str, said: str, drop: bool) -> bool:
    (report.drop if drop else report.warn)(cause, said)
    return not drop


def refuse(policy: DataPolicy, source: Source, report: DatasetReport, where: str, why: str) -> None:
    """A row that cannot be used: it never is; Fail ends the job, Warn says so in the log."""
    why = one_line(why)[:WHY]
    if policy.invalid == "Fail":
        raise FineTuneError(Reason.DATA_INVALID, f"{source.field}: {where}: {why}")
    report.drop("invalid", where, why)
    if policy.invalid == "Warn":
        log.event("row left out", level="warning", where=where, why=why)
