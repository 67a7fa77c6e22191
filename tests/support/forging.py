"""What a tenant may try on objects that the operator reads: a table of kind, verb and field, and how each is tried."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from support.api import Answer, Api, Object

CORE, BATCH, NETWORK = "/api/v1", "/apis/batch/v1", "/apis/networking.k8s.io/v1"
FINETUNE = "/apis/finetune.dev/v1alpha1"
KINDS: Mapping[str, tuple[str, str, str]] = {
    "gang": (BATCH, "jobs", "Job"),
    "prepare": (BATCH, "jobs", "Job"),
    "pod": (CORE, "pods", "Pod"),
    "configmap": (CORE, "configmaps", "ConfigMap"),
    "service": (CORE, "services", "Service"),
    "networkpolicy": (NETWORK, "networkpolicies", "NetworkPolicy"),
    "finetunejob": (FINETUNE, "finetunejobs", "FineTuneJob"),
}
"""The API, the plural and the kind of each target: what the operator makes of a job, and the job itself."""
CHILDREN = tuple(kind for kind in KINDS if kind != "finetunejob")
WRITES = ("merge", "strategic", "apply", "replace")
BIG = "1000000"
HUGE = 2**53
Patch = dict[str, Any]


def _metadata(uid: str, profile: str) -> dict[str, Patch]:
    """Changes of what says whose an object is and what it is for. `uid`: of another tenant's job `j`."""
    theirs = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "name": "j", "uid": uid, "controller": True}
    labels = {
        "of another job": {"finetune.dev/job-name": "j"},
        "of no job": {"finetune.dev/job-name": None},
        "of another attempt": {"finetune.dev/attempt": "7"},
        "of no number": {"finetune.dev/attempt": "x" * 60},
        "of prepare": {"finetune.dev/attempt": "prepare"},
        "of nobody": {"app.kubernetes.io/managed-by": None},
        "of the network's test": {"finetune.dev/network-test": "nettest-0123456789ab"},
        "of a queue": {"kueue.x-k8s.io/queue-name": "q"},
    }
    notes = {
        "profile": {"finetune.dev/profile": "other"},
        "generation": {"finetune.dev/profile-generation": BIG},
        "gpus": {"finetune.dev/gpus": BIG},
        "snapshot": {"finetune.dev/profile-snapshot": '{"limits": {"maxActiveDeadlineSeconds": 99999999999999}}'},
        "spec": {"finetune.dev/spec-sha256": "0" * 64},
        "default profile": {"finetune.dev/default-profile": "true"},
        "index": {"batch.kubernetes.io/job-completion-index": BIG},
    }
    owners = {
        "none": [],
        "another tenant's": [theirs],
        "one of their own": [theirs | {"controller": False}],
    }
    return {
        **{f"labels: {name}": {"metadata": {"labels": value}} for name, value in labels.items()},
        **{f"annotations: {name}": {"metadata": {"annotations": value}} for name, value in notes.items()},
        **{f"ownerReferences: {name}": {"metadata": {"ownerReferences": value}} for name, value in owners.items()},
        "finalizers": {"metadata": {"finalizers": ["example.com/hold"]}},
    }


_SPEC: Mapping[str, Mapping[str, Patch]] = {
    "gang": {
        "suspend": {"spec": {"suspend": True}},
        "resume": {"spec": {"suspend": False}, "metadata": {"annotations": {"look": "again"}}},
        "completions": {"spec": {"completions": 4, "parallelism": 4}},
        "parallelism": {"spec": {"parallelism": 0}},
        "activeDeadlineSeconds": {"spec": {"activeDeadlineSeconds": HUGE - 1}},
        "backoffLimit": {"spec": {"backoffLimit": 1000}},
        "ttlSecondsAfterFinished": {"spec": {"ttlSecondsAfterFinished": 0}},
        "template": {"spec": {"template": {"metadata": {"labels": {"finetune.dev/job-name": "j"}}}}},
    },
    "pod": {
        "activeDeadlineSeconds": {"spec": {"activeDeadlineSeconds": 1}},
        "tolerations": {"spec": {"tolerations": [{"operator": "Exists"}]}},
    },
    "configmap": {"data": {"data": {"run.json": "{}"}}},
    "service": {"selector": {"spec": {"selector": {"app": "mine"}}}},
    "networkpolicy": {"egress": {"spec": {"egress": [{}]}}},
    "finetunejob": {"suspend": {"spec": {"runPolicy": {"suspend": False}}}},
}
STATUS: Mapping[str, Mapping[str, Patch]] = {
    "gang": {
        "status: complete": {"status": {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}},
        "status: began": {"status": {"startTime": "0001-01-01T00:00:00Z", "active": 10**6}},
    },
    "prepare": {"status: began": {"status": {"startTime": "9999-01-01T00:00:00Z"}}},
    "pod": {"status: failed": {"status": {"phase": "Failed", "message": "x" * 1000}}},
    "finetunejob": {
        "status: attempts": {
            "status": {"attempts": [{"number": 0, "job": "m-0", "uid": "u", "gpus": 10**6, "outcome": "Succeeded"}]}
        },
        "status: state": {"status": {"state": "Complete"}},
    },
}


