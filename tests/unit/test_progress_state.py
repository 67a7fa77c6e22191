"""The progress server's arithmetic, in virtual time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.progress import CheckpointStatus, Metric, TrainerStatus
from finetune_operator.buckets import Buckets
from finetune_operator.progress_state import (
    MAX_METRICS,
    MAX_SAMPLES,
    JobKey,
    ProgressBook,
    Sample,
    merge,
    merge_metrics,
    percentage,
    remaining_seconds,
    with_steps,
)

KEY = JobKey("team-a", "support-bot")


def report(**fields: object) -> TrainerStatus:
    return TrainerStatus.model_validate(fields)


@pytest.mark.parametrize(
    ("samples", "total", "now", "expected"),
    [
        ([], 100, 0.0, None),
        ([(0, 10)], 100, 5.0, None),  # one step says nothing of the pace
        ([(0, 0), (10, 10)], None, 10.0, None),
        ([(0, 0), (10, 10)], 0, 10.0, None),
        ([(0, 0), (10, 10)], 100, 10.0, 90),
        # Resumed at step 900 a second ago: ten steps a second, not nine hundred.
        ([(50, 900), (51, 910)], 1000, 51.0, 9),
        ([(0, 0), (10, 10)], 100, 10.5, 90),  # half a step has passed
        ([(0, 0), (10, 10)], 100, 500.0, 89),  # a stalled step does not count down the others
        ([(0, 0), (10, 100)], 100, 10.0, 0),
        ([(0, 50)], 50, 0.0, 0),
        ([(0, 50)], 40, 0.0, 0),
        ([(7, 1), (7, 2)], 10, 7.0, None),  # two steps at one moment
    ],
)
def test_remaining_seconds(
    samples: list[tuple[float, int]], total: int | None, now: float, expected: int | None
) -> None:
    assert remaining_seconds([Sample(*s) for s in samples], total, now) == expected


@given(
    st.lists(st.tuples(st.floats(0.01, 1e4), st.integers(1, 1000)), min_size=1, max_size=40),
    st.integers(0, 10**9),
    st.floats(0, 1e5),
)
def test_remaining_seconds_is_never_negative(deltas: list[tuple[float, int]], total: int, later: float) -> None:
    samples = [Sample(0.0, 0)]
    for seconds, steps in deltas:
        samples.append(Sample(samples[-1].time + seconds, samples[-1].step + steps))
    left = remaining_seconds(samples, total, samples[-1].time + later)
    assert left is None or left >= 0


def test_steps_of_a_stock_trainer_are_read_from_its_metrics() -> None:
    told = report(metrics=[{"name": "current_step", "value": "30"}, {"name": "total_steps", "value": "40"}])
    assert (with_steps(told).step, with_steps(told).total_steps) == (30, 40)
    for value in ("-1", "nan", "", "1e3", "9" * 40, "٣"):
        assert with_steps(report(metrics=[{"name": "current_step", "value": value}])).step is None
    assert with_steps(report(step=3, metrics=[{"name": "current_step", "value": "30"}])).step == 3


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"step": 5}, None),
        ({"step": 5, "totalSteps": 0}, None),
        ({"step": 5, "totalSteps": 40}, 12),
        ({"step": 40, "totalSteps": 40}, 99),  # evaluated and published it is not yet
        ({"step": 5, "totalSteps": 40, "progressPercentage": 80}, 80),
    ],
)
def test_percentage(fields: dict[str, object], expected: int | None) -> None:
    assert percentage(report(**fields)) == expected


def test_progress_never_decreases_within_an_attempt() -> None:
    before = report(attempt=1, progressPercentage=40, step=400, totalSteps=1000, phase="Training")
    after = merge(before, report(attempt=1, progressPercentage=0))
    assert (after.progress_percentage, after.step, after.total_steps, after.phase) == (40, 400, 1000, "Training")
    assert merge(before, report(attempt=1, progressPercentage=41, step=410)).step == 410


def test_the_next_attempt_starts_anew_but_keeps_the_checkpoint() -> None:
    checkpoint = {"uri": "s3://bucket/c/step-2", "step": 2, "time": "2026-01-01T00:00:00Z"}
    before = report(
        attempt=0, progressPercentage=90, step=9, metrics=[{"name": "loss", "value": "1"}], checkpoint=checkpoint
    )
    after = merge(before, report(attempt=1, progressPercentage=0))
    assert (after.progress_percentage, after.step, after.metrics) == (0, None, [])
    assert after.checkpoint == CheckpointStatus.model_validate(checkpoint)


def test_the_next_stage_counts_its_own_steps() -> None:
    before = report(attempt=0, stage="one", step=100, totalSteps=100, progressPercentage=50)
    after = merge(before, report(attempt=0, stage="two", step=1, totalSteps=300, progressPercentage=50))
    assert (after.stage, after.step, after.total_steps, after.progress_percentage) == ("two", 1, 300, 50)


def test_a_warning_stays_until_it_is_taken_back_or_another_stage_begins() -> None:
    before = report(attempt=0, stage="one", warning="training falls, validation rises since step 40")
    assert merge(before, report(attempt=0, step=50)).warning == before.warning
    assert merge(before, report(attempt=0, warning="")).warning == ""
    assert merge(before, report(attempt=0, stage="two")).warning is None
    assert merge(before, report(attempt=1)).warning is None


def metrics(**values: str) -> list[Metric]:
    return [Metric(name=name, value=value) for name, value in values.items()]


def test_metrics_are_merged_by_name() -> None:
    merged = merge_metrics(metrics(loss="2", lr="1"), metrics(loss="1", epoch="3"))
    assert merged == metrics(loss="1", lr="1", epoch="3")


def test_of_too_many_metrics_the_oldest_go() -> None:
    before = [Metric(name=f"m{i}", value="0") for i in range(MAX_METRICS)]
    merged = merge_metrics(before, metrics(m3="1", loss="1", lr="1"))
    assert len(merged) == MAX_METRICS
    names = [metric.name for metric in merged]
    assert {"loss", "lr", "m3"} <= set(names)
    assert not {"m0", "m1"} & set(names)


def test_a_bucket_lets_a_burst_and_then_its_rate_through() -> None:
    buckets = Buckets(rate=0.5, burst=3)
    assert [buckets.take("a", 0.0) for _ in range(4)] == [0.0, 0.0, 0.0, 2.0]
    assert buckets.take("b", 0.0) == 0.0  # another one's is its own
    assert buckets.take("a", 1.0) == pytest.approx(1.0)
    assert buckets.take("a", 2.0) == 0.0
    assert buckets.take("a", 2.0) == pytest.approx(2.0)
    assert [buckets.take("a", 1000.0) for _ in range(4)] == [0.0, 0.0, 0.0, pytest.approx(2.0)]


def test_buckets_are_bounded() -> None:
    buckets = Buckets(rate=1, burst=1, limit=100)
    for number in range(1000):
        buckets.take(number, 0.0)
    assert len(buckets) == 100
    buckets.forget(999)
    assert len(buckets) == 99


class Clocked:
    """A book, and a clock that only the test moves; every write succeeds at once unless told otherwise."""

    def __init__(self, interval: float = 5.0, idle: float = 600.0) -> None:
        self.book = ProgressBook(interval, idle)
        self.now = 0.0
        self.writes: list[tuple[float, TrainerStatus]] = []

    def post(self, attempt: int = 0, uid: str = "u", **fields: object) -> None:
        self.book.accept(KEY, uid, attempt, report(**fields), self.now)
        self.flush()

    def flush(self) -> None:
        for write in self.book.due(self.now):
            self.writes.append((self.now, write.status))
            self.book.written(write, self.now)

    def until(self, end: float) -> None:
        """Goes to each moment at which something is due."""
        while (due := self.book.next_due()) is not None and due <= end:
            self.now = max(self.now, due)
            self.flush()
        self.now = end

    @property
    def times(self) -> list[float]:
        return [time for time, _ in self.writes]


def test_writes_are_coalesced_to_one_in_an_interval() -> None:
    clocked = Clocked(interval=5.0)
    for second in range(21):
        clocked.until(second)
        clocked.post(step=second, totalSteps=1000)
    clocked.until(100)
    assert clocked.times == [0, 5, 10, 15, 20, 25]
    assert clocked.writes[-1][1].step == 20
    assert clocked.book.next_due() is None


def test_what_came_last_is_written_though_nothing_follows() -> None:
    clocked = Clocked(interval=5.0)
    clocked.post(step=1, totalSteps=10)
    clocked.now = 1.0
    clocked.post(step=2)
    clocked.until(60)
    assert clocked.times == [0, 5]
    assert clocked.writes[-1][1].step == 2


def test_a_new_phase_and_the_end_are_written_at_once() -> None:
    clocked = Clocked(interval=5.0)
    clocked.post(phase="Loading")
    for now, fields in (
        (1.0, {"phase": "Training", "step": 1, "totalSteps": 9}),
        (2.0, {"phase": "Training", "step": 2}),
        (3.0, {"phase": "Evaluating"}),
        (4.0, {"progressPercentage": 100}),
        (4.5, {"progressPercentage": 100}),
    ):
        clocked.until(now)
        clocked.post(**fields)
    clocked.until(60)
    assert clocked.times == [0, 1, 3, 4, 9]


def test_a_change_of_phase_during_a_write_follows_at_once() -> None:
    book = ProgressBook(5.0)
    book.accept(KEY, "u", 0, report(phase="Loading"), 0.0)
    [write] = book.due(0.0)
    book.accept(KEY, "u", 0, report(phase="Training"), 0.5)
    assert book.due(0.5) == []  # never two writes of one job at a time
    book.written(write, 1.0)
    [second] = book.due(1.0)
    assert second.status.phase == "Training"


def test_a_failed_write_comes_again_with_the_newest() -> None:
    book = ProgressBook(5.0)
    book.accept(KEY, "u", 0, report(step=1), 0.0)
    waits = []
    now = 0.0
    for step in range(2, 12):
        [write] = book.due(now)
        book.accept(KEY, "u", 0, report(step=step), now)
        waits.append(book.failed(write, now))
        due = book.next_due()
        assert due is not None
        assert book.due(due - 0.01) == []
        now = due
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    [write] = book.due(now)
    assert write.status.step == 11
    book.written(write, now)
    assert book.next_due() is None


def test_the_eta_is_that_of_the_attempt() -> None:
    clocked = Clocked(interval=0.0)
    clocked.post(attempt=0, step=0, totalSteps=1000)
    clocked.now = 100.0
    clocked.post(attempt=0, step=10)
    assert clocked.writes[-1][1].estimated_remaining_seconds == 9900
    clocked.now = 200.0
    # The next attempt resumes at 900 and says what a stock Trainer believes: 900 steps in no time.
    clocked.post(attempt=1, step=900, totalSteps=1000, estimatedRemainingSeconds=0)
    assert clocked.writes[-1][1].estimated_remaining_seconds is None
    clocked.now = 210.0
    clocked.post(attempt=1, step=910, estimatedRemainingSeconds=1)
    assert clocked.writes[-1][1].estimated_remaining_seconds == 90
    # Without steps there is only its word.
    clocked.post(attempt=2, progressPercentage=3, estimatedRemainingSeconds=77)
    assert clocked.writes[-1][1].estimated_remaining_seconds == 77


def test_the_eta_follows_a_change_of_pace() -> None:
    clocked = Clocked(interval=0.0)
    for step in range(10):
        clocked.now = step * 100.0
        clocked.post(step=step, totalSteps=10_000)
    start = clocked.now
    for step in range(10, 10 + MAX_SAMPLES):
        clocked.now = start + (step - 9) * 1.0
        clocked.post(step=step)
    assert clocked.writes[-1][1].estimated_remaining_seconds == 10_000 - (9 + MAX_SAMPLES)


def test_another_job_of_the_same_name_inherits_nothing() -> None:
    book = ProgressBook(5.0)
    book.accept(KEY, "old", 0, report(step=99, progressPercentage=99), 0.0)
    [write] = book.due(0.0)
    book.accept(KEY, "new", 0, report(step=1), 1.0)
    book.failed(write, 2.0)  # the old one's write settles into nothing
    [fresh] = book.due(2.0)
    assert (fresh.uid, fresh.status.step, fresh.status.progress_percentage) == ("new", 1, None)
    book.forget(KEY, "old")
    assert len(book) == 1
    book.forget(KEY, "new")
    assert len(book) == 0


def test_jobs_that_fell_silent_are_forgotten_but_not_what_is_unwritten() -> None:
    book = ProgressBook(5.0, idle=60.0)
    for number in range(100):
        book.accept(JobKey("n", str(number)), "u", 0, report(step=1), 0.0)
    writes = book.due(0.0)
    for write in writes[1:]:
        book.written(write, 0.0)
    book.failed(writes[0], 0.0)
    assert len(book) == 100
    book.due(61.0)
    assert len(book) == 1


def test_the_writers_end_hastens_what_waits() -> None:
    clocked = Clocked(interval=5.0)
    clocked.post(step=1)
    clocked.now = 1.0
    clocked.post(step=2)
    assert len(clocked.writes) == 1
    clocked.book.hasten(clocked.now)
    clocked.flush()
    assert [status.step for _, status in clocked.writes] == [1, 2]
