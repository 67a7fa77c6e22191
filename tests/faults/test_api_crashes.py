"""The operator's process is killed around each of its writes, and once more while it recovers: the end is the same."""

from typing import TYPE_CHECKING

import pytest

from support.faulty import Kill, Rule, is_work
from support.playing import Case
from support.scenarios import SCENARIOS

if TYPE_CHECKING:
    from support.playing import Theatre
    from support.tally import Tally

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]


def crash(scenario: str, write: int, *committed: bool) -> Case:
    """Killed at this write, and for each further member at the next one that follows."""
    names = [str(Kill(c)) for c in committed]
    return Case(
        f"{scenario}, write {write + 1}: {', then '.join(names)}",
        scenario,
        lambda: [Rule("write", Kill(c), first=write + i) for i, c in enumerate(committed)],
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_a_crash_around_any_write(theatre: "Theatre", tally: "Tally", whole: bool, scenario: str) -> None:
    smooth = await theatre.smooth(scenario)
    writes = range(sum(is_work(call) for call in smooth.calls))
    cases = [crash(scenario, write, committed) for write in writes for committed in (False, True)]
    # The last but one: where one write makes the next one superfluous, there is still another to be killed at.
    twice = [(False, False), (True, True), (False, True), (True, False)]
    cases += [crash(scenario, write, *twice[(write + i) % 4]) for write in writes[:-2] for i in range(2)]
    # Of the sample each scenario has its own share.
    chosen = cases if whole else cases[list(SCENARIOS).index(scenario) :: 29]
    tally.count("operator killed around a write", await theatre.play_all(chosen))
