"""The pods of an Indexed Job: how they are made, and the indexes they stand for."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

Object = Mapping[str, Any]

FINALIZER = "batch.kubernetes.io/job-tracking"
INDEX = "batch.kubernetes.io/job-completion-index"


def make_pod(job: Object, index: int) -> dict[str, Any]:
    """The pod of one index, as the Job controller makes it."""
    template = copy.deepcopy(dict(job["spec"]["template"]))
    metadata = template.get("metadata") or {}
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    labels = {
        "batch.kubernetes.io/controller-uid": uid,
        "controller-uid": uid,
        "batch.kubernetes.io/job-name": name,
        "job-name": name,
        INDEX: str(index),
    }
    suffix = f"-{index}-"
    spec = template["spec"]
    spec.setdefault("hostname", f"{name}-{index}")
    for container in [*(spec.get("initContainers") or []), *spec["containers"]]:
        env = container.setdefault("env", [])
        if all(entry["name"] != "JOB_COMPLETION_INDEX" for entry in env):
            source = {"fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.labels['{INDEX}']"}}
            env.append({"name": "JOB_COMPLETION_INDEX", "valueFrom": source})
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": name[: 63 - 5 - len(suffix)] + suffix,
            "namespace": job["metadata"]["namespace"],
            "labels": (metadata.get("labels") or {}) | labels,
            "annotations": (metadata.get("annotations") or {}) | {INDEX: str(index)},
            "finalizers": [*(metadata.get("finalizers") or []), FINALIZER],
            "ownerReferences": [
                {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "name": name,
                    "uid": uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": spec,
    }


def completion_index(pod: Object) -> int | None:
    value = (pod["metadata"].get("annotations") or {}).get(INDEX, "")
    return int(value) if value.isdigit() else None


def parse_indexes(text: str) -> set[int]:
    """ "0,2-4" is {0, 2, 3, 4}."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def format_indexes(indexes: Iterable[int]) -> str:
    """{0, 2, 3, 4} is "0,2-4"; two neighbours are written "2,3", as Kubernetes writes them."""
    runs: list[list[int]] = []
    for index in sorted(indexes):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
