"""Alerts and dashboards ask for nothing that the operator does not tell: by name, label and value; the docs list it."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import promql_parser as promql
import pytest
import yaml

from finetune_api.failures import Outcome, Reason
from finetune_operator.jobmetrics import DIRECTIONS
from finetune_operator.ledger import STARTUP
from finetune_operator.metrics import WATCHED, Metrics
from finetune_operator.sight import STATES
from support.scraped import BORN, everything

ROOT = Path(__file__).parents[2]
FILES = ROOT / "charts/finetune-operator/files"
TARGET = {"job", "instance", "namespace", "pod"}
"""Labels that Prometheus adds to all that it scrapes, by what it scrapes."""
VALUES: Mapping[str, set[str]] = {
    "state": set(STATES),
    "reason": {"", *map(str, Reason)},
    "outcome": set(get_args(Outcome)),
    "phase": set(STARTUP),
    "direction": set(DIRECTIONS),
    "kind": {*WATCHED, "NotYet"},
    "result": {"success", "error", "written", "failed", "dropped", "accepted", "allowed", "denied"},
}


class Query(NamedTuple):
    where: str
    text: str


def alerts() -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]:
        yield from group["rules"]


def queries() -> Iterator[Query]:
    for rule in alerts():
        yield Query(rule["alert"], rule["expr"])
    for path in sorted((FILES / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield Query(f"{path.stem}: {panel['title']}", target["expr"])


def plain(text: str) -> str:
    """With what Grafana would put in place of its variables."""
    return text.replace("$__rate_interval", "5m").replace("$__range", "6h").replace("$tenant", ".*")


def exported() -> dict[str, set[str]]:
    """Labels by name of a series."""
    metrics = Metrics(clock=lambda: BORN)
    everything(metrics)
    told: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            told.setdefault(sample.name, set()).update(sample.labels)
    return told


def nodes(text: str) -> list[promql.Expr]:
    found: list[promql.Expr] = []
    promql.walk(promql.parse(plain(text)), found.append)
    return found


def selectors(text: str) -> list[promql.VectorSelector]:
    return [node for node in nodes(text) if isinstance(node, promql.VectorSelector)]


def grouping(text: str) -> set[str]:
    """Labels of `by`, `without`, `on` and `ignoring`."""
    labels: set[str] = set()
    for node in nodes(text):
        modifier = getattr(node, "modifier", None)
        part = getattr(modifier, "matching", modifier) if isinstance(node, promql.BinaryExpr) else modifier
        labels.update(getattr(part, "labels", None) or ())
    return labels


def known_labels(text: str, told: Mapping[str, set[str]]) -> set[str]:
    return TARGET.union(*(told.get(selector.name, set()) for selector in selectors(text)))


@pytest.mark.parametrize("query", list(queries()), ids=lambda query: query.where)
def test_every_expression_asks_for_what_is_told(query: Query) -> None:
    told = exported()
    asked = selectors(query.text)
    assert asked, "it asks for no metric at all"
    for selector in asked:
        assert selector.name in told, f"{selector.name} is not exported"
        for matcher in selector.matchers.matchers:
            assert matcher.name in told[selector.name] | TARGET, f"{selector.name} has no label {matcher.name}"
            if matcher.name in VALUES:
                assert set(matcher.value.split("|")) <= VALUES[matcher.name], f"{matcher.name}={matcher.value}"
    assert grouping(query.text) <= known_labels(query.text, told)


def test_what_would_be_wrong_is_found() -> None:
    told = exported()
    assert [s.name for s in selectors("sum by (state) (increase(finetune_operator_jobz[5m]))")] == [
        "finetune_operator_jobz"
    ]
    assert grouping("sum by (team) (finetune_operator_jobs)") - known_labels("finetune_operator_jobs", told) == {"team"}
    assert grouping("a and on (x) b unless ignoring (y) c") == {"x", "y"}
    with pytest.raises(ValueError, match="unclosed"):
        promql.parse("sum by (state (finetune_operator_jobs)")


@pytest.mark.parametrize("rule", list(alerts()), ids=lambda rule: rule["alert"])
def test_every_alert_says_what_it_means_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    summary, description = (rule["annotations"][key] for key in ("summary", "description"))
    assert summary.endswith(".")
    assert len(description) > 60
    labels = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule)))
    assert labels <= known_labels(rule["expr"], exported())
    # Routed to the tenant by the label that Alertmanager's configurations match on.
    if "job_namespace" in labels:
        assert rule["labels"]["namespace"] == "{{ $labels.job_namespace }}"


def test_alerts_have_names_of_their_own() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))


def test_dashboards_are_made_of_their_list() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import dashboards
    finally:
        sys.path.pop(0)
    told = yaml.safe_load(dashboards.LIST.read_text())
    assert {path.stem for path in (FILES / "dashboards").glob("*.json")} == {one["name"] for one in told}
    for one in told:
        assert json.loads((FILES / f"dashboards/{one['name']}.json").read_text()) == dashboards.dashboard(one)


def test_panels_do_not_overlap() -> None:
    for path in (FILES / "dashboards").glob("*.json"):
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(path.read_text())["panels"]:
            place = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, panel["title"]
            assert place["x"] + place["w"] <= 24
            taken |= cells


def documented() -> dict[str, set[str]]:
    """Labels by name of a metric, as docs/observability.md says."""
    found: dict[str, set[str]] = {}
    text = (ROOT / "docs/observability.md").read_text().split("## Metrics")[1].split("## Alerts")[0]
    for line in text.splitlines():
        if line.startswith("| `"):
            names, labels, _ = (cell.strip() for cell in line.strip("|").split("|", 2))
            for name in re.findall(r"`(\w+)`", names):
                assert name not in found
                found[name] = {label.strip() for label in labels.split(",") if label.strip()}
    return found


def test_the_docs_list_every_metric_with_its_labels() -> None:
    metrics = Metrics(clock=lambda: BORN)
    everything(metrics)
    told: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        if name.startswith("finetune_operator_"):
            labels = set[str]().union(*(sample.labels for sample in family.samples))
            told[name.removeprefix("finetune_operator_")] = labels - {"le"}
    assert documented() == told


def test_the_docs_list_every_alert() -> None:
    text = (ROOT / "docs/observability.md").read_text().split("## Alerts")[1]
    assert re.findall(r"^\| (FineTune\w+) \|", text, re.MULTILINE) == [rule["alert"] for rule in alerts()]
