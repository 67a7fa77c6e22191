"""Watches that lie, stutter, fall silent or break: whatever they tell or do not tell, the end is the same."""

from typing import TYPE_CHECKING, get_args, get_type_hints

import pytest

from support.faulty import Broken, Rule
from support.playing import Case, Theatre

if TYPE_CHECKING:
    from support.tally import Tally

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
HOWS = get_args(get_type_hints(Broken)["how"])
STORIES = ("retry", "resume", "ttl")
FOR_EVER = 10_000


def case(scenario: str, resource: str, how: str, number: int, times: int = 1) -> Case:
    title = f"{scenario}, event {number + 1} of {resource}: {how}{' and all that follow' if times > 1 else ''}"
    return Case(title, scenario, lambda: [Rule(f"watch {resource} event", Broken(how), first=number, times=times)])


@pytest.mark.parametrize("resource", ["finetunejobs", "jobs", "pods"])
async def test_every_event_of_every_watch(theatre: Theatre, tally: "Tally", whole: bool, resource: str) -> None:
    cases = []
    for index, how in enumerate(HOWS):
        scenario = STORIES[index % 3]
        # How many there are differs a little from run to run.
        count = (await theatre.smooth(scenario)).events[resource] * 2 // 3
        cases += [case(scenario, resource, how, number) for number in range(max(1, count))]
    chosen = cases if whole else cases[::31]
    tally.count("a watch event lost, doubled, late or broken", await theatre.play_all(chosen))


@pytest.mark.parametrize("how", ["drop", "duplicate", "delay"])
async def test_every_event_from_the_first_on(theatre: Theatre, tally: "Tally", whole: bool, how: str) -> None:
    """Deaf watches: only what is listed from time to time tells what happens."""
    if not whole and how == "drop":
        pytest.skip("in the long form; test_deaf_watches_are_made_up_for is nearly the same")
    stories = STORIES if whole else STORIES[:1]
    cases = [
        Case(
            f"{scenario}, every event of every watch: {how}",
            scenario,
            lambda: [Rule(f"watch {r} event", Broken(how), times=FOR_EVER) for r in ("finetunejobs", "jobs", "pods")],
        )
        for scenario in stories
    ]
    tally.count("a watch event lost, doubled, late or broken", await theatre.play_all(cases))
