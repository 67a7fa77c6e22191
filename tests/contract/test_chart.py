"""The chart renders to manifests that strict API servers take, asks for no right on Secrets, and carries the CRDs."""

import itertools
import json
import re
from datetime import timedelta
from typing import Any

import helm_python.chart as helm
import kubernetes_validate
import pytest
from helm_python.errors import HelmError

from finetune_operator.settings import PREFIX, Settings
from support.charting import CHART, RELEASE, ROOT, of_kind, render, rules_of

ANYTHING = {
    "digest": {"image": {"repository": "r/op", "digest": "sha256:" + "0" * 64}},
    "placement": {
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-cluster-critical",
        "imagePullSecrets": [{"name": "pull"}],
        "serviceAccount": {"annotations": {"a": "b"}},
    },
    "accounts": {"admission": {"policies": {"serviceAccounts": ["tuner", "irsa"], "controllers": []}}},
    "profile": {"defaultProfile": {"create": True, "name": "default", "spec": {"image": "trainer@sha256:0"}}},
    "issuer": {"certificates": {"source": "CertManager", "issuerRef": {"name": "corp", "kind": "ClusterIssuer"}}},
    "ports": {"progress": {"port": 9001}, "admission": {"webhook": {"port": 9002}}, "metrics": {"port": 9003}},
    "scrapers": {"networkPolicy": {"enabled": True, "metricsFrom": [{"podSelector": {}}], "apiServerPorts": [6443]}},
    "API server": {"networkPolicy": {"enabled": True, "webhookFrom": [{"ipBlock": {"cidr": "10.0.0.0/28"}}]}},
    "open metrics": {"metrics": {"authentication": False, "serviceMonitor": {"enabled": True}}},
    "a scraper's Secret": {
        "metrics": {"podMonitor": {"enabled": True, "bearerTokenSecret": {"name": "prometheus", "key": "token"}}}
    },
    "signing": {"signing": {"existingSecret": "key"}},
    "client certificate": {"admission": {"webhook": {"clientCertificate": {"configMap": "c", "names": ["a"]}}}},
    "five": {"replicas": 5, "podDisruptionBudget": {"minAvailable": 4}},
    "no budget": {"podDisruptionBudget": {"enabled": False}},
}
SOURCES = ("Job", "CertManager", "Secret")
OURS = ("finetune.dev", "cert-manager.io", "monitoring.coreos.com")
"""Groups that are no part of Kubernetes."""
NEEDS = {"ValidatingAdmissionPolicy": (1, 30), "ValidatingAdmissionPolicyBinding": (1, 30)}


def switched(
    namespaces: bool, replicas: int, source: str, policies: bool, webhook: bool, network: bool
) -> dict[str, Any]:
    existing = "mine" if source == "Secret" else ""
    return {
        "watchNamespaces": ["team-a", "team-b"] if namespaces else [],
        "replicas": replicas,
        "certificates": {"source": source, "existingSecret": existing},
        "admission": {"policies": {"enabled": policies}, "webhook": {"enabled": webhook, "caBundle": "QQ=="}},
        "networkPolicy": {"enabled": network},
    }


def monitored(*on: bool) -> dict[str, Any]:
    parts = ("serviceMonitor", "podMonitor", "prometheusRule", "dashboards")
    return {"metrics": {part: {"enabled": flag, "labels": {"team": "x"}} for part, flag in zip(parts, on, strict=True)}}


BOTH = (False, True)
VARIANTS: list[dict[str, Any]] = [
    {},
    *ANYTHING.values(),
    *(switched(*choice) for choice in itertools.product(BOTH, (1, 2), SOURCES, BOTH, BOTH, BOTH)),
    *(monitored(*choice) for choice in itertools.product(BOTH, repeat=4)),
]


