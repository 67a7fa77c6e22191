"""What a person reads of what was published: the model card and the figures it is drawn from. Pure functions."""

import json
from collections.abc import Callable, Mapping, Sequence

from finetune_api.stages import EffectiveStage
from finetune_trainer import facts as told
from finetune_trainer.curves import overfitting
from finetune_trainer.facts import Facts
from finetune_trainer.results import StageEnd
from finetune_trainer.usage import snippet

POINTS = 12
"""Rows of the loss table."""
MOST_EVALUATIONS = 30
"""Rows of the table of validation losses."""
GROUPS = 60
"""Rows of datasets and slices; the report has all."""
BARS = "▁▂▃▄▅▆▇█"
History = Sequence[Mapping[str, float]]
Part = Callable[[Facts, EffectiveStage, StageEnd], str]


def metrics_lines(history: History, metrics: Mapping[str, float]) -> str:
    """metrics.jsonl: one object per logged step, and a last one with the final figures."""
    return "".join(json.dumps(entry) + "\n" for entry in [*history, {"final": metrics}])


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """The values as one line of bars, lowest to highest; empty for fewer than two."""
    if len(values) < 2:
        return ""
    chosen = (
        [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)] if len(values) > width else values
    )
    low, high = min(chosen), max(chosen)
    return "".join(BARS[round((value - low) / ((high - low) or 1.0) * (len(BARS) - 1))] for value in chosen)


def model_card(facts: Facts) -> str:
    """README.md: where it comes from, how it was made, what it gained."""
    parts = [
        _front_matter(facts),
        f"# {facts.run.job}\n\n{told.what_it_is(facts)}",
        "## Results\n\n" + _results(facts),
        "## Use\n\n" + _use(facts),
        "## Data\n\n" + _data(facts),
        "## Training\n\n" + _of_stages(facts, _training),
        "## Loss\n\n" + _of_stages(facts, _loss),
        "## Provenance\n\n" + _table(["", ""], told.provenance_rows(facts)),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: Facts) -> str:
    # No licence: it depends on the base model's and the data's, which are not ours to state.
    words = [word for stage in facts.stages for word in (stage.spec.tuning.type, stage.spec.method.type)]
    fields = {
        "base_model": facts.run.base_model_uri,
        "library_name": "peft" if facts.kind == "Adapter" else "transformers",
        "pipeline_tag": "text-classification" if facts.scores else "text-generation",
        "tags": list(dict.fromkeys(word.lower() for word in words)),
    }
    return "---\n" + "\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items()) + "\n---"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """On one line, whatever a tenant called something."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if line.startswith("`") else line.replace("<", "&lt;")


def _results(facts: Facts) -> str:
    rows, metrics = told.results(facts.run.metrics), facts.run.metrics
    if not rows:
        return "No validation data was given, so nothing was evaluated."
    before = "Earlier adapter" if facts.stages[0].spec.base_model.adapter_uri else "Base model"
    if len(facts.stages) > 1:
        before = "Before the last stage"
    head = ["", before, "With this adapter" if facts.kind == "Adapter" else "This model"]
    text = _table(head, _figures(rows))
    for name, own in told.earlier_results(facts):
        text += f"\n\n### Stage {name}\n\n" + _table(["", "Before it", "After it"], _figures(own))
    if groups := told.groups(metrics):
        shown = [
            [row.figure.dataset, row.figure.slice, row.title, told.number(row.before), told.number(row.after)]
            for row in groups[:GROUPS]
        ]
        text += "\n\n### By dataset and slice\n\n" + _table(["Dataset", "Slice", *head], shown)
    if rows_of_stages := told.forgetting(metrics):
        kept = [[data, title, after, told.number(value)] for data, title, after, value in rows_of_stages]
        text += "\n\n### What each stage left of the ones before\n\n" + _table(["Data of", "", "After", ""], kept)
    return text


def _figures(rows: Sequence[told.Row]) -> told.Rows:
    return [[row.title, told.number(row.before), told.number(row.after)] for row in rows]


def _use(facts: Facts) -> str:
    more = ""
    if facts.kind == "Adapter" and facts.spec.output.merged:
        more = "\n\nThe folder `merged` is a whole model: it needs no peft and no base model."
    return f"```python\n{snippet(facts)}\n```{more}"


def _data(facts: Facts) -> str:
    parts = []
    for stage in facts.stages:
        if rows := told.data_rows(facts, stage):
            title = f"### {stage.name}\n\n" if stage.name else ""
            parts.append(title + _table(told.DATA_HEAD, rows))
    dropped = ", ".join(f"{count:,} {cause}" for cause, count in told.dropped(facts).items())
    return "\n\n".join([*parts, *([f"Left out: {dropped}."] if dropped else [])]) or "Nothing is known of the data."


def _of_stages(facts: Facts, part: Part) -> str:
    """One part for each stage, below its name where it has one."""
    return "\n\n".join(
        (f"### {stage.name}\n\n" if stage.name else "") + part(facts, stage, course) for stage, course in facts.trained
    )


def _training(facts: Facts, stage: EffectiveStage, course: StageEnd) -> str:
    text = _table(["", ""], told.training_rows(facts, stage, course))
    if rows := told.mix_rows(course):
        text += "\n\nWhat each dataset gave, as often as it was learned:\n\n" + _table(told.MIX_HEAD, rows)
    return text


def _loss(facts: Facts, stage: EffectiveStage, course: StageEnd) -> str:
    points = [(int(entry["step"]), entry["loss"]) for entry in course.history if "loss" in entry]
    if not points:
        return "Nothing was logged."
    count = min(POINTS, len(points))
    chosen = sorted({round(i * (len(points) - 1) / max(1, count - 1)) for i in range(count)})
    rows = [[f"{points[i][0]:,}", f"{points[i][1]:.4f}"] for i in chosen]
    line = sparkline([loss for _, loss in points])
    text = (f"`{line}`\n\n" if line else "") + _table(["Step", "Training loss"], rows)
    held = [[f"{int(e['step']):,}", f"{e['eval_loss']:.4f}"] for e in course.history if "eval_loss" in e]
    if held:
        # All of them, where they are few: the turn of the curve is what one looks for.
        text += "\n\n" + _table(["Step", "Validation loss"], held[:: -(-len(held) // MOST_EVALUATIONS)])
    warning = overfitting(course.history)
    return f"{text}\n\nOver-fitting: {warning}." if warning else text
