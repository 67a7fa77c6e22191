"""What dataPolicy does with rows that stand twice, in the order in which prepare reads them."""

import hashlib
import random
import tempfile
from pathlib import Path

import pytest

from finetune_api.dataset import DataPolicy, Dataset
from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import Split
from finetune_trainer.data.near import sketch
from finetune_trainer.data.policy import Candidate, Repeats
from finetune_trainer.data.report import DatasetReport
from finetune_trainer.data.sources import Source

DATASET = Dataset(name="a", uri="s3://bucket/a.jsonl")
TRAIN = Source(DATASET, "spec.datasets[0]", None, [], [])
HELD = Source(DATASET, "spec.validation.datasets[0]", "validation", [], [])
TEST = Source(DATASET, "spec.test.datasets[0]", "test", [], [])
WORDS = random.Random(1).choices([f"word{i}" for i in range(999)], k=400)


class Reading:
    def __init__(self, **policy: object) -> None:
        # What it writes has no name: it goes with the object.
        with tempfile.TemporaryDirectory() as folder:
            self.repeats = Repeats(DataPolicy.model_validate(policy), Path(folder))
        self.report = DatasetReport("a")
        self.line = 0

    def row(self, source: Source, changed: int, split: Split = "train", text: str = "") -> bool:
        """A row of 400 words, whose word number `changed` is another."""
        self.line += 1
        text = text or " ".join([*WORDS[:changed], "changed", *WORDS[changed + 1 :]])
        split = source.split or split
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        row = Candidate(source, f"line {self.line}", split, digest, sketch(text))
        return self.repeats.passes(self.report, row)


def test_near_duplicates_are_left_out_by_default() -> None:
    reading = Reading()
    assert [reading.row(TRAIN, 10), reading.row(TRAIN, 10), reading.row(TRAIN, 90)] == [True, False, False]
    assert reading.row(TRAIN, 0, text=" ".join(reversed(WORDS)))
    assert reading.report.dropped == {"duplicate": 1, "nearDuplicate": 1}
    assert reading.report.cases["nearDuplicate"][0].startswith("line 3 is nearly the same as line 1 (9")


def test_a_similarity_of_one_counts_equal_rows_only() -> None:
    reading = Reading(similarity=1.0)
    assert [reading.row(TRAIN, 10), reading.row(TRAIN, 90), reading.row(TRAIN, 90)] == [True, True, False]


def test_near_duplicates_can_fail_the_job() -> None:
    reading = Reading(duplicates="Fail")
    assert reading.row(TRAIN, 10)
    with pytest.raises(
        FineTuneError, match=r"\[0\]: line 2 is nearly the same as line 1 .*duplicates is Fail"
    ) as caught:
        reading.row(TRAIN, 90)
    assert caught.value.reason == Reason.DATA_INVALID


@pytest.mark.parametrize(("policy", "kept"), [("Drop", False), ("Warn", True)])
def test_what_is_nearly_held_out_is_a_leak(policy: str, kept: bool) -> None:
    reading = Reading(leakage=policy)
    assert reading.row(HELD, 10)
    assert reading.row(TRAIN, 90) == kept
    assert (reading.report.dropped if not kept else reading.report.warned) == {"leakage": 1}


def test_a_leak_fails_the_job_by_default() -> None:
    reading = Reading()
    assert reading.row(HELD, 10)
    with pytest.raises(FineTuneError, match=r"line 2 is nearly .* line 1 .* of the validation data") as caught:
        reading.row(TRAIN, 90)
    assert caught.value.reason == Reason.DATA_LEAKAGE
    with pytest.raises(FineTuneError, match="line 3 is in the validation data too"):
        reading.row(TEST, 10)


def test_of_rows_that_a_fraction_would_part_the_first_stays() -> None:
    reading = Reading()
    assert reading.row(TRAIN, 10)
    assert not reading.row(TRAIN, 90, "validation")
    assert reading.report.dropped == {"nearDuplicate": 1}
    told = Reading(duplicates="Warn")
    assert told.row(TRAIN, 10)
    with pytest.raises(FineTuneError, match="and one of them is held out"):
        told.row(TRAIN, 90, "validation")


def test_held_out_rows_may_stand_twice() -> None:
    reading = Reading()
    assert all([reading.row(HELD, 10), reading.row(HELD, 10), reading.row(HELD, 90)])
