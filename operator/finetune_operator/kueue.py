"""PURE. What Kueue says of a gang in a queue: whether its Workload is admitted, and its conditions in some words."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Object = Mapping[str, Any]
GROUP = "kueue.x-k8s.io"
JOB_UID = f"{GROUP}/job-uid"
"""Label of the Workload that Kueue makes of a Job."""


class Queue(NamedTuple):
    """What a queue says of a gang."""

    text: str
    admitted: bool | None
    """None: nobody can tell, since Workloads cannot be read."""


def admitted(workloads: Sequence[Object] | None) -> bool:
    """Whether Kueue has admitted the Job whose Workloads these are; None: the API server knows no such kind."""
    return any(
        _true({c["type"]: c for c in (found.get("status") or {}).get("conditions") or ()}, "Admitted")
        and (found.get("spec") or {}).get("active") is not False
        for found in workloads or ()
    )


def told(workloads: Sequence[Object] | None) -> str:
    """Why a gang waits. `workloads`: those of its Job; None: the API server knows no such kind."""
    if workloads is None:
        return "the API server knows no Workloads; Kueue is not installed"
    # Of several, Kueue has not removed the older ones yet.
    newest = max(workloads, key=lambda w: str(w["metadata"].get("creationTimestamp", "")), default=None)
    if newest is None:
        return "Kueue has not taken notice of it yet"
    spec, status = newest.get("spec") or {}, newest.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    if spec.get("active") is False:
        return _with_message("deactivated", conditions.get("Evicted"))
    if _true(conditions, "Admitted"):
        return "admitted"
    if _true(conditions, "QuotaReserved"):
        checks = [check for check in status.get("admissionChecks") or () if check.get("state") != "Ready"]
        names = ", ".join(_with_message(str(check.get("name", "")), check) for check in checks)
        return f"quota is reserved, and these checks are not ready: {names}" if names else "quota is reserved"
    return _with_message("no quota yet", conditions.get("QuotaReserved"))


def _true(conditions: Mapping[str, Object], kind: str) -> bool:
    return bool(conditions.get(kind, {}).get("status") == "True")


def _with_message(what: str, told: Object | None) -> str:
    said = " ".join(str((told or {}).get("message") or (told or {}).get("reason") or "").split())
    return f"{what}: {said[:1024]}" if said else what
