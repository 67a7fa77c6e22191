"""The webhook's paths change without a call that fails: every pod answers to the one that the API server uses."""

import itertools
import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.webhook_paths import LIFETIME, MOST, PREFIX, SETTLED, BadPaths, Entry, parse, render, rotated

NOW = datetime(2026, 3, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


def path(number: int) -> str:
    return PREFIX + f"{number:043d}"


class Release:
    """A Secret, a configuration and the pods' view of the Secret, over time."""

    def __init__(self) -> None:
        self.now, self.numbers = NOW, itertools.count()
        self.secret: list[Entry] = []
        self.configured: str | None = None
        self.written: list[tuple[datetime, list[Entry]]] = []
        self.replaced: list[tuple[datetime, str]] = []

    def run(self, *, writes: int = 2) -> None:
        """One run of the certificates' Job, which may end after its first write, or before."""
        entries, wanted = rotated(self.secret, self.configured, self.now, lambda: path(next(self.numbers)))
        if writes >= 1:
            self.secret = parse(render(entries))
            self.written.append((self.now, self.secret))
        if writes >= 2:
            self.configure(wanted)

    def configure(self, path: str | None) -> None:
        if self.configured and self.configured != path:
            self.replaced.append((self.now, self.configured))
        self.configured = path

    def used(self) -> set[str | None]:
        """Paths that API servers use, of which some have not seen the last minutes' writes either."""
        return {self.configured, *(path for when, path in self.replaced if self.now - when <= SETTLED / 2)}

    def answered(self) -> set[str]:
        """Paths that every pod answers to, whatever it has seen of the last minutes' writes."""
        seen = [{e.path for e in entries} for _, entries in self.views()]
        return set.intersection(*seen) if seen else set()

    def views(self) -> list[tuple[datetime, list[Entry]]]:
        recent = [view for view in self.written if self.now - view[0] <= SETTLED / 2]
        before = [view for view in self.written if self.now - view[0] > SETTLED / 2]
        return before[-1:] + recent


def test_a_path_is_added_then_used_and_the_one_before_dropped_last() -> None:
    release = Release()
    release.run()
    seen = []
    for _ in range(5):
        release.now += HOUR
        release.run()
        seen.append(([entry.path for entry in release.secret], release.configured))
    assert seen[:3] == [
        ([path(0), path(1)], path(0)),
        ([path(0), path(1), path(2)], path(1)),
        ([path(1), path(2), path(3)], path(2)),
    ]
    assert all(len(paths) <= 3 for paths, _ in seen)


def test_runs_that_follow_each_other_at_once_change_nothing() -> None:
    release = Release()
    release.run()
    first = release.secret
    release.now += timedelta(seconds=30)
    release.run()
    assert release.secret == first
    assert release.configured == first[0].path


def test_a_configuration_that_lost_its_path_gets_one_that_pods_know() -> None:
    release = Release()
    for _ in range(3):
        release.run()
        release.now += HOUR
    release.run()
    newest = release.secret[-1].path
    release.configured = None
    release.run()
    assert release.configured in {entry.path for entry in release.secret} - {newest}


def test_a_secret_that_was_lost_is_made_of_what_the_configuration_has() -> None:
    release = Release()
    release.run()
    used, release.secret = release.configured, []
    release.run()
    assert release.configured == used == release.secret[0].path
    release.secret, release.configured = [], "/validate"
    release.run()
    assert release.configured != "/validate"


STEP = st.tuples(
    st.sampled_from([timedelta(seconds=1), timedelta(minutes=4), timedelta(minutes=11), HOUR, 24 * HOUR]),
    st.integers(0, 2),
    st.booleans(),
)


@given(st.lists(STEP, max_size=30))
def test_whenever_it_runs_and_wherever_it_ends_every_pod_answers_to_what_is_used(
    steps: list[tuple[timedelta, int, bool]],
) -> None:
    release = Release()
    release.run()
    # The first pods start when the Secret is there.
    release.now += SETTLED
    for pause, writes, reset in steps:
        release.now += pause
        if reset:
            release.configure(None)
            release.run()
        release.run(writes=writes)
        assert release.used() <= release.answered()
        assert len(release.secret) <= MOST


def test_no_path_lives_much_longer_than_it_is_used() -> None:
    release = Release()
    release.run()
    for _ in range(100):
        release.now += LIFETIME
        release.run()
        assert all(release.now - entry.added <= 4 * LIFETIME for entry in release.secret)


UPPER = json.dumps([["/validate/" + "A" * 43, "2026-01-01T00:00:00Z", None]]).encode()
"""An API server refuses it in a configuration."""


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b'["/validate/x"]', b'[["/validate/short","2026-01-01T00:00:00Z",null]]', b"\xff", UPPER],
)
def test_what_is_no_list_of_paths_is_refused(text: bytes) -> None:
    with pytest.raises(BadPaths):
        parse(text)