def test_lint_finds_nothing() -> None:
    # 1 is information (there is no icon), 2 a warning, 3 an error.
    assert [message for message in helm.lint(CHART)["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_every_permutation_is_valid_on_the_oldest_and_the_newest(version: str) -> None:
    """Each manifest once: many permutations share most of them."""
    seen = set()
    for values in VARIANTS:
        for manifest in render(values):
            text = json.dumps(manifest, sort_keys=True)
            foreign = manifest["apiVersion"].split("/")[0] in OURS
            if text in seen or foreign or NEEDS.get(manifest["kind"], (1, 29)) > tuple(map(int, version.split("."))):
                continue
            seen.add(text)
            kubernetes_validate.validate(manifest, version, strict=True)
    assert len(seen) > 40


def test_names_are_unique() -> None:
    for values in VARIANTS:
        names = [(m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]) for m in render(values)]
        assert len(names) == len(set(names)), values


def test_what_manifests_name_is_in_the_release() -> None:
    for values in VARIANTS:
        manifests = render(values)
        accounts = {account["metadata"]["name"] for account in of_kind(manifests, "ServiceAccount")}
        for pod in pods(manifests):
            assert pod["spec"]["serviceAccountName"] in accounts
        for binding in of_kind(manifests, "RoleBinding") + of_kind(manifests, "ClusterRoleBinding"):
            assert {subject["name"] for subject in binding["subjects"]} <= accounts
            role = binding["roleRef"]
            assert role["name"] in {r["metadata"]["name"] for r in of_kind(manifests, role["kind"])}
        (deployment,) = of_kind(manifests, "Deployment")
        ports = {port["name"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
        services = of_kind(manifests, "Service")
        assert {port["targetPort"] for service in services for port in service["spec"]["ports"]} <= ports
        for webhook in webhooks(manifests):
            ref = webhook["clientConfig"]["service"]
            (service,) = (s for s in services if s["metadata"]["name"] == ref["name"])
            assert service["spec"]["ports"][0]["port"] == ref["port"]
        policies = {policy["metadata"]["name"] for policy in of_kind(manifests, "ValidatingAdmissionPolicy")}
        bound = [b["spec"]["policyName"] for b in of_kind(manifests, "ValidatingAdmissionPolicyBinding")]
        assert sorted(bound) == sorted(policies)


def pods(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pod template of every workload."""
    found = [w["spec"]["template"] for kind in ("Deployment", "Job") for w in of_kind(manifests, kind)]
    return found + [c["spec"]["jobTemplate"]["spec"]["template"] for c in of_kind(manifests, "CronJob")]


def webhooks(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [w for c in of_kind(manifests, "ValidatingWebhookConfiguration") for w in c["webhooks"]]


def test_the_operator_has_no_right_on_secrets_and_nobody_a_wildcard() -> None:
    for values in VARIANTS:
        manifests = render(values)
        for role in of_kind(manifests, "ClusterRole") + of_kind(manifests, "Role"):
            assert "*" not in {word for rule in role["rules"] for key in rule for word in rule[key]}
        words = {word for _, rule in rules_of(manifests, RELEASE) for word in rule["resources"]}
        assert {"finetunejobs", "pods"} <= words
        assert "secrets" not in words
        assert not any("webhook" in word for word in words)


def test_the_certificates_account_sees_one_secret_and_one_webhook() -> None:
    rules = list(rules_of(render(), "ft-certificates"))
    for where, rule in rules:
        assert where == "finetune-system" or rule["resources"] == ["validatingwebhookconfigurations"]
        assert rule["verbs"] == ["create"] or rule["resourceNames"] in (["ft-tls", "ft-webhook"], ["ft"])
    assert {(*rule["resources"], *rule["verbs"]) for _, rule in rules} == {
        ("secrets", "create"),
        ("secrets", "get", "update"),
        ("validatingwebhookconfigurations", "get", "update"),
    }


def test_named_namespaces_get_bindings_of_their_own() -> None:
    manifests = render({"watchNamespaces": ["team-a", "team-b"]})
    bindings = [b for b in of_kind(manifests, "RoleBinding") if b["roleRef"]["kind"] == "ClusterRole"]
    assert {b["metadata"]["namespace"] for b in bindings} == {"team-a", "team-b"}
    cluster = [b["roleRef"]["name"] for b in of_kind(manifests, "ClusterRoleBinding")]
    assert cluster == ["ft-certificates", "ft-global"]
    for where in (*webhooks(manifests)[:1], *bound(manifests)):
        (term,) = where["namespaceSelector"]["matchExpressions"]
        name, values = "kubernetes.io/metadata.name", ["team-a", "team-b"]
        assert term == {"key": name, "operator": "In", "values": values}


def test_system_namespaces_and_the_releases_own_have_no_jobs() -> None:
    system = ["kube-system", "kube-public", "kube-node-lease"]
    for values, excluded in (
        ({}, [*system, "finetune-system"]),
        ({"excludeNamespaces": ["ops"]}, ["ops", "finetune-system"]),
    ):
        manifests = render(values)
        for where in (*webhooks(manifests)[:1], *bound(manifests)):
            (term,) = where["namespaceSelector"]["matchExpressions"]
            assert term == {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": excluded}
        assert settings_of(manifests).excluded_namespaces == tuple(excluded)
    own = render({"watchNamespaces": ["finetune-system"]})
    assert settings_of(own).excluded_namespaces == tuple(system)
    with pytest.raises(HelmError, match="found kube-public in both"):
        render({"watchNamespaces": ["kube-public"]})


def bound(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where policies hold, but for those on the operator's own account, which hold everywhere."""
    found = {b["metadata"]["name"]: b["spec"] for b in of_kind(manifests, "ValidatingAdmissionPolicyBinding")}
    assert {name for name, spec in found.items() if "matchResources" not in spec} == {
        "ft-operator",
        "ft-operator-accounts",
        "ft-operator-jobs",
    }
    return [spec["matchResources"] for spec in found.values() if "matchResources" in spec]


def settings_of(manifests: list[dict[str, Any]]) -> Settings:
    (deployment,) = of_kind(manifests, "Deployment")
    env = deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    return Settings.from_environment({entry["name"]: entry.get("value", "pod-a") for entry in env})


def test_every_pod_is_restricted() -> None:
    for values in VARIANTS:
        for pod in pods(render(values)):
            assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
            assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["spec"]["containers"]:
                own = container["securityContext"]
                assert own["allowPrivilegeEscalation"] is False
                assert own["readOnlyRootFilesystem"] is True
                assert own["capabilities"] == {"drop": ["ALL"]}


def test_the_settings_are_the_operators() -> None:
    (deployment,) = of_kind(render({"watchNamespaces": ["team-a", "team-b"]}), "Deployment")
    env = deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    settings = Settings.from_environment({entry["name"]: entry.get("value", "pod-a") for entry in env})
    assert settings.lease == "finetune-system/ft"
    (lease,) = (role for role in of_kind(render(), "Role") if role["metadata"]["name"] == "ft-lease")
    assert {tuple(rule.get("resourceNames", ())) for rule in lease["rules"]} == {(), ("ft",)}
    assert settings.namespaces == ("team-a", "team-b")
    assert settings.progress_url == "https://ft-progress.finetune-system.svc:8443"
    assert settings.admission_port == 9443
    assert [entry["name"] for entry in env if not entry["name"].startswith(PREFIX)] == ["HOME"]


def test_the_certificate_is_for_both_services_and_the_pods_do_not_get_the_authoritys_key() -> None:
    for source in SOURCES:
        manifests = render(switched(False, 2, source, True, True, False))
        (deployment,) = of_kind(manifests, "Deployment")
        (volume,) = (v["secret"] for v in deployment["spec"]["template"]["spec"]["volumes"] if v["name"] == "tls")
        assert volume["secretName"] == ("mine" if source == "Secret" else "ft-tls")
        assert [item["key"] for item in volume["items"]] == ["tls.crt", "tls.key", "ca.crt"]
        names = {f"{service['metadata']['name']}.finetune-system.svc" for service in of_kind(manifests, "Service")}
        if source == "Job":
            (job,) = of_kind(manifests, "Job")
            arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
            assert names <= {a.removeprefix("--host=") for a in arguments}
            assert {"--namespace=finetune-system", "--certificate=ft-tls"} <= set(arguments)
        if source == "CertManager":
            assert names <= set(certificate(manifests)["spec"]["dnsNames"])
            assert certificate(manifests)["spec"]["secretName"] == "ft-tls"
            (configuration,) = of_kind(manifests, "ValidatingWebhookConfiguration")
            assert configuration["metadata"]["annotations"] == {"cert-manager.io/inject-ca-from": "finetune-system/ft"}


def test_the_webhooks_path_is_in_a_secret_that_every_source_keeps_and_in_no_manifest() -> None:
    for source in SOURCES:
        manifests = render(switched(False, 2, source, True, True, False))
        # What is not in the release is not taken back by an upgrade.
        assert all("path" not in webhook["clientConfig"]["service"] for webhook in webhooks(manifests))
        for pod in pods(manifests)[1:]:
            (container,) = pod["spec"]["containers"]
            assert {"--webhook=ft", "--paths=ft-webhook"} <= set(container["args"])
            assert ("--certificate=ft-tls" in container["args"]) == (source == "Job")
        (deployment,) = of_kind(manifests, "Deployment")
        volumes = {v["name"]: v.get("secret") for v in deployment["spec"]["template"]["spec"]["volumes"]}
        assert volumes["webhook"]["secretName"] == "ft-webhook"
        names = [name for _, rule in rules_of(manifests, "ft-certificates") for name in rule.get("resourceNames", ())]
        assert set(names) == {"ft", "ft-webhook", *(["ft-tls"] if source == "Job" else [])}
    # Where there is nothing to keep, nobody may write a Secret.
    assert of_kind(render(switched(False, 2, "CertManager", True, False, False)), "CronJob") == []


def test_the_path_takes_its_steps_by_the_schedule() -> None:
    """Each run waits until all have seen the one before; an hour is longer than a path has no successor."""
    from finetune_operator.webhook_paths import LIFETIME, SETTLED

    (cron,) = of_kind(render(), "CronJob")
    assert re.fullmatch(r"\d+ \* \* \* \*", cron["spec"]["schedule"]), "hourly"
    assert SETTLED < LIFETIME < timedelta(hours=1)


def test_a_client_certificate_is_asked_for_where_its_authority_is_named() -> None:
    from finetune_operator.settings import Settings

    given = {"configMap": "api-client", "key": "bundle.pem", "names": ["kube-apiserver", "webhooks"]}
    (deployment,) = of_kind(render({"admission": {"webhook": {"clientCertificate": given}}}), "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = Settings.from_environment({e["name"]: e.get("value", "pod-a") for e in container["env"]})
    assert settings.admission_client_names == ("kube-apiserver", "webhooks")
    (volume,) = (v["configMap"] for v in pod["volumes"] if "configMap" in v)
    assert volume == {"name": "api-client", "items": [{"key": "bundle.pem", "path": "ca.crt"}]}
    places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert places[str(settings.admission_client_ca.parent)] == "webhook-clients"  # type: ignore[union-attr]
    assert places[str(settings.admission_paths.parent)] == "webhook"  # type: ignore[union-attr]


def certificate(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (c for c in of_kind(manifests, "Certificate") if not c["spec"].get("isCA"))
    return found


def test_an_issuer_of_the_clusters_is_used_where_it_is_named() -> None:
    manifests = render(ANYTHING["issuer"])
    assert of_kind(manifests, "Issuer") == []
    assert certificate(manifests)["spec"]["issuerRef"] == {"name": "corp", "kind": "ClusterIssuer"}


def test_the_job_of_the_certificates_is_made_again_only_where_it_differs() -> None:
    names = {
        job["metadata"]["name"] for values in ({}, {"logLevel": "DEBUG"}) for job in of_kind(render(values), "Job")
    }
    assert len(names) == 1
    (other,) = of_kind(render(ANYTHING["digest"]), "Job")
    assert other["metadata"]["name"] not in names
    (long,) = of_kind(render(name="a" * 53), "Job")
    # The host name of its pod is `<name>-0`.
    assert len(long["metadata"]["name"]) <= 61


def test_the_webhook_fails_closed_and_never_on_deletion() -> None:
    for values in VARIANTS:
        for webhook in webhooks(render(values)):
            assert webhook["failurePolicy"] == ("Fail" if webhook["name"] == "jobs.finetune.dev" else "Ignore")
            assert webhook["sideEffects"] == "None"
            (rule,) = webhook["rules"]
            assert rule["operations"] == ["CREATE", "UPDATE"]
            assert rule["resources"] in (["finetunejobs"], ["finetuneprofiles"])


def test_the_webhook_answers_before_the_api_server_gives_up() -> None:
    from finetune_operator.admission import AdmissionOptions

    assert AdmissionOptions.review_seconds < min(w["timeoutSeconds"] for w in webhooks(render()))
    with helm.Chart.load(CHART) as chart:
        assert chart.schema
        bounds = chart.schema["properties"]["admission"]["properties"]["webhook"]["properties"]["timeoutSeconds"]
    assert AdmissionOptions.review_seconds < bounds["minimum"]


def test_a_budget_never_stops_a_drain() -> None:
    for replicas in range(1, 6):
        for least in range(1, 5):
            values = {"replicas": replicas, "podDisruptionBudget": {"minAvailable": least}}
            for budget in of_kind(render(values), "PodDisruptionBudget"):
                assert budget["spec"]["minAvailable"] == min(least, replicas - 1)
    assert of_kind(render({"replicas": 1}), "PodDisruptionBudget") == []


def test_metrics_are_scraped_with_a_token_over_tls() -> None:
    manifests = render(monitored(True, False, False, False))
    (monitor,) = of_kind(manifests, "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["scheme"] == "https"
    assert endpoint["bearerTokenFile"]
    (deployment,) = of_kind(manifests, "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    secrets = {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    assert endpoint["tlsConfig"]["ca"]["secret"]["name"] in secrets
    # A certificate is for a name, and Prometheus reads by a pod's address.
    url = next(e["value"] for e in pod["containers"][0]["env"] if e["name"] == "FINETUNE_OPERATOR_PROGRESS_URL")
    assert url.startswith(f"https://{endpoint['tlsConfig']['serverName']}:")
    (plain,) = of_kind(render(ANYTHING["open metrics"]), "ServiceMonitor")
    assert plain["spec"]["endpoints"] == [{"port": "metrics", "interval": "30s"}]
    (pods,) = of_kind(render(ANYTHING["a scraper's Secret"]), "PodMonitor")
    (scraped,) = pods["spec"]["podMetricsEndpoints"]
    assert scraped["authorization"] == {"credentials": {"name": "prometheus", "key": "token"}}
    assert scraped["tlsConfig"] == endpoint["tlsConfig"]


def test_the_operators_network_policy_lets_in_who_must_come() -> None:
    (policy,) = of_kind(render(ANYTHING["API server"]), "NetworkPolicy")
    (deployment,) = of_kind(render(), "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels
    by_port = {rule["ports"][0]["port"]: rule.get("from") for rule in policy["spec"]["ingress"]}
    named = {port["name"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    # The kubelet's probes come from the node, which no policy keeps out.
    assert by_port.keys() == named - {"health"}
    (trainers,) = by_port["https-progress"]
    assert trainers["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "finetune-trainer"}}
    assert by_port["https-webhook"] == [{"ipBlock": {"cidr": "10.0.0.0/28"}}]
    (open_to_all,) = of_kind(render({"networkPolicy": {"enabled": True}}), "NetworkPolicy")
    assert [rule for rule in open_to_all["spec"]["ingress"] if "from" not in rule] == [
        {"ports": [{"port": "https-webhook", "protocol": "TCP"}]}
    ]


def test_what_is_measured_is_in_the_release() -> None:
    manifests = render(monitored(True, False, True, True))
    (monitor,) = of_kind(manifests, "ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    (service,) = (s for s in of_kind(manifests, "Service") if wanted <= s["metadata"]["labels"].items())
    assert [p["name"] for p in service["spec"]["ports"]] == [e["port"] for e in monitor["spec"]["endpoints"]]
    (rule,) = of_kind(manifests, "PrometheusRule")
    assert rule["spec"]["groups"]
    # Prometheus fills these in, not Helm.
    assert "{{ $value" in json.dumps(rule)
    found = {name: text for c in of_kind(manifests, "ConfigMap") for name, text in c["data"].items()}
    assert found == {path.name: path.read_text() for path in (CHART / "files/dashboards").glob("*.json")}
    for manifest in manifests:
        if manifest["kind"] in ("ServiceMonitor", "PodMonitor", "PrometheusRule") or "data" in manifest:
            assert manifest["metadata"]["labels"]["team"] == "x"


@pytest.mark.parametrize(
    "values",
    [
        {"nope": 1},
        {"image": {"repository": "a", "digest": "latest"}},
        {"logLevel": "LOUD"},
        {"metrics": {"port": 0}},
        {"certificates": {"source": "Secret"}},
        {"certificates": {"source": "Vault"}},
        {"admission": {"webhook": {"timeoutSeconds": 5}}},
        {"admission": {"webhook": {"failurePolicy": "Ignore"}}},
        {"admission": {"webhook": {"clientCertificate": {"names": ["two words"]}}}},
        {"replicas": 0},
        {"watchNamespaces": ["a", "a"]},
        {"defaultProfile": {"create": True}},
        {"metrics": {"serviceMonitor": {"interval": "often"}}},
        {"networkPolicy": {"apiServerPorts": []}},
    ],
)
def test_bad_values_are_refused(values: dict[str, Any]) -> None:
    with helm.Chart.load(CHART) as chart, pytest.raises(HelmError):
        chart.validate_schema(values)


def test_every_value_is_in_the_schema() -> None:
    with helm.Chart.load(CHART) as chart:
        assert chart.schema
        names, schema = set(chart.values), set(chart.schema["properties"])
    assert names | {"global"} == schema


def test_the_chart_carries_the_generated_crds() -> None:
    for crd in (ROOT / "crds").glob("*.yaml"):
        assert (CHART / "crds" / crd.name).read_text() == crd.read_text()
