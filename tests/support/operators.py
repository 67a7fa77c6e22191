"""What the operator makes, for policies that judge its account: real objects of every kind, and ways out of them."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.job import parse
from finetune_api.profile import FineTuneProfile
from finetune_operator import manifests, nettest
from finetune_operator.fitting import sized
from support.api import Object
from support.world import CONTEXT, PREPARED, make_job, make_profile

PATHS = {
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "CronJob": "/apis/batch/v1/namespaces/{}/cronjobs",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "Pod": "/api/v1/namespaces/{}/pods",
    "Secret": "/api/v1/namespaces/{}/secrets",
    "Service": "/api/v1/namespaces/{}/services",
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
}
PROFILE: Mapping[str, Any] = {
    "imagePullPolicy": "IfNotPresent",
    "networkPolicy": True,
    "nodeSelector": {"gpu": "a100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "accelerator": {"memory": "80Gi"},
    "resources": {"cpu": "1500m", "memory": "64Gi", "shm": "8Gi", "ephemeralStorage": "100Gi"},
    "serviceAccounts": ["tuner"],
    "storage": {"endpoint": "https://s3.example", "region": "eu-central-1"},
    "environment": [{"name": "NCCL_DEBUG", "value": "INFO"}],
}
WIDE: Mapping[str, Any] = {
    "distribution": {"workers": 2, "gpusPerWorker": 8},
    "training": {"globalBatchSize": 64},
    "credentials": {"secretRef": {"name": "s3-creds"}},
}
KINDS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "on CPUs": ({}, {"networkPolicy": True}),
    "on GPUs": (WIDE, PROFILE),
    "in a queue": (WIDE | {"queue": {"name": "team-a", "priorityClassName": "batch"}}, PROFILE),
    "in a runtime class": (WIDE, {**PROFILE, "runtimeClassName": "nvidia"}),
    "under an account": ({"credentials": {"serviceAccountName": "tuner"}}, {**PROFILE, "accelerator": None}),
}
"""Of jobs: what they specify, and their profile."""


def path(manifest: Object) -> str:
    """The collection in which it is created."""
    return PATHS[manifest["kind"]].format(manifest["metadata"]["namespace"])


def made(namespace: str, profile: str, kind: str) -> list[Object]:
    """Everything that the operator makes for a job of this kind: for `prepare`, and for two attempts."""
    spec, own = KINDS[kind]
    builder = make_job().with_spec(**spec).with_meta(namespace=namespace)
    job = parse(builder.build())
    chosen = FineTuneProfile.model_validate(make_profile(profile, **{k: v for k, v in own.items() if v is not None}))
    sizings = sized(job, chosen, PREPARED)
    found = [*manifests.prepare(job, chosen, CONTEXT)]
    away = manifests.without(["node-a"], strictly=True)
    for attempt, affinity in ((0, None), (12, away)):
        found += manifests.gang(job, chosen, CONTEXT, attempt, PREPARED, sizings, affinity=affinity)
    return copy.deepcopy(found)


def network_test(namespace: str, profile: str) -> list[Object]:
    """Everything that its test of NetworkPolicies takes."""
    return copy.deepcopy([*nettest.objects(FineTuneProfile.model_validate(make_profile(profile)), namespace)])


Change = Callable[[Object], None]


@dataclass(frozen=True)
class Way:
    """One way out of what the operator makes: a change of one of its objects."""

    name: str
    kind: str
    change: Change


def put(where: str, value: Any) -> Change:
    """Sets a member: `spec.template.spec.containers.0.args`."""

    def change(obj: Object) -> None:
        *parents, last = where.split(".")
        place: Any = obj
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        if isinstance(place, list):
            place.insert(int(last), value)
        elif value is None:
            place.pop(last, None)
        else:
            place[last] = value

    return change


POD, BOX = "spec.template.spec", "spec.template.spec.containers.0"
SECURITY = f"{BOX}.securityContext"
APPARMOR = "container.apparmor.security.beta.kubernetes.io/trainer"
OTHER = {"name": "other", "image": "a.example/b:1"}
HOOK = {"postStart": {"exec": {"command": ["sh"]}}}
PROBE = {"exec": {"command": ["sh"]}}


def _volume(**source: Any) -> Change:
    return put(f"{POD}.volumes.0", {"name": "more", **source})


def _token(**token: Any) -> Change:
    return _volume(projected={"sources": [{"serviceAccountToken": {"path": "t", **token}}]})


def _value(**source: Any) -> Change:
    return put(f"{BOX}.env.0", {"name": "X", "valueFrom": source})


def _label(key: str, value: str) -> Change:
    def change(obj: Object) -> None:
        obj["spec"]["template"]["metadata"]["labels"][key] = value

    return change


def _owner(**members: Any) -> Change:
    def change(obj: Object) -> None:
        obj["metadata"]["ownerReferences"][0].update(members)

    return change


def _fields(base: str, **members: Any) -> Iterator[tuple[str, Change]]:
    for key, value in members.items():
        yield f"{base.removeprefix(POD).lstrip('.')} {key}={value!r}"[:70], put(f"{base}.{key}", value)


JOBS: tuple[tuple[str, Change], ...] = (
    *_fields(
        POD,
        hostNetwork=True,
        hostPID=True,
        hostIPC=True,
        shareProcessNamespace=True,
        nodeName="node-a",
        schedulerName="other",
        priorityClassName="system-node-critical",
        automountServiceAccountToken=True,
        hostAliases=[{"ip": "10.0.0.1", "hostnames": ["s3.example"]}],
        dnsPolicy="Default",
        dnsConfig={"nameservers": ["10.0.0.1"]},
        imagePullSecrets=[{"name": "theirs"}],
        initContainers=[OTHER],
        serviceAccountName="admin",
        serviceAccount="admin",
        restartPolicy="OnFailure",
        resourceClaims=[{"name": "gpu", "resourceClaimName": "theirs"}],
    ),
    ("no automountServiceAccountToken", put(f"{POD}.automountServiceAccountToken", None)),
    ("a second container", put(f"{POD}.containers.1", OTHER)),
    *_fields(
        BOX,
        name="other",
        command=["sh", "-c", "id"],
        args=["more"],
        lifecycle=HOOK,
        livenessProbe=PROBE,
        readinessProbe=PROBE,
        startupProbe=PROBE,
        ports=[{"containerPort": 80, "hostPort": 80}],
        workingDir="/etc/finetune",
        envFrom=[{"secretRef": {"name": "theirs"}}],
        volumeDevices=[{"name": "run", "devicePath": "/dev/x"}],
    ),
    ("the image's own command", put(f"{BOX}.command", None)),
    ("another of our commands", put(f"{BOX}.command", ["python", "-m", "finetune_trainer", "nettest"])),
    *_fields(
        SECURITY,
        privileged=True,
        allowPrivilegeEscalation=True,
        readOnlyRootFilesystem=False,
        runAsUser=0,
        runAsNonRoot=False,
        runAsGroup=0,
        procMount="Unmasked",
        capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]},
        seccompProfile={"type": "Unconfined"},
        seLinuxOptions={"type": "spc_t"},
        appArmorProfile={"type": "Unconfined"},
    ),
    ("no dropped capability", put(f"{SECURITY}.capabilities", {"drop": ["NET_RAW"]})),
    ("no securityContext of the container", put(SECURITY, None)),
    *_fields(
        f"{POD}.securityContext",
        runAsNonRoot=False,
        runAsUser=0,
        seccompProfile={"type": "Unconfined"},
        supplementalGroups=[0],
        sysctls=[{"name": "kernel.shm_rmid_forced", "value": "1"}],
        seLinuxOptions={"type": "spc_t"},
        appArmorProfile={"type": "Unconfined"},
    ),
    ("no securityContext of the pod", put(f"{POD}.securityContext", None)),
    ("hostPath", _volume(hostPath={"path": "/"})),
    ("an ephemeral volume", _volume(ephemeral={"volumeClaimTemplate": {"spec": {"accessModes": ["ReadWriteOnce"],
     "resources": {"requests": {"storage": "1Gi"}}}}})),
    ("a claim", _volume(persistentVolumeClaim={"claimName": "theirs"})),
    ("a CSI volume", _volume(csi={"driver": "secrets-store.csi.k8s.io"})),
    ("an NFS volume", _volume(nfs={"server": "10.0.0.1", "path": "/"})),
    ("an image volume", _volume(image={"reference": "a.example/b:1"})),
    ("a Secret's volume", _volume(secret={"secretName": "theirs"})),
    ("another ConfigMap", _volume(configMap={"name": "theirs"})),
    ("a downward API volume", _volume(downwardAPI={"items": []})),
    ("a token for the API server", _token()),
    ("a token for Vault", _token(audience="vault")),
    ("a token for another job's progress", _token(audience="finetune.dev/progress/other")),
    ("all of a Secret in a projection", _volume(projected={"sources": [{"secret": {"name": "theirs"}}]})),
    ("a key of a Secret in a projection",
     _volume(projected={"sources": [{"secret": {"name": "theirs", "items": [{"key": "tls.key", "path": "k"}]}}]})),
    ("a trust bundle", _volume(projected={"sources": [{"clusterTrustBundle": {"name": "b", "path": "b"}}]})),
    ("another ConfigMap in a projection", _volume(projected={"sources": [{"configMap": {"name": "theirs"}}]})),
    ("a key of a Secret", _value(secretKeyRef={"name": "theirs", "key": "token"})),
    ("a key of a ConfigMap", _value(configMapKeyRef={"name": "theirs", "key": "x"})),
    ("annotations of pods", put("spec.template.metadata.annotations", {APPARMOR: "unconfined"})),
    ("pods of another job", _label("finetune.dev/job-name", "other")),
    ("pods of another attempt", _label("finetune.dev/attempt", "7")),
    ("pods of the network's test", _label("finetune.dev/network-test", "nettest-0123456789ab")),
    ("another controller", put("spec.managedBy", "example.com/other")),
    ("another's pods", put("spec.manualSelector", True)),
)  # fmt: skip
"""Of the Job of a gang."""

ANY: tuple[tuple[str, Change], ...] = (
    ("another name", put("metadata.name", "free")),
    ("a name of another attempt", put("metadata.name", "support-bot-7")),
    ("a name that says no attempt", put("metadata.name", "support-bot-x")),
    ("no owner", put("metadata.ownerReferences", None)),
    ("an owner of another kind", _owner(kind="Deployment", apiVersion="apps/v1")),
    ("an owner of another group", _owner(apiVersion="example.com/v1")),
    ("an owner that controls nothing", _owner(controller=False)),
    ("another owner", _owner(name="other")),
    ("two owners", put("metadata.ownerReferences.0", {"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "u"})),
    ("another job's label", put("metadata.labels", {"finetune.dev/job-name": "other", "finetune.dev/attempt": "0"})),
    ("the test's label", put("metadata.labels", {"finetune.dev/network-test": "nettest-0123456789ab"})),
    *((f"in {n}", put("metadata.namespace", n)) for n in ("kube-system", "kube-public", "kube-node-lease")),
)
OTHERS: tuple[tuple[str, str, Change], ...] = (
    ("Service", "an ExternalName", put("spec", {"type": "ExternalName", "externalName": "evil.example"})),
    ("Service", "a NodePort", put("spec.type", "NodePort")),
    ("Service", "an address", put("spec.clusterIP", "10.0.0.77")),
    ("Service", "an address of the kernel's choice", put("spec.clusterIP", None)),
    ("Service", "external addresses", put("spec.externalIPs", ["1.2.3.4"])),
    ("Service", "no selector", put("spec.selector", None)),
    ("Service", "others' pods", put("spec.selector", {"app": "theirs"})),
    ("Service", "pods of another job", put("spec.selector", {"finetune.dev/job-name": "other"})),
    ("NetworkPolicy", "every pod", put("spec.podSelector", {})),
    ("NetworkPolicy", "others' pods", put("spec.podSelector", {"matchLabels": {"app": "theirs"}})),
    ("NetworkPolicy", "pods of another job",
     put("spec.podSelector", {"matchLabels": {"finetune.dev/job-name": "other"}})),
    ("NetworkPolicy", "pods by an expression",
     put("spec.podSelector.matchExpressions", [{"key": "app", "operator": "Exists"}])),
    ("ConfigMap", "one that changes", put("immutable", False)),
    ("ConfigMap", "other keys", put("data", {"sitecustomize.py": "x"})),
    ("ConfigMap", "bytes", put("binaryData", {"x": "eA=="})),
)  # fmt: skip
WAYS: tuple[Way, ...] = (
    *(Way(name, "Job", change) for name, change in JOBS),
    *(Way(name, kind, change) for kind in ("Job", "ConfigMap", "Service", "NetworkPolicy") for name, change in ANY),
    *(Way(name, kind, change) for kind, name, change in OTHERS),
    # A Job without labels gets those of its pods.
    *(Way("no labels", kind, put("metadata.labels", None)) for kind in ("ConfigMap", "Service", "NetworkPolicy")),
)


def strangers(gang: Object) -> list[Object]:
    """Objects of kinds that the operator never makes, as like its own as they can be."""
    meta, template = gang["metadata"], gang["spec"]["template"]
    labels = template["metadata"]["labels"]
    kinds: dict[str, Object] = {
        "Pod": {"spec": template["spec"]},
        "CronJob": {"spec": {"schedule": "* * * * *", "jobTemplate": {"spec": {"template": template}}}},
        "Deployment": {
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {**template, "spec": {**template["spec"], "restartPolicy": "Always"}},
            }
        },
        "Secret": {"stringData": {"a": "b"}},
        "ServiceAccount": {},
    }
    versions = {"CronJob": "batch/v1", "Deployment": "apps/v1"}
    return [
        copy.deepcopy({"apiVersion": versions.get(kind, "v1"), "kind": kind, "metadata": meta, **body})
        for kind, body in kinds.items()
    ]
