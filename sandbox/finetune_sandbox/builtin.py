"""Defaults and validation of the built-in kinds other than Pods and Jobs: what an operator could get wrong."""

from __future__ import annotations

import base64
import itertools
from typing import Any

from finetune_sandbox import canonical
from finetune_sandbox.errors import Cause, Obj, bad_request, duplicate, not_allowed, not_supported, required, wrong
from finetune_sandbox.meta import LABEL_1035, LABEL_1035_RULE, check_labels

MAX_DATA = 1024 * 1024
_addresses = itertools.count(10)
RBAC = "rbac.authorization.k8s.io"


def namespace(obj: Obj) -> None:
    obj.setdefault("spec", {})


def new_namespace(obj: Obj, old: Obj | None) -> None:
    if old is None:
        obj["spec"]["finalizers"] = ["kubernetes"]
        obj["status"] = {"phase": "Active"}
        obj["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = obj["metadata"].get("name", "")
    else:
        obj["spec"] = old["spec"]


def service(obj: Obj) -> None:
    spec = obj.setdefault("spec", {})
    spec.setdefault("type", "ClusterIP")
    spec.setdefault("sessionAffinity", "None")
    for port in spec.get("ports") or []:
        port.setdefault("protocol", "TCP")
        if "port" in port and port.get("targetPort") in (None, 0, ""):
            port["targetPort"] = port["port"]
    if spec["type"] != "ExternalName":
        spec.setdefault("internalTrafficPolicy", "Cluster")
        spec.setdefault("ipFamilies", ["IPv4"])
        spec.setdefault("ipFamilyPolicy", "SingleStack")


def new_service(obj: Obj, old: Obj | None) -> None:
    spec = obj["spec"]
    if spec["type"] == "ExternalName":
        return
    if old is not None and not spec.get("clusterIP"):
        spec["clusterIP"] = old["spec"].get("clusterIP")
    if not spec.get("clusterIP"):
        n = next(_addresses)
        spec["clusterIP"] = f"10.{96 + (n >> 16) % 16}.{n >> 8 & 255}.{n & 255}"
    spec["clusterIPs"] = [spec["clusterIP"]]
    obj.setdefault("status", {}).setdefault("loadBalancer", {})


def check_service(obj: Obj, old: Obj | None) -> list[Cause]:
    spec, found = obj["spec"], []
    if spec["type"] not in ("ClusterIP", "ExternalName"):
        found.append(not_supported("spec.type", spec["type"], ("ClusterIP", "ExternalName")))
    if spec["type"] == "ExternalName" and not spec.get("externalName"):
        found.append(required("spec.externalName"))
    if spec["type"] == "ClusterIP" and not spec.get("ports") and spec.get("clusterIP") != "None":
        found.append(required("spec.ports"))
    kept = spec["type"] == "ExternalName" or spec.get("clusterIP")
    if old is not None and kept is not True and old["spec"].get("clusterIP") not in (None, kept):
        found.append(wrong("spec.clusterIPs[0]", spec.get("clusterIP"), "field is immutable"))
    ports, names = spec.get("ports") or [], set()
    for i, port in enumerate(ports):
        where = f"spec.ports[{i}]"
        if not _port(port.get("port")):
            found.append(wrong(f"{where}.port", port.get("port", 0), "must be between 1 and 65535, inclusive"))
        target = port.get("targetPort")
        if isinstance(target, int) and not _port(target):
            found.append(wrong(f"{where}.targetPort", target, "must be between 1 and 65535, inclusive"))
        if port["protocol"] not in ("TCP", "UDP", "SCTP"):
            found.append(not_supported(f"{where}.protocol", port["protocol"], ("SCTP", "TCP", "UDP")))
        name = port.get("name", "")
        if len(ports) > 1 and not name:
            found.append(required(f"{where}.name"))
        elif name and not LABEL_1035.fullmatch(name):
            found.append(wrong(f"{where}.name", name, LABEL_1035_RULE))
        elif name in names:
            found.append(duplicate(f"{where}.name", name))
        names.add(name)
    return found + check_labels(spec.get("selector") or {}, "spec.selector")


def _port(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65535


def secret(obj: Obj) -> None:
    obj.setdefault("type", "Opaque")
    for key, text in (obj.pop("stringData", None) or {}).items():
        obj["data"] = {**(obj.get("data") or {}), key: base64.b64encode(str(text).encode()).decode()}


def check_data(obj: Obj, old: Obj | None) -> list[Cause]:
    found: list[Cause] = []
    size = 0
    for field in ("data", "binaryData"):
        for key, value in (obj.get(field) or {}).items():
            if not isinstance(value, str):
                raise bad_request(f"{field}[{key}]: expected a string, found {type(value).__name__}")
            size += len(value.encode())
            if not key or len(key) > 253 or not all(c.isalnum() or c in "-_." for c in key) or key in (".", ".."):
                why = "a valid config key must consist of alphanumeric characters, '-', '_' or '.'"
                found.append(wrong(f"{field}[{key}]", key, why))
            if obj["kind"] == "Secret" or field == "binaryData":
                try:
                    base64.b64decode(value, validate=True)
                except ValueError as error:
                    raise bad_request(f"{field}[{key}]: illegal base64 data: {error}") from error
    if size > MAX_DATA * (4 / 3 if obj["kind"] == "Secret" else 1):
        found.append(Cause("", f"Too long: may not be more than {MAX_DATA} bytes", "FieldValueTooLong"))
    if old is not None and old.get("immutable"):
        for field in ("data", "binaryData", "immutable"):
            if obj.get(field) != old.get(field):
                found.append(
                    Cause(field, "Forbidden: field is immutable when `immutable` is set", "FieldValueForbidden")
                )
    if old is not None and obj["kind"] == "Secret" and obj["type"] != old["type"]:
        found.append(wrong("type", obj["type"], "field is immutable"))
    return found


def check_event(obj: Obj, old: Obj | None) -> list[Cause]:
    involved = obj.get("involvedObject")
    if not isinstance(involved, dict):
        return [required("involvedObject")]
    where, own = involved.get("namespace") or "default", obj["metadata"]["namespace"]
    if where != own and not (not involved.get("namespace") and own in ("default", "kube-system")):
        return [wrong("involvedObject.namespace", involved.get("namespace", ""), "does not match event.namespace")]
    return []


def node(obj: Obj) -> None:
    obj.setdefault("spec", {})
    status = obj.setdefault("status", {})
    for field in ("capacity", "allocatable"):
        if field in status:
            status[field] = canonical.canonical_map(status[field])
    if "capacity" in status:
        status.setdefault("allocatable", dict(status["capacity"]))


def claim(obj: Obj) -> None:
    spec = obj.setdefault("spec", {})
    spec.setdefault("volumeMode", "Filesystem")
    if isinstance(requests := (spec.get("resources") or {}).get("requests"), dict):
        spec["resources"]["requests"] = canonical.canonical_map(requests)
    obj.setdefault("status", {}).setdefault("phase", "Pending")


def check_claim(obj: Obj, old: Obj | None) -> list[Cause]:
    spec = obj["spec"]
    found = [] if spec.get("accessModes") else [required("spec.accessModes", "at least 1 access mode is required")]
    if "storage" not in ((spec.get("resources") or {}).get("requests") or {}):
        found.append(required("spec.resources[storage]"))
    return found


def network_policy(obj: Obj) -> None:
    spec = obj.setdefault("spec", {})
    spec.setdefault("policyTypes", ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])
    for rule in [*(spec.get("ingress") or ()), *(spec.get("egress") or ())]:
        for port in rule.get("ports") or ():
            port.setdefault("protocol", "TCP")


def check_network_policy(obj: Obj, old: Obj | None) -> list[Cause]:
    found: list[Cause] = []
    spec = obj["spec"]
    for i, kind in enumerate(spec["policyTypes"]):
        if kind not in ("Ingress", "Egress"):
            found.append(not_supported(f"spec.policyTypes[{i}]", kind, ("Egress", "Ingress")))
    for direction, side in (("ingress", "from"), ("egress", "to")):
        for i, rule in enumerate(spec.get(direction) or ()):
            for j, peer in enumerate(rule.get(side) or ()):
                if not peer:
                    found.append(required(f"spec.{direction}[{i}].{side}[{j}]", "must specify a peer"))
    return found


def check_budget(obj: Obj, old: Obj | None) -> list[Cause]:
    spec = obj.get("spec") or {}
    if "minAvailable" in spec and "maxUnavailable" in spec:
        return [wrong("spec", "", "minAvailable and maxUnavailable cannot be both set")]
    return []


def check_role(obj: Obj, old: Obj | None) -> list[Cause]:
    found: list[Cause] = []
    for i, rule in enumerate(obj.get("rules") or ()):
        where = f"rules[{i}]"
        if not rule.get("verbs"):
            found.append(required(f"{where}.verbs", "verbs must contain at least one value"))
        if rule.get("nonResourceURLs"):
            continue
        for key in ("apiGroups", "resources"):
            if not rule.get(key):
                found.append(required(f"{where}.{key}", f"resource rules must supply at least one {key}"))
    return found


def binding(obj: Obj) -> None:
    if isinstance(ref := obj.get("roleRef"), dict):
        ref.setdefault("apiGroup", RBAC)
    for subject in obj.get("subjects") or ():
        if subject.get("kind") in ("User", "Group"):
            subject.setdefault("apiGroup", RBAC)


def check_binding(obj: Obj, old: Obj | None) -> list[Cause]:
    ref = obj.get("roleRef")
    if not isinstance(ref, dict) or not ref.get("name"):
        return [required("roleRef.name")]
    if old is not None and ref != old["roleRef"]:
        return [wrong("roleRef", ref, "cannot change roleRef")]
    if ref.get("kind") not in ("Role", "ClusterRole"):
        return [not_supported("roleRef.kind", ref.get("kind"), ("ClusterRole", "Role"))]
    found: list[Cause] = []
    for i, subject in enumerate(obj.get("subjects") or ()):
        if subject.get("kind") not in ("User", "Group", "ServiceAccount"):
            kinds = ("Group", "ServiceAccount", "User")
            found.append(not_supported(f"subjects[{i}].kind", subject.get("kind"), kinds))
        if not subject.get("name"):
            found.append(required(f"subjects[{i}].name"))
        if subject.get("kind") == "ServiceAccount" and not subject.get("namespace"):
            found.append(required(f"subjects[{i}].namespace"))
    return found


def priority(obj: Obj) -> None:
    obj.setdefault("value", 0)
    obj.setdefault("preemptionPolicy", "PreemptLowerPriority")


def check_priority(obj: Obj, old: Obj | None) -> list[Cause]:
    found: list[Cause] = []
    if not isinstance(obj["value"], int) or (
        obj["value"] > 1_000_000_000 and not obj["metadata"]["name"].startswith("system-")
    ):
        found.append(wrong("value", obj["value"], "maximum allowed value of a user defined priority is 1000000000"))
    for field in ("value", "preemptionPolicy"):
        if old is not None and obj[field] != old[field]:
            found.append(not_allowed(field, "may not be changed in an update."))
    return found


def check_runtime_class(obj: Obj, old: Obj | None) -> list[Cause]:
    if not obj.get("handler"):
        return [required("handler")]
    if old is not None and obj["handler"] != old["handler"]:
        return [wrong("handler", obj["handler"], "field is immutable")]
    return []
