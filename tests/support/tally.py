"""How many faults were survived, by family: a test is one case, or says of how many it tried; and the report of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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


class Count(NamedTuple):
    """Of one test."""

    family: str
    survived: int
    cases: int
    seconds: float


def counts(stats: Mapping[str, Sequence[Any]]) -> dict[str, Count]:
    """By test, from pytest's reports: one of tests/faults that counts nothing is one case of its module's family."""
    found: dict[str, Count] = {}
    for outcome in ("passed", "failed", "error"):
        for report in stats.get(outcome, ()):
            if "tests/faults/" not in report.nodeid or (report.when != "call" and outcome == "passed"):
                continue
            told = [value for name, value in report.user_properties if name == PROPERTY]
            module = report.nodeid.partition("::")[0].rpartition("/")[2].removeprefix("test_").removesuffix(".py")
            family, survived, cases = told[-1] if told else (module.replace("_", " "), int(outcome == "passed"), 1)
            # A test that counted and then failed for another reason has not survived that.
            if told and outcome != "passed" and survived == cases:
                survived -= 1
            found[report.nodeid] = Count(family, survived, cases, round(report.duration, 1))
    return found


def families(found: Mapping[str, Count]) -> dict[str, Count]:
    total: dict[str, Count] = {}
    for count in found.values():
        before = total.get(count.family, Count(count.family, 0, 0, 0.0))
        sums = (a + b for a, b in zip(before[1:], count[1:], strict=True))
        total[count.family] = Count(count.family, *sums)  # type: ignore[arg-type]
    return dict(sorted(total.items()))


def line(count: Count) -> str:
    return f"{count.family}: survived {count.survived} of {count.cases}"


def write_report(folder: Path, found: Mapping[str, Count], server: str) -> None:
    """faults.json has every test's last run, so that some can be run again; faults.md is made from it."""
    file = folder / "faults.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    known |= {test: [server, *count] for test, count in found.items()}
    # Tests that are no more.
    known = {test: row for test, row in sorted(known.items()) if (folder.parent / test.partition("::")[0]).exists()}
    rows = ",\n".join(f"{json.dumps(test)}: {json.dumps(row)}" for test, row in known.items())
    file.write_text(f"{{\n{rows}\n}}\n")
    (folder / "faults.md").write_text(markdown(known))


def markdown(known: Mapping[str, Sequence[Any]]) -> str:
    text = [HEAD]
    for server in sorted({row[0] for row in known.values()}):
        mine = {test: Count(*row[1:]) for test, row in known.items() if row[0] == server}
        text += [f"\n## Before {server}\n", "| family | survived | of | seconds | tests |", "|---|---|---|---|---|"]
        for count in families(mine).values():
            files = sorted({test.partition("::")[0] for test, row in mine.items() if row.family == count.family})
            places = ", ".join(f"[`{Path(f).name}`](../{f})" for f in files)
            text.append(f"| {count.family} | {count.survived} | {count.cases} | {count.seconds:.0f} | {places} |")
        lost = [f"- `{test}`: survived {c.survived} of {c.cases}" for test, c in mine.items() if c.survived < c.cases]
        text += ["\nNot survived:\n", *lost] if lost else []
    return "\n".join(text) + "\n"


HEAD = """# Faults, and how many of them were survived

Made by `make faults`; the rows of each test are in [faults.json](faults.json), and one that is run again replaces its
own. Seconds are those of two cores that had other work too.

    make faults                                     # all of it
    make faults ONLY=tests/faults/test_api_verbs.py # a part
    .venv/bin/python -m pytest tests/faults --case "retry, get jobs number 7: 404"    # one case, as a failure names it

A case of the operator's families is a whole life of a job (created, succeeded, failed, retried, suspended, resumed,
deleted, expired), driven by a scripted kubelet, with the operator's real process behind a proxy that fails on purpose.
It is survived where every object that is left, its status included, equals that of the run without a fault, and every
object was created and deleted as often as there. Minutes are seconds in it: pauses of watches and attempts, resyncs and
time-outs are shorter. Before a real control plane: `KUBEBUILDER_ASSETS=… make faults`.

`make test` tries a sample of the same cases."""
