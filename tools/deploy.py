"""The chart with its defaults as plain YAML, for `kubectl apply -k deploy`: writes deploy/operator.yaml."""

from pathlib import Path
from typing import Any

import helm_python.chart as helm
import yaml

ROOT = Path(__file__).parents[1]
NAME, NAMESPACE = "finetune-operator", "finetune-system"
HEAD = "# Made by tools/deploy.py from charts/finetune-operator: `make generate`.\n"


class Plain(yaml.SafeDumper):
    """Without anchors: equal parts are written out."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def manifests() -> list[dict[str, Any]]:
    """What Helm would install, but for what says that Helm did."""
    with helm.Chart.load(ROOT / "charts" / NAME) as chart:
        files = chart.render(name=NAME, namespace=NAMESPACE)
    found = [
        document
        for path, text in sorted(files.items())
        if path.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]
    for document in found:
        _without_helm(document)
    return found


def _without_helm(value: Any) -> None:
    if isinstance(value, dict):
        if value.get("app.kubernetes.io/managed-by") == "Helm":
            del value["app.kubernetes.io/managed-by"]
        for child in value.values():
            _without_helm(child)
    elif isinstance(value, list):
        for child in value:
            _without_helm(child)


def main() -> None:
    text = yaml.dump_all(manifests(), Dumper=Plain, sort_keys=False, width=120)
    (ROOT / "deploy" / "operator.yaml").write_text(HEAD + text)


if __name__ == "__main__":
    main()
