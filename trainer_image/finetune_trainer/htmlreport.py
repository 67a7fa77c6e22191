"""report.html: what a job has learned, on one page that needs nothing else. Pure functions.

`report.html.j2` is the page; here is what stands in it. Every text is escaped, whoever wrote it, and the page itself
forbids scripts and any request.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from finetune_api.failures import FineTuneError
from finetune_api.figures import Figure
from finetune_trainer import facts as told
from finetune_trainer.curves import overfitting
from finetune_trainer.evaluation.gates import check
from finetune_trainer.facts import Facts, Row
from finetune_trainer.methods.classify import per_class
from finetune_trainer.results import StageEnd
from finetune_trainer.svg import MARKED, SMALL, WIDE, Line, chart, legend, thinned
from finetune_trainer.usage import snippet

CARDS = 4
"""Figures at the top."""
CLASSES, LINES = 40, 24
"""Rows of the confusion matrix, and of a table of logged steps."""
PARTS = 400
"""Rows of datasets and slices."""
TOLD_ONCE = ("step", "loss", "eval_loss", "learning_rate", "grad_norm")


class Plot(NamedTuple):
    title: str
    drawing: Markup
    legend: Markup


def report(facts: Facts) -> str:
    """The whole page."""
    environment = Environment(
        loader=PackageLoader("finetune_trainer", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": told.number, "words": words, "share": _share}
    rows = told.results(facts.run.metrics)
    return environment.get_template("report.html.j2").render(
        facts=facts,
        about=told.what_it_is(facts),
        cards=_cards(rows),
        tables=[("", rows), *told.earlier_results(facts)],
        missed=missed(facts),
        groups=list(groups(facts.run.metrics)),
        forgetting=told.forgetting(facts.run.metrics),
        classes=classes(facts),
        courses=[
            {
                "name": stage.name,
                "settings": told.training_rows(facts, stage, course),
                "plots": list(plots(course, f"c{stage.number}")),
                "steps": steps(course),
                "noisy": len(course.history) > MARKED,
                "warning": overfitting(course.history),
                "mix": mix(course),
            }
            for stage, course in facts.trained
        ],
        samples=facts.evidence.samples,
        datasets=datasets(facts),
        data_head=told.DATA_HEAD,
        data_rows=[(stage.name, found) for stage in facts.stages if (found := told.data_rows(facts, stage))],
        dropped=told.dropped(facts),
        provenance=told.provenance_rows(facts),
        snippet=snippet(facts),
    )


def words(text: str) -> Markup:
    """Text of ours with code between back-ticks."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 and place < len(parts) - 1 else escape(part)
        for place, part in enumerate(parts)
    )


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "0"


def _cards(rows: Sequence[Row]) -> list[Row]:
    """One figure of a kind: the loss says what the perplexity says."""
    return [row for row in rows if row.after is not None and row.figure.base != "perplexity"][:CARDS]


def missed(facts: Facts) -> str | None:
    """What the result should have reached and has not; "" where it has; None where nothing was asked for."""
    evaluation = facts.config.spec.evaluation
    if not evaluation.gates and not evaluation.retention:
        return None
    try:
        check(evaluation, facts.run.metrics, [stage.name for stage in facts.stages if stage.name])
    except FineTuneError as error:
        return str(error)
    return ""


class Group(NamedTuple):
    """The figures of each dataset and slice on one split."""

    title: str
    columns: list[str]
    lines: list[tuple[str, str, list[Row | None]]]
    """Dataset, slice, and a figure for each column."""
    left_out: int


def groups(metrics: Mapping[str, float]) -> Iterator[Group]:
    rows = told.groups(metrics)
    for split in dict.fromkeys(row.figure.split for row in rows):
        own = {row.figure: row for row in rows if row.figure.split == split}
        bases = list(dict.fromkeys(figure.base for figure in own))
        places = sorted({(figure.dataset, figure.slice) for figure in own})
        lines = [
            (dataset, slice_, [own.get(Figure(base, split, False, dataset, slice_)) for base in bases])
            for dataset, slice_ in places[:PARTS]
        ]
        columns = [told.TITLES.get(base, base) for base in bases]
        yield Group(f"{split.capitalize()} data", columns, lines, max(0, len(places) - PARTS))


