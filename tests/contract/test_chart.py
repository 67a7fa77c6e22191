"""The chart renders to manifests that a strict API server takes, asks for no right on Secrets, and carries the CRDs."""

from pathlib import Path
from typing import Any

import helm_python.chart as helm
import kubernetes_validate
import pytest
import yaml
from helm_python.errors import HelmError

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "finetune-operator"
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "namespaces": {"watchNamespaces": ["team-a", "team-b"]},
    "digest": {"image": {"repository": "r/op", "digest": "sha256:" + "0" * 64}},
    "own certificate": {"progress": {"existingSecret": "mine", "port": 9443}},
    "placement": {
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-cluster-critical",
        "imagePullSecrets": [{"name": "pull"}],
        "serviceAccount": {"annotations": {"a": "b"}},
    },
    "profile": {"defaultProfile": {"create": True, "name": "default", "spec": {"image": "trainer@sha256:0"}}},
}


def render(values: dict[str, Any]) -> list[dict[str, Any]]:
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values=values, name="ft", namespace="finetune-system")
    documents = (yaml.safe_load_all(text) for path, text in files.items() if path.endswith(".yaml"))
    return [document for group in documents for document in group if document]


def of_kind(manifests: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def test_lint_finds_nothing() -> None:
    # 1 is information (there is no icon), 2 a warning, 3 an error.
    assert [message for message in helm.lint(CHART)["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("version", ["1.29", "1.33", "1.36"])
def test_every_variant_is_valid_on_every_version(values: dict[str, Any], version: str) -> None:
    manifests = render(values)
    assert manifests
    for manifest in manifests:
        if manifest["apiVersion"].split("/")[0] != "finetune.dev":
            kubernetes_validate.validate(manifest, version, strict=True)


def test_names_are_unique() -> None:
    for values in VARIANTS.values():
        names = [(m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]) for m in render(values)]
        assert len(names) == len(set(names))


def test_the_operator_has_no_right_on_secrets_and_no_wildcard() -> None:
    for values in VARIANTS.values():
        manifests = render(values)
        for role in of_kind(manifests, "ClusterRole") + of_kind(manifests, "Role"):
            for rule in role["rules"]:
                words = {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
                assert "*" not in words
                assert "secrets" not in words


def test_named_namespaces_get_bindings_of_their_own() -> None:
    manifests = render(VARIANTS["namespaces"])
    bindings = [b for b in of_kind(manifests, "RoleBinding") if b["roleRef"]["kind"] == "ClusterRole"]
    assert {b["metadata"]["namespace"] for b in bindings} == {"team-a", "team-b"}
    assert [b["roleRef"]["name"] for b in of_kind(manifests, "ClusterRoleBinding")] == ["ft-global"]


def test_pods_of_the_operator_are_restricted() -> None:
    (deployment,) = of_kind(render({}), "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}


def test_the_settings_are_the_operators() -> None:
    from finetune_operator.settings import PREFIX, Settings

    (deployment,) = of_kind(render(VARIANTS["namespaces"]), "Deployment")
    env = deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    settings = Settings.from_environment({entry["name"]: entry.get("value", "pod-a") for entry in env})
    assert settings.lease == "finetune-system/ft"
    (role,) = of_kind(render({}), "Role")
    assert {tuple(rule.get("resourceNames", ())) for rule in role["rules"]} == {(), ("ft",)}
    assert settings.namespaces == ("team-a", "team-b")
    assert settings.progress_url == "https://ft-progress.finetune-system.svc:8443"
    assert [entry["name"] for entry in env if not entry["name"].startswith(PREFIX)] == ["HOME"]


def test_the_certificate_is_for_the_service_and_kept() -> None:
    (secret,) = of_kind(render({}), "Secret")
    assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert set(secret["data"]) == {"tls.crt", "tls.key", "ca.crt"}
    assert of_kind(render(VARIANTS["own certificate"]), "Secret") == []


@pytest.mark.parametrize(
    "values",
    [{"nope": 1}, {"image": {"repository": "a", "digest": "latest"}}, {"logLevel": "LOUD"}, {"metrics": {"port": 0}}],
)
def test_bad_values_are_refused(values: dict[str, Any]) -> None:
    with helm.Chart.load(CHART) as chart, pytest.raises(HelmError):
        chart.validate_schema(values)


def test_the_chart_carries_the_generated_crds() -> None:
    for crd in (ROOT / "crds").glob("*.yaml"):
        assert (CHART / "crds" / crd.name).read_text() == crd.read_text()
