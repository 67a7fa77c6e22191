"""PURE. Whether a Job that is there already is just what would be made: then it does not matter who made it.

An operator that ends between making a Job and writing its UID down leaves one that no status knows. A tenant can put
one in its place. Of both nothing is believed; what is compared is what their pods would be.
"""

from collections.abc import Mapping
from typing import Any

from finetune_api.model import quantity

Object = Mapping[str, Any]

_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "apiVersion": ("v1",),
    "creationTimestamp": (None,),
    "defaultMode": (420,),
    "dnsPolicy": ("ClusterFirst",),
    "imagePullPolicy": ("Always", "IfNotPresent"),
    "manualSelector": (False,),
    "schedulerName": ("default-scheduler",),
    "terminationGracePeriodSeconds": (30,),
    "terminationMessagePath": ("/dev/termination-log",),
    "terminationMessagePolicy": ("File",),
}
"""What the API server fills in, by the name of the field."""
_OF_JOB_CONTROLLER = (
    "batch.kubernetes.io/controller-uid",
    "batch.kubernetes.io/job-name",
    "controller-uid",
    "job-name",
)
"""Labels of a pod template that the API server adds."""
_QUANTITIES = ("cpu", "memory", "ephemeral-storage", "sizeLimit")


def is_same_job(wanted: Object, found: Object) -> bool:
    """Whether the pods of `found`, as the API server has it, are those of `wanted`, a manifest of ours."""
    spec = dict(found.get("spec") or {})
    spec.pop("selector", None)  # Made by the server, unless `manualSelector` is true, which is no default.
    return _same(wanted["spec"], spec, "spec")


def _same(wanted: Any, found: Any, field: str) -> bool:
    if isinstance(wanted, Mapping):
        return isinstance(found, Mapping) and _same_members(wanted, found, field)
    if isinstance(wanted, list | tuple):
        same_length = isinstance(found, list) and len(wanted) == len(found)
        return same_length and all(_same(*pair, field) for pair in zip(wanted, found, strict=True))
    if field in _QUANTITIES and isinstance(wanted, str) and isinstance(found, str):
        return wanted == found or _amount(wanted) == _amount(found)
    return type(wanted) is type(found) and bool(wanted == found)


def _same_members(wanted: Object, found: Object, field: str) -> bool:
    for key in wanted.keys() | found.keys():
        if key not in found:
            if wanted[key] not in (None, "", {}, [], False):
                return False
        elif key in wanted:
            if not _same(wanted[key], found[key], key):
                return False
        elif field == "labels":
            if key not in _OF_JOB_CONTROLLER:
                return False
        elif key == "serviceAccount":
            if found[key] != wanted.get("serviceAccountName"):
                return False
        elif found[key] not in _DEFAULTS.get(key, ()) and found[key] not in ({}, []):
            return False
    return True


def _amount(text: str) -> float | None:
    try:
        return quantity(text)
    except (ValueError, KeyError):
        return None
