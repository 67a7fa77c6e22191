"""The matrix as a table that a person reads."""

from typing import Any

from support.matrix import METHODS, TUNINGS, ZEROS, Cell

HEAD = """\
# Every method with every tuning

`make matrix` runs each cell as a FineTuneJob through the sandbox: manifest, operator, `prepare`, gang, artifact in S3.
The model has 2 layers and 32 dimensions, the data are 120 rows made by code, a stage has 16 steps. A cell passes where
the job completes, its figure moves as it should on held-out data, every byte of the artifact is what its manifest says,
and what plain `peft` and `transformers` load from it prefers the right answers by more than the base model does. The
seconds are from `apply` to the end, {at_once}on {cores} cores, with the trainer imported before.

In a cell: the figure before -> after training. **–**: refused by `finetune lint`, with the reason below the tables.

"""


def markdown(cells: list[Cell], results: dict[str, Any]) -> str:
    import os

    text = HEAD.format(at_once="two jobs at a time ", cores=os.cpu_count())
    reasons: dict[str, int] = {}
    for workers in (1, 2):
        text += f"## {'One worker' if workers == 1 else 'Two workers (DDP)'}\n\n"
        rows = [[_cell(results, Cell(method, name, workers), reasons) for name in TUNINGS] for method in METHODS]
        text += _table(list(TUNINGS), rows)
    text += "## Two workers, each stage of ZeRO\n\n"
    rows = [[_cell(results, Cell(method, tuning, 2, stage), reasons) for tuning, stage in ZEROS] for method in METHODS]
    text += _table([f"{tuning}, {stage}" for tuning, stage in ZEROS], rows)
    if reasons:
        text += "## What is refused\n\n" + "".join(f"{number}. {why}\n" for why, number in reasons.items())
    times = [result["seconds"] for result in results.values() if "after" in result]
    if times:
        middle = sorted(times)[len(times) // 2]
        text += f"\n{len(times)} cells passed; the median job took {middle:.1f} s, all of them {sum(times):.0f} s.\n"
    return text


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| method (figure) |" + "".join(f" {name} |" for name in columns), "|---|" + "---|" * len(columns)]
    for (name, method), row in zip(METHODS.items(), rows, strict=True):
        lines.append(f"| {name} ({method.figure}) |" + "".join(f" {entry} |" for entry in row))
    return "\n".join(lines) + "\n\n"


def _cell(results: dict[str, Any], cell: Cell, reasons: dict[str, int]) -> str:
    result = results.get(cell.name)
    if result is None:
        return ""
    if "refused" in result:
        return f"– ({reasons.setdefault(result['refused'], len(reasons) + 1)})"
    if "problem" in result:
        return f"**failed**: {result['problem'][:120].replace('|', '/')}"
    return f"{result['before']:.3g} -> {result['after']:.3g}, {result['seconds']:.0f} s"
