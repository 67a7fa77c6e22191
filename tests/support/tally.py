"""How many faults were survived, by family: a test is one case, or says of how many it tried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

PROPERTY = "survived"


@dataclass
class Tally:
    """`properties`: of the pytest item; they travel with its report, from xdist's workers too."""

    properties: list[tuple[str, object]]

    def count(self, family: str, results: Mapping[str, str]) -> None:
        """`results`: what is wrong, by case; empty where it was survived. Fails where any was not."""
        self.properties.append((PROPERTY, [family, sum(not why for why in results.values()), len(results)]))
        assert results, f"{family}: no case"
        lost = [f"{case}: {why}" for case, why in results.items() if why]
        assert not lost, f"{family}: survived {len(results) - len(lost)} of {len(results)}\n" + "\n".join(lost)


class Family(NamedTuple):
    name: str
    survived: int
    cases: int


def families(stats: Mapping[str, Sequence[Any]]) -> list[Family]:
    """From pytest's reports: a test of tests/faults that counts nothing is one case of the family of its module."""
    counts: dict[str, list[int]] = {}
    for outcome in ("passed", "failed", "error"):
        for report in stats.get(outcome, ()):
            if "tests/faults/" not in report.nodeid or (report.when != "call" and outcome == "passed"):
                continue
            told = [value for name, value in report.user_properties if name == PROPERTY]
            module = report.nodeid.partition("::")[0].rpartition("/")[2].removeprefix("test_").removesuffix(".py")
            for family, survived, cases in told or [(module.replace("_", " "), int(outcome == "passed"), 1)]:
                count = counts.setdefault(family, [0, 0])
                count[0] += survived
                count[1] += cases
    return [Family(name, *count) for name, count in sorted(counts.items())]


def lines(found: Sequence[Family]) -> list[str]:
    return [f"{family.name}: survived {family.survived} of {family.cases}" for family in found]