def classes(facts: Facts) -> dict[str, Any] | None:
    """The confusion matrix of the most frequent classes, and figures of all."""
    matrix, names = facts.evidence.confusion, facts.evidence.classes
    if not matrix or not names:
        return None
    shown = sorted(sorted(range(len(names)), key=lambda place: -sum(matrix[place]))[:CLASSES])
    return {
        "of": "test" if "testAccuracy" in facts.run.metrics else "validation",
        "names": [names[place] for place in shown],
        "rows": [
            (names[place], [matrix[place][other] for other in shown], max(1, sum(matrix[place]))) for place in shown
        ],
        "left_out": len(names) - len(shown),
        "figures": list(zip(names, per_class(matrix), strict=True)),
    }


def plots(course: StageEnd, key: str) -> Iterator[Plot]:
    """Loss, learning rate, gradient norm, then whatever else the method logs."""
    history = course.history
    further = dict.fromkeys(
        name.removeprefix("eval_") for entry in history for name in entry if name not in TOLD_ONCE and "." not in name
    )
    for name in ("loss", "learning_rate", "grad_norm", *further):
        lines = [
            Line("training", _points(history, name), exact=name == "learning_rate"),
            Line("validation", _points(history, f"eval_{name}"), marked=True),
        ]
        lines = [line for line in lines if line.points]
        title = _title(name)
        if len(lines) == 1:
            lines = [lines[0]._replace(name=title if lines[0].name == "training" else f"{title} (validation)")]
            title = lines[0].name
        drawing = chart(
            f"{key}-{re.sub('[^a-z0-9]', '-', name.lower())}", title, lines, WIDE if name == "loss" else SMALL
        )
        if drawing:
            yield Plot(title, drawing, legend(lines))


def _points(history: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[name]) for entry in history if name in entry and "step" in entry]


def _title(name: str) -> str:
    known = {"grad_norm": "Gradient norm", "kl": "KL from the model before", "f1": "F1"}
    return known.get(name, name.replace("_", " ").capitalize())


def steps(course: StageEnd) -> dict[str, Any]:
    """Some of the logged steps as a table: what the curves show, for those who cannot see them."""
    names = [name for name in dict.fromkeys(name for entry in course.history for name in entry) if "." not in name]
    places = thinned([(float(place), 0.0) for place in range(len(course.history))], LINES)
    return {
        "names": [_title(name) for name in names],
        "rows": [[_value(name, course.history[int(place)].get(name)) for name in names] for place, _ in places],
    }


def _value(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if name in ("step", "tokens_per_second") else told.number(value)


def mix(course: StageEnd) -> list[tuple[str, float, float]]:
    """Each dataset with the rows and the tokens that were learned of it; empty where there is one alone."""
    last = course.history[-1] if course.history else {}
    rows = {name.partition(".")[2]: count for name, count in last.items() if name.startswith("rows.")}
    return [(name, count, last.get(f"tokens.{name}", 0.0)) for name, count in rows.items()]


def datasets(facts: Facts) -> list[dict[str, Any]]:
    """What `prepare` reported of each dataset, made safe to show: it may be of another version."""
    found = []
    for stage in facts.stages:
        for dataset in facts.data.get(stage.name, {}).get("datasets", []):
            counts = [(cause, count, "left out") for cause, count in dataset.get("dropped", {}).items() if count]
            counts += [(cause, count, "kept") for cause, count in dataset.get("warned", {}).items() if count]
            train = dataset.get("splits", {}).get("train", {})
            found.append(
                {
                    "stage": stage.name,
                    "name": dataset.get("name", ""),
                    "format": dataset.get("format", ""),
                    "read": dataset.get("rowsRead", 0),
                    "causes": [(*found, dataset.get("cases", {}).get(found[0], [])) for found in counts],
                    "sample": dataset.get("sample", ""),
                    "lengths": [train.get(name) for name in ("shortest", "mean", "longest")] if train else [],
                    "verdicts": train.get("verdicts", {}),
                }
            )
    return found
