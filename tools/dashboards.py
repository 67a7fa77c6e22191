"""Writes the chart's Grafana dashboards from the list of their panels beside it: `python tools/dashboards.py`."""

import json
from pathlib import Path
from typing import Any

import yaml

LIST = Path(__file__).with_suffix(".yaml")
FOLDER = Path(__file__).parents[1] / "charts/finetune-operator/files/dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
TENANT = 'job_namespace=~"$tenant"'
LABELS = ("job_namespace", "job_name", "state", "reason", "outcome", "phase", "direction", "result", "kind", "verb")
"""In the order in which a legend names them."""
FURTHER = ("resource", "code", "instance", "profile", "version", "where")
Row = dict[str, Any]


def legend(expression: str) -> str:
    """The labels that the outermost `by` leaves, as Grafana's legend template."""
    _, by, rest = expression.partition(" by (")
    kept = [label.strip() for label in rest.partition(")")[0].split(",")] if by else []
    return " ".join(f"{{{{{label}}}}}" for label in (*LABELS, *FURTHER) if label in kept)


def targets(row: Row, *, instant: bool, table: bool) -> list[Row]:
    told = row["expr"] if isinstance(row["expr"], dict) else {legend(row["expr"]): row["expr"]}
    return [
        {
            "refId": chr(ord("A") + index),
            "datasource": SOURCE,
            "expr": expression.replace("$TENANT", TENANT),
            "legendFormat": name,
            "instant": instant,
            "range": not instant,
            **({"format": "table"} if table else {}),
        }
        for index, (name, expression) in enumerate(told.items())
    ]


def panel(number: int, row: Row, x: int, y: int) -> Row:
    kind = row.get("kind", "timeseries")
    table = kind == "table"
    stacking = {"custom": {"stacking": {"mode": "normal"}, "fillOpacity": 30}} if row.get("stacked") else {}
    return {
        "id": number,
        "type": kind,
        "title": row["title"],
        "description": row.get("text", ""),
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": row.get("width", 8), "h": 4 if kind == "stat" else 8},
        "fieldConfig": {"defaults": {"unit": row.get("unit", "short"), **stacking}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}} if kind == "timeseries" else {},
        "targets": targets(row, instant=kind != "timeseries", table=table),
        "transformations": [{"id": "organize", "options": {"excludeByName": {"Time": True}}}] if table else [],
    }


def laid_out(rows: list[Row]) -> list[Row]:
    """From left to right, in lines of 24."""
    panels: list[Row] = []
    x = y = 0
    for number, row in enumerate(rows, start=1):
        width = row.get("width", 8)
        if x + width > 24:
            x, y = 0, y + panels[-1]["gridPos"]["h"]
        panels.append(panel(number, row, x, y))
        x += width
    return panels


def variables(rows: list[Row]) -> list[Row]:
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    if "$TENANT" not in json.dumps(rows):
        return [source]
    tenant = {
        "name": "tenant",
        "label": "Namespace",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": "label_values(finetune_operator_namespace_jobs, job_namespace)", "refId": "tenant"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
    return [source, tenant]


def dashboard(told: Row) -> Row:
    tag = "finetune-operator"
    return {
        "uid": told["uid"],
        "title": told["title"],
        "tags": [tag],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "utc",
        "templating": {"list": variables(told["panels"])},
        "annotations": {"list": []},
        "links": [{"type": "dashboards", "tags": [tag], "title": "Fine-tuning", "asDropdown": True}],
        "panels": laid_out(told["panels"]),
    }


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for told in yaml.safe_load(LIST.read_text()):
        (FOLDER / f"{told['name']}.json").write_text(json.dumps(dashboard(told), indent=1) + "\n")


if __name__ == "__main__":
    main()
