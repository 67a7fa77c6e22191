"""report.html: valid, alone in the world, and nothing that a tenant wrote becomes markup."""

import math
import re
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinyhtml5.parser import HTMLParser

from finetune_trainer.evaluation.samples import Sample
from finetune_trainer.htmlreport import report
from finetune_trainer.svg import Line, chart, label, smoothed, thinned, ticks
from support.telling import make_data_report, make_facts, make_history

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"' {{ 7 * 7 }} &amp;"
STAGES = [
    {"name": "sft", "datasets": [{"name": "pairs", "uri": "s3://bucket/data/pairs.jsonl"}]},
    {
        "name": "dpo",
        "method": {"type": "DPO"},
        "datasets": [{"name": "ranked", "uri": "s3://bucket/data/ranked.jsonl"}],
    },
]


def make_sample(text: str = "text", before: str | None = "before") -> Sample:
    return Sample(split="validation", dataset="pairs", prompt=text, reference=text, before=before, after=text)


def parse(page: str) -> Element:
    """The page's tree by the rules of the HTML standard, whose every departure is an error."""
    parser = HTMLParser(namespace_html_elements=False)
    tree = parser.parse(page)
    assert parser.errors == []
    return tree


def texts(tree: Element, tag: str) -> list[str]:
    return ["".join(found.itertext()).strip() for found in tree.iter(tag)]


def bare(tree: Element) -> Iterator[tuple[str, Element]]:
    """Every element with its name without a namespace."""
    for element in tree.iter():
        if isinstance(element.tag, str):
            yield element.tag.rpartition("}")[2], element


def history() -> list[dict[str, float]]:
    lines = [entry | {"reward_margin": 0.1, "rows.a": 3.0, "rows.b": 1.0, "tokens.a": 30.0} for entry in make_history()]
    for entry in lines[9::10]:
        entry["eval_loss"] = 2.0
    return lines


PAGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "nothing": {"metrics": {}, "history": [], "data": {}},
    "stages": {"stages": STAGES, "metrics": {"rewardMargin": 1.0, "sft/evalLoss": 2.0, "sft/evalLoss@dpo": 2.5}},
    "classes": {
        "metrics": {"accuracy": 0.9, "accuracyBefore": 0.5, "accuracy.pairs.de": 0.8},
        "datasets": [{"name": "pairs", "uri": "s3://bucket/data/pairs.jsonl", "format": "Labelled"}],
        "classes": ["ham", "spam"],
        "confusion": [[8, 2], [0, 0]],
        "history": history(),
        "samples": [make_sample(), make_sample(before=None)],
        "evaluation": {"gates": [{"metric": "accuracy", "operator": "AtLeast", "value": 0.5}]},
    },
    "numbers that are none": {
        "metrics": {"evalLoss": math.nan, "evalLossBefore": math.inf},
        "history": [{"step": 1.0, "loss": math.nan}, {"step": 2.0, "loss": math.inf}, {"step": 3.0, "loss": 1.0}],
    },
    "whole model": {"kind": "Model", "tuning": {"type": "Full"}},
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_valid_and_stands_alone(name: str) -> None:
    page = report(make_facts(**PAGES[name]))
    tree = parse(page)
    elements = list(bare(tree))
    names = {name for name, _ in elements}
    assert not names & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "image",
        "use",
        "foreignObject",
    }
    for _, element in elements:
        for attribute, value in element.attrib.items():
            assert not attribute.lower().startswith("on")
            assert attribute not in ("src", "srcset", "action", "data")
            assert attribute.rpartition("}")[2] != "href" or value.startswith("#")
    assert not re.search(r"url\(|@import|https?://", page)
    ids = [element.attrib["id"] for _, element in elements if "id" in element.attrib]
    assert len(set(ids)) == len(ids)
    for _, element in elements:
        for wanted in (element.attrib.get("aria-labelledby", ""), element.attrib.get("href", "").removeprefix("#")):
            assert set(wanted.split()) <= set(ids)


