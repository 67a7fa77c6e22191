"""Watches of Jobs and pods, against an API server that does what the test says."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import pytest

from finetune_operator import reflector
from finetune_operator.errors import ApiError
from finetune_operator.essentials import Change, Page
from finetune_operator.reflector import Reflector

Told = list[tuple[str | None, str]]


def job(name: str, version: str = "1") -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "n", "resourceVersion": version}}


def bookmark(version: str) -> Change:
    return Change("BOOKMARK", {"metadata": {"resourceVersion": version}})


def refused(code: int) -> Change:
    return Change("ERROR", {"kind": "Status", "code": code, "reason": "Why", "message": "on purpose"})


class Over(Exception):
    """The script has come to its end."""


class Script:
    """`steps`: what each request gets, a list of pages for a LIST and of changes for a watch, or an error."""

    def __init__(self, *steps: Any) -> None:
        self.steps = list(steps)
        self.asked: list[str] = []

    def _next(self, what: str) -> Any:
        self.asked.append(what)
        if not self.steps:
            raise Over
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    async def list_pages(self, kind: str, namespace: str | None) -> AsyncIterator[Page]:
        for page in self._next("list"):
            yield page

    async def watch(self, kind: str, namespace: str | None, version: str, silence: float) -> AsyncGenerator[Change]:
        for change in self._next(f"watch from {version}"):
            if isinstance(change, Exception):
                raise change
            yield change


def page(*names: str, version: str = "10") -> Page:
    return Page([job(name) for name in names], version, "", 100)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, of no length."""
    made: list[float] = []
    sleep = asyncio.sleep

    async def pause(seconds: float) -> None:
        made.append(seconds)
        await sleep(0)

    monkeypatch.setattr(reflector.asyncio, "sleep", pause)
    return made


async def play(script: Script, on_event: Callable[[str | None, Any], None] | None = None) -> Told:
    told: Told = []

    def note(kind: str | None, found: Any) -> None:
        told.append((kind, found["metadata"]["name"]))

    with pytest.raises(Over):
        await Reflector(script, "Job", None, on_event or note).run()
    return told


async def test_what_is_there_is_told_and_then_what_changes() -> None:
    changes = [Change("ADDED", job("c", "11")), bookmark("15"), Change("DELETED", job("a", "16"))]
    script = Script([page("a"), page("b")], changes, [bookmark("20")])
    assert await play(script) == [(None, "a"), (None, "b"), ("ADDED", "c"), ("DELETED", "a")]
    assert script.asked == ["list", "watch from 10", "watch from 16", "watch from 20"]


@pytest.mark.parametrize("gone", [[refused(410)], ApiError(410, "Expired", "too old")])
async def test_after_a_compaction_all_are_listed_again(gone: Any) -> None:
    script = Script([page("a")], gone, [page("a", "b", version="30")])
    assert await play(script) == [(None, "a"), (None, "a"), (None, "b")]
    assert script.asked == ["list", "watch from 10", "list", "watch from 30"]


async def test_a_list_that_grew_too_old_on_the_way_begins_anew() -> None:
    script = Script(ApiError(410, "Expired", "the continue token is too old"), [page("a")])
    assert await play(script) == [(None, "a")]


@pytest.mark.parametrize("trouble", [[refused(500)], ApiError(0, "Unreachable", "x"), ApiError(403, "Forbidden", "x")])
async def test_after_trouble_it_goes_on_where_it_stopped(trouble: Any, pauses: list[float]) -> None:
    script = Script([page("a")], [Change("ADDED", job("b", "12"))], trouble, trouble, [Change("ADDED", job("c", "13"))])
    assert await play(script) == [(None, "a"), ("ADDED", "b"), ("ADDED", "c")]
    assert script.asked[2:] == ["watch from 12", "watch from 12", "watch from 12", "watch from 13"]
    assert [p for p in pauses if p >= 1][:2] == [1, 1]


async def test_trouble_that_does_not_end_ends_the_process(pauses: list[float]) -> None:
    """Instead of an operator that is green and hears nothing."""
    script = Script([page("a")], *[ApiError(503, "Unavailable", "away")] * 100)
    with pytest.raises(ApiError, match="away"):
        await Reflector(script, "Job", None, lambda kind, found: None).run()
    assert sum(pauses) == sum(reflector.BACKOFFS)


async def test_watches_that_tell_nothing_are_opened_less_and_less_often(pauses: list[float]) -> None:
    script = Script([page("a")], *[[]] * 8, [bookmark("11")], [])
    await play(script)
    assert pauses[1:] == [0.2, 0.5, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0, 0.1, 0.2]


async def test_an_event_that_cannot_be_dealt_with_hides_no_other() -> None:
    told = []

    def deal(kind: str | None, found: Any) -> None:
        told.append(found["metadata"]["name"])
        if found["metadata"]["name"] == "odd":
            raise OverflowError("odd")

    script = Script([page("odd", "a")], [Change("ADDED", job("odd")), Change("ADDED", job("b"))])
    await play(script, deal)
    assert told == ["odd", "a", "odd", "b"]
