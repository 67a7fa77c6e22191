"""Every method × tuning × number of workers as a real job of the sandbox, and each method under each stage of ZeRO.

    python benchmarks/matrix/run.py                  # what results.json does not have yet
    python benchmarks/matrix/run.py --only 'dpo-*'   # jobs by name, also those that are there
    python benchmarks/matrix/run.py --again          # all of it

The table is tests/support/matrix.py; results.json and results.md beside this file are written after each cell.
"""

import argparse
import fnmatch
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "tests"), str(HERE)]

import report  # noqa: E402

from support import matrix, runner  # noqa: E402
from support.matrix import Cell  # noqa: E402
from support.runner import Ended, Runner  # noqa: E402

RESULTS = HERE / "results.json"


def main(arguments: argparse.Namespace) -> int:
    cells = matrix.table()
    # What is no longer in the table is no longer true.
    known = {} if arguments.again or not RESULTS.exists() else json.loads(RESULTS.read_text())
    results = {cell.name: known[cell.name] for cell in cells if cell.name in known}
    wanted = [cell for cell in cells if chosen(cell, arguments.only, results)]
    refused = {cell.name: cell.refusal() for cell in wanted}
    results |= {name: {"refused": why} for name, why in refused.items() if why}
    write(cells, results)
    wanted = [cell for cell in wanted if not refused[cell.name]]
    print(f"{len(wanted)} of {len(cells)} cells to run, {sum('refused' in r for r in results.values())} are refused")
    start = time.monotonic()
    if wanted:
        with (
            tempfile.TemporaryDirectory(prefix="matrix-") as directory,
            runner.running(Path(directory), arguments.at_once) as laptop,
        ):
            run(laptop, cells, wanted, results)
    failed = [name for name, result in results.items() if result.get("problem")]
    print(f"{time.monotonic() - start:.0f} s; {len(failed)} cells failed", *failed, sep="\n  ")
    return 1 if failed else 0


def chosen(cell: Cell, patterns: list[str], results: dict[str, Any]) -> bool:
    """Asked for by name; or not known, failed or refused the last time."""
    if patterns:
        return any(fnmatch.fnmatch(cell.name, pattern) for pattern in patterns)
    return "after" not in results.get(cell.name, {})


def run(laptop: Runner, cells: list[Cell], wanted: list[Cell], results: dict[str, Any]) -> None:
    by_name = {cell.name: cell for cell in wanted}

    def done(name: str, ended: Ended) -> None:
        if name not in by_name:
            return
        cell = by_name[name]
        results[name] = figures(cell, ended, laptop.check(cell, ended))
        shown = results[name].get("problem") or "{before:.3f} -> {after:.3f}".format(**results[name])
        print(f"{ended.seconds:5.1f} s  {name}  {shown}", flush=True)
        write(cells, results)

    laptop.run([cell.manifest() for cell in wanted if not cell.needs_reward_model], done)
    if judged := [cell for cell in wanted if cell.needs_reward_model]:
        uri = laptop.reward_model()
        laptop.run([cell.manifest(reward_model=uri) for cell in judged], done)


def figures(cell: Cell, ended: Ended, problem: str) -> dict[str, Any]:
    if problem:
        return {"problem": problem, "seconds": round(ended.seconds, 1)}
    stage, slash, figure = cell.lesson.figure.rpartition("/")
    before, after = (ended.metrics[f"{stage}{slash}{name}"] for name in (f"{figure}Before", figure))
    return {"before": round(before, 4), "after": round(after, 4), "seconds": round(ended.seconds, 1)}


def write(cells: list[Cell], results: dict[str, Any]) -> None:
    ordered = {cell.name: results[cell.name] for cell in cells if cell.name in results}
    RESULTS.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    RESULTS.with_suffix(".md").write_text(report.markdown(cells, ordered))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="names of jobs, with * and ?")
    parser.add_argument("--again", action="store_true", help="forget the results that are there")
    parser.add_argument("--at-once", type=int, default=2, help="jobs at a time")
    sys.exit(main(parser.parse_args()))
