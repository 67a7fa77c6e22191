"""Every request that the operator makes is refused, broken or left without an answer, in every way that there is."""

from typing import TYPE_CHECKING

import pytest

from support.faulty import Fault, Hang, Refuse, Reset, Rule, Stale
from support.playing import Case, Theatre

if TYPE_CHECKING:
    from support.tally import Tally

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

FAULTS: list[Fault] = [
    *(Refuse(code) for code in (401, 403, 404, 409, 410, 422, 500, 503)),
    Refuse(429, retry_after="1"),
    Refuse(404, plain=True),
    Reset(committed=False),
    Reset(committed=True),
    Hang(committed=False),
    Hang(committed=True),
]
STORIES = ("retry", "resume", "ttl")
"""Together they make every request that there is."""


def case(scenario: str, kind: str, number: int, fault: Fault, times: int) -> Case:
    title = f"{scenario}, {kind} number {number + 1}: {fault}{f', {times} times' if times > 1 else ''}"
    return Case(title, scenario, lambda: [Rule(kind, fault, first=number, times=times)])


@pytest.mark.parametrize("story", STORIES)
async def test_every_request_with_every_fault(theatre: Theatre, tally: "Tally", whole: bool, story: str) -> None:
    """In the first story that makes the request."""
    cases: dict[str, Case] = {}
    for scenario in STORIES:
        calls = [call.kind for call in (await theatre.smooth(scenario)).calls]
        for index, kind in enumerate(dict.fromkeys(calls)):
            # A later request may not be made again, if others are made instead: half of them surely is.
            middle = calls.count(kind) // 2
            for fault in FAULTS:
                cases.setdefault(f"{kind} {fault}", case(scenario, kind, 0, fault, 1))
            for fault in FAULTS[index % 3 :: 3]:
                cases.setdefault(f"{kind} {fault} again", case(scenario, kind, middle, fault, 2))
            if kind.startswith(("get", "list")):
                # What is said not to be there: at each time, since what is concluded from that depends on it.
                for number in range(max(1, calls.count(kind) * 2 // 3)):
                    title = f"{scenario} {kind} {number}"
                    cases.setdefault(title, case(scenario, kind, number, Refuse(404), 1))
    own = [case for case in cases.values() if case.scenario == story]
    tally.count("a request refused, broken or unanswered", await theatre.play_all(own if whole else own[::47]))


async def test_stale_answers(theatre: Theatre, tally: "Tally", whole: bool) -> None:
    """What was read once is read again: LISTs and objects of a cache that lags behind."""
    cases = []
    for scenario in STORIES:
        calls = [call.kind for call in (await theatre.smooth(scenario)).calls]
        for kind in dict.fromkeys(calls):
            if kind.startswith(("get", "list")) and kind != "get discovery":
                cases += [case(scenario, kind, n, Stale(), 2) for n in range(1, calls.count(kind) * 2 // 3)]
    chosen = cases if whole else cases[::23]
    tally.count("a stale answer", await theatre.play_all(chosen))