@dataclass(frozen=True)
class Cell:
    """One thing that a tenant may try on an object that is there."""

    kind: str
    verb: str
    field: str
    patch: Patch

    def __str__(self) -> str:
        return f"{self.kind}: {self.verb}: {self.field}"

    @property
    def part(self) -> str:
        return "/status" if self.field.startswith("status") else ""


def changes(uid: str, profile: str, *, verbs: tuple[str, ...] = WRITES, status: bool = True) -> Iterator[Cell]:
    """Every field of every kind, by every verb."""
    for kind in KINDS:
        fields = _metadata(uid, profile) | {f"spec: {k}": v for k, v in _SPEC.get(kind, {}).items()}
        fields |= STATUS.get(kind, {}) if status else {}
        for verb in verbs:
            if kind == "finetunejob" and verb == "strategic":
                continue
            for field, patch in fields.items():
                yield Cell(kind, verb, field, patch)


def merged(old: Any, patch: Any) -> Any:
    """What a merge patch makes of a value."""
    if not isinstance(patch, dict):
        return patch
    new = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            new.pop(key, None)
        else:
            new[key] = merged(new.get(key), value)
    return new


async def attempt(api: Api, path: str, cell: Cell, token: str, **params: Any) -> Answer:
    """Tries it; what an apply cannot express is merged."""
    where = path + cell.part
    if cell.kind == "finetunejob" and cell.field.startswith("ownerReferences"):
        # Owners that are not there: the garbage collector would delete the job, and with it what is tried next.
        params |= {"dryRun": "All"}
    if cell.verb == "replace":
        old = (await api.get(path)).must(200)
        return await api.replace(where, merged(old, cell.patch), token=token, **params)
    body: Patch = cell.patch
    if cell.verb == "apply":
        api_group, _, kind = KINDS[cell.kind]
        version = api_group.removeprefix("/apis/").removeprefix("/api/")
        body = merged({"apiVersion": version, "kind": kind}, copy.deepcopy(body))
        params |= {"fieldManager": "mallory", "force": "true"}
    return await api.patch(where, body, cell.verb, token=token, **params)


def creations(namespace: str, uid: str, theirs: str, profile: str) -> dict[str, tuple[str, Object]]:
    """Objects that claim to be the operator's, and where. `uid`: of one's own job `m`; `theirs`: of another's `j`."""
    found: dict[str, tuple[str, Object]] = {}
    owners = {"own": ("m", uid), "another's": ("j", theirs)}
    for whose, (job, owner) in owners.items():
        ref = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "name": job,
            "uid": owner,
            "controller": True,
        }
        for name in ("m-1", "m-3", f"{job}-9", f"free-{job}"):
            for mark, meta in _marks(job, ref, profile).items():
                title = f"{name} {mark} of {whose} job"
                for kind, body in _bodies(job).items():
                    api, plural, _ = KINDS[kind]
                    made = {"metadata": {"name": f"{name}-{len(found)}" if mark != "whole" else name, **meta}, **body}
                    found[f"{kind}: create: {title}"] = (f"{api}/namespaces/{namespace}/{plural}", copy.deepcopy(made))
    return found


def _marks(job: str, ref: Object, profile: str) -> dict[str, Object]:
    labels = {
        "app.kubernetes.io/managed-by": "finetune-operator",
        "finetune.dev/job-name": job,
        "finetune.dev/attempt": "3",
    }
    notes = {"finetune.dev/profile": profile, "finetune.dev/gpus": BIG}
    return {
        "whole": {"labels": labels, "annotations": notes, "ownerReferences": [ref]},
        "by its owner": {"ownerReferences": [ref]},
        "by its labels": {"labels": labels, "annotations": notes},
        "by one label": {"labels": {"finetune.dev/job-name": job}},
        "by its manager": {"labels": {"app.kubernetes.io/managed-by": "finetune-operator"}},
    }


def _bodies(job: str) -> dict[str, Object]:
    box = {"name": "trainer", "image": "example.com/mine:1"}
    pod: Object = {"restartPolicy": "Never", "schedulerName": "nobody", "containers": [box]}
    selector = {"finetune.dev/job-name": job}
    return {
        "gang": {
            "spec": {
                "completionMode": "Indexed",
                "completions": 1,
                "suspend": True,
                "template": {"metadata": {"labels": selector}, "spec": pod},
            }
        },
        "pod": {"spec": pod},
        "configmap": {"data": {"run.json": "{}"}},
        "service": {"spec": {"clusterIP": "None", "selector": selector, "ports": [{"port": 1}]}},
        "networkpolicy": {"spec": {"podSelector": {"matchLabels": selector}, "egress": [{}]}},
    }


def template_only(namespace: str) -> tuple[str, Object]:
    """A Job that carries no mark itself: the pods that the Job controller would make of it do. It has labels, since one
    that has none gets those of its pods."""
    body = _bodies("j")["gang"]
    body["spec"]["suspend"] = False
    return f"{BATCH}/namespaces/{namespace}/jobs", {"metadata": {"name": "innocent", "labels": {"app": "mine"}}, **body}
