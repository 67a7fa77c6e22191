"""Which checkpoints there are, which may go, and when the next one is due."""

import pytest

from finetune_api.job import CheckpointInterval
from finetune_trainer.pace import FIRST_SECONDS, LEAST_SECONDS, MTBF_SECONDS, Pace, auto_seconds
from finetune_trainer.steps import complete_steps, name_of, superfluous

PREFIX = "s3://bucket/.scratch/u/checkpoints"


def test_only_a_manifest_makes_a_checkpoint() -> None:
    uris = [
        f"{PREFIX}/step-00000200/manifest.json",
        f"{PREFIX}/step-00000200/state.json",
        f"{PREFIX}/step-00001000/manifest.json",
        f"{PREFIX}/step-00001200/adapter.safetensors",
        f"{PREFIX}/step-00001300/deeper/manifest.json",
        f"{PREFIX}/step-13/manifest.json",
        f"{PREFIX}/manifest.json",
    ]
    assert complete_steps(uris) == [1000, 200]
    assert complete_steps([]) == []


def test_names_sort_as_numbers_do() -> None:
    assert name_of(200) == "step-00000200"
    assert sorted(map(name_of, (10, 9, 100))) == [name_of(9), name_of(10), name_of(100)]


@pytest.mark.parametrize(
    ("complete", "saved", "keep", "expected"),
    [
        ([100, 200, 300], 300, 2, [100]),
        ([100, 200, 300], 300, 1, [200, 100]),
        ([300], 300, 1, []),
        ([100, 200], 200, 5, []),
        # What lies ahead belongs to an earlier attempt, was found torn, and is overwritten when its step comes.
        ([100, 200, 900], 200, 1, [100]),
        # The one just saved is not listed yet: it stays all the same.
        ([100, 200], 300, 2, [100]),
    ],
)
def test_what_may_go(complete: list[int], saved: int, keep: int, expected: list[int]) -> None:
    assert superfluous(complete, saved, keep) == expected


def test_by_steps() -> None:
    pace = Pace(CheckpointInterval(type="Steps", steps=50), workers=1)
    pace.started(0, 0.0)
    assert next(step for step in range(1, 101) if pace.due(step, 1e6)) == 50
    pace.saved(50, 0.0, cost=1.0)
    assert not pace.due(99, 1e6)
    assert pace.due(100, 0.0)


def test_by_steps_after_a_resume_from_between() -> None:
    pace = Pace(CheckpointInterval(type="Steps", steps=50), workers=1)
    pace.started(73, 0.0)
    assert not pace.due(99, 1e6)
    assert pace.due(100, 0.0)


def test_by_seconds() -> None:
    pace = Pace(CheckpointInterval(type="Seconds", seconds=600), workers=1)
    pace.started(0, 1000.0)
    assert not pace.due(10**6, 1599.0)
    assert pace.due(1, 1600.0)


def test_by_cost() -> None:
    pace = Pace(CheckpointInterval(), workers=4)
    pace.started(0, 0.0)
    assert not pace.due(1, FIRST_SECONDS - 1)
    assert pace.due(1, FIRST_SECONDS)
    pace.saved(1, 100.0, cost=2.0)
    wait = (2 * 2.0 * MTBF_SECONDS / 4) ** 0.5
    assert not pace.due(2, 100.0 + wait - 1)
    assert pace.due(2, 100.0 + wait + 1)


def test_the_cheaper_the_more_often_but_not_all_the_time() -> None:
    assert auto_seconds(8.0, 1) == pytest.approx(2 * auto_seconds(2.0, 1))
    assert auto_seconds(2.0, 4) == pytest.approx(auto_seconds(2.0, 1) / 2)
    assert auto_seconds(0.0, 1) == LEAST_SECONDS


def test_the_more_has_failed_the_more_often() -> None:
    assert auto_seconds(8.0, 1, failures=3) == pytest.approx(auto_seconds(8.0, 1) / 2)
    pace = Pace(CheckpointInterval(), workers=1, failures=3)
    pace.saved(1, 0.0, cost=8.0)
    wait = auto_seconds(8.0, 1) / 2
    assert not pace.due(2, wait - 1)
    assert pace.due(2, wait + 1)