@pytest.mark.parametrize("name", PAGES)
def test_tables_have_heads_and_drawings_have_words(name: str) -> None:
    tree = parse(report(make_facts(**PAGES[name])))
    for _, head in (item for item in bare(tree) if item[0] == "th"):
        assert head.attrib["scope"] in ("row", "col")
    for _, drawing in (item for item in bare(tree) if item[0] == "svg"):
        assert [child.tag.rpartition("}")[2] for child in drawing][:2] == ["title", "desc"]
        assert all("".join(child.itertext()) for child in list(drawing)[:2])


def test_what_a_tenant_wrote_stays_text() -> None:
    dataset = {"cases": {"duplicates": [HOSTILE]}, "sample": HOSTILE, "format": HOSTILE, "dropped": {HOSTILE: 3}}
    train = {"train": {"examples": 1, "tokens": 2, "verdicts": {HOSTILE: 1}}}
    facts = make_facts(
        {"accuracy": 0.5, f"accuracy.pairs.{HOSTILE}": 0.5},
        [{"step": 1.0, "loss": 1.0, f"rows.{HOSTILE}": 1.0, HOSTILE.replace(".", ""): 1.0}],
        data={"": make_data_report(**dataset, splits=train)},
        classes=[HOSTILE, "b"],
        confusion=[[1, 0], [0, 1]],
        samples=[make_sample(HOSTILE, HOSTILE)],
        baseModel={"uri": "s3://bucket/models/tiny/"},
    )
    page = report(facts)
    tree = parse(page)
    assert "script" not in {name for name, _ in bare(tree)}
    assert "img" not in {name for name, _ in bare(tree)}
    shown = "".join(tree.itertext())
    # Prompt, reference, two answers, slice, class in three tables, a case, a sample, a cause, a format, a verdict …
    assert shown.count(HOSTILE) >= 12
    assert "49" not in texts(tree, "p")


def test_what_it_says() -> None:
    tree = parse(report(make_facts(**PAGES["classes"])))
    assert texts(tree, "h1") == ["bot"]
    rows = texts(tree, "tr")
    assert any(row.startswith("Validation accuracy") and "0.5000" in row and "better" in row for row in rows)
    assert any(row.startswith("pairsde") and "0.8000" in row for row in rows)
    assert any(row.startswith("ham") and "0.8889" in row for row in rows)
    assert "a 75.0 %, b 25.0 %" in [e.attrib.get("aria-label") for _, e in bare(tree)]
    assert "All that spec.evaluation asks for was reached." in texts(tree, "p")
    assert "AutoModelForSequenceClassification" in texts(tree, "pre")[-1]


def test_a_gate_that_is_not_met_stands_at_the_top() -> None:
    gates = {"gates": [{"metric": "accuracy", "operator": "AtLeast", "value": 0.95}]}
    page = report(make_facts({"accuracy": 0.9}, evaluation=gates))
    assert "accuracy is 0.9; at least 0.95 is wanted" in page


def test_every_stage_has_its_curves_and_its_figures() -> None:
    tree = parse(report(make_facts(**PAGES["stages"])))
    assert texts(tree, "h3").count("Stage sft") == 4
    assert {"c0-loss-t", "c1-loss-t"} <= {e.attrib["id"] for _, e in bare(tree) if "id" in e.attrib}


finite = st.floats(-1e12, 1e12, allow_subnormal=False)


@given(finite, finite)
def test_ticks_are_few_round_and_hold_what_is_drawn(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    if high - low < 1e-9 * max(abs(low), abs(high)):
        high = low
    found = ticks(low, high)
    assert 2 <= len(found) <= 9
    assert found == sorted(set(found))
    step = found[1] - found[0]
    assert found[0] <= low + 1e-6 * step
    assert found[-1] >= high - 1e-6 * step


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.25, "0.25"), (12000, "12,000"), (2e-4, "2e-4"), (1.5e-5, "1.5e-5"), (3e6, "3e6")]
)
def test_labels_are_short(value: float, text: str) -> None:
    assert label(value) == text


def test_a_long_line_keeps_its_ends_and_its_mean() -> None:
    points = [(float(i), float(i % 2)) for i in range(1000)]
    few = thinned(points, 100)
    assert (len(few), few[0], few[-1]) == (100, points[0], points[-1])
    assert all(0.3 < y < 0.7 for _, y in smoothed(points, 50))


def test_nothing_to_draw_is_no_drawing() -> None:
    assert chart("k", "t", [Line("a", [(1.0, math.nan)])]) == ""
