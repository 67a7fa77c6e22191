"""The operator's time is the API server's, wherever this machine's clock is off."""

import datetime
from collections.abc import Iterator
from email.utils import format_datetime

import pytest

from finetune_operator import clock

NOW = datetime.datetime(2026, 3, 1, 12, 0, 0, tzinfo=datetime.UTC)


@pytest.fixture(autouse=True)
def _frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(clock, "local_now", lambda: NOW)
    yield
    clock.heard(format_datetime(NOW, usegmt=True), NOW, NOW)


def seconds(count: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=count)


@pytest.mark.parametrize("ahead", [-5 * 3600, -60, 0, 3, 60, 5 * 3600])
def test_a_clock_that_is_off_is_corrected(ahead: float) -> None:
    clock.heard(format_datetime(NOW + seconds(ahead), usegmt=True), NOW - seconds(0.1), NOW)
    assert clock.utc_now() - NOW == seconds(ahead if abs(ahead) > 5 else 0)


@pytest.mark.parametrize("dated", [0, 15, 30])
def test_an_answer_that_takes_long_is_no_difference(dated: float) -> None:
    clock.heard(format_datetime(NOW - seconds(dated), usegmt=True), NOW - seconds(30), NOW)
    assert clock.utc_now() == NOW


def test_a_clock_that_is_right_again_counts_again() -> None:
    clock.heard(format_datetime(NOW + seconds(3600), usegmt=True), NOW, NOW)
    clock.heard(format_datetime(NOW, usegmt=True), NOW, NOW)
    assert clock.utc_now() == NOW


@pytest.mark.parametrize(
    "date", [None, "", "yesterday", "Sun, 99 Foo 9999999 00:00:00 GMT", "Sun, 01 Mar 2026 12:00:00"]
)
def test_an_odd_date_changes_nothing(date: str | None) -> None:
    clock.heard(format_datetime(NOW + seconds(3600), usegmt=True), NOW, NOW)
    clock.heard(date, NOW, NOW)
    assert clock.utc_now() == NOW + seconds(3600)
