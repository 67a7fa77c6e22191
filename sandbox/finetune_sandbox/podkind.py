"""Pods and pod templates: defaults, validation, and what may change once a pod is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune_sandbox import canonical
from finetune_sandbox.errors import Cause, Obj, bad_request, duplicate, not_allowed, not_supported, required, wrong
from finetune_sandbox.meta import LABEL, LABEL_RULE, check_labels, now
from finetune_sandbox.quantity import parse

GRACE_SECONDS = 30
_CONTAINERS = ("initContainers", "containers")
_FILE_MODE_SOURCES = ("secret", "configMap", "downwardAPI", "projected")
_FIELD_PATHS = (
    "metadata.name", "metadata.namespace", "metadata.uid", "spec.nodeName", "spec.serviceAccountName",
    "status.hostIP", "status.hostIPs", "status.podIP", "status.podIPs",
)  # fmt: skip
_UPDATE_RULE = (
    "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,"
    "`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),"
    "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
)
_VALUE_SOURCES = ("fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef", "fileKeyRef")


def default(pod: Obj) -> None:
    spec = pod.get("spec")
    if not isinstance(spec, dict):
        raise bad_request("spec: expected an object")
    default_spec(spec)
    for container in containers(spec):  # on pods, not on templates: a limit is also a request
        resources = container.get("resources") or {}
        if limits := resources.get("limits"):
            resources["requests"] = {**limits, **(resources.get("requests") or {})}
    spec.setdefault("enableServiceLinks", True)
    for toleration in ("not-ready", "unreachable"):
        _tolerate(spec, f"node.kubernetes.io/{toleration}")


def _tolerate(spec: Obj, key: str) -> None:
    tolerations = spec.setdefault("tolerations", [])
    if not any(t.get("key") in (key, None, "") and t.get("effect") in ("NoExecute", None, "") for t in tolerations):
        tolerations.append({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300})


def default_spec(spec: Obj) -> None:
    """The defaults that pods and templates share. Raises ApiError 400 where a list is no list of objects."""
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("dnsPolicy", "ClusterFirst")
    spec.setdefault("schedulerName", "default-scheduler")
    grace = spec.setdefault("terminationGracePeriodSeconds", GRACE_SECONDS)
    if isinstance(grace, int) and grace < 0:
        spec["terminationGracePeriodSeconds"] = 1
    if spec.get("securityContext") is None:
        spec["securityContext"] = {}
    if spec.get("serviceAccountName"):
        spec["serviceAccount"] = spec["serviceAccountName"]
    for field in (*_CONTAINERS, "volumes", "tolerations"):
        if not all(isinstance(item, dict) for item in spec.get(field) or ()):
            raise bad_request(f"spec.{field}: expected objects")
    for container in containers(spec):
        _default_container(container)
    for volume in spec.get("volumes") or ():
        if len(volume) == 1:
            volume["emptyDir"] = {}
        for source in _FILE_MODE_SOURCES:
            if isinstance(volume.get(source), dict):
                volume[source].setdefault("defaultMode", 420)
        for part in (volume.get("projected") or {}).get("sources") or ():
            if isinstance(token := part.get("serviceAccountToken"), dict):
                token.setdefault("expirationSeconds", 3600)
        _default_field_refs(volume)


def _default_container(container: Obj) -> None:
    container.setdefault("terminationMessagePath", "/dev/termination-log")
    container.setdefault("terminationMessagePolicy", "File")
    image = str(container.get("image", ""))
    latest = "@" not in image and (image.endswith(":latest") or ":" not in image.rpartition("/")[2])
    container.setdefault("imagePullPolicy", "Always" if latest else "IfNotPresent")
    resources = container.get("resources")
    if resources is None:
        container["resources"] = resources = {}
    for kind in ("limits", "requests"):
        if kind in resources:
            resources[kind] = canonical.canonical_map(resources[kind])
    for port in container.get("ports") or ():
        port.setdefault("protocol", "TCP")
    for variable in container.get("env") or ():
        _default_field_refs(variable.get("valueFrom") or {})
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        if isinstance(container.get(probe), dict):
            times = {"timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3}
            container[probe] = times | container[probe]


def _default_field_refs(value: Any) -> None:
    """A fieldRef without a version is of v1."""
    if isinstance(value, dict):
        for key, child in value.items():
            if key == "fieldRef" and isinstance(child, dict):
                child.setdefault("apiVersion", "v1")
            else:
                _default_field_refs(child)
    elif isinstance(value, list):
        for child in value:
            _default_field_refs(child)


def containers(spec: Mapping[str, Any]) -> Iterable[Obj]:
    return (c for field in _CONTAINERS for c in spec.get(field) or ())


def prepare(pod: Obj, old: Obj | None) -> None:
    if old is None:
        pod["status"] = {"phase": "Pending", "qosClass": _quality(pod["spec"])}
        if pod["spec"].get("schedulingGates"):
            gated = {
                "type": "PodScheduled",
                "status": "False",
                "reason": "SchedulingGated",
                "lastTransitionTime": now(),
            }
            pod["status"]["conditions"] = [
                gated | {"message": "Scheduling is blocked due to non-empty scheduling gates"}
            ]
    elif "status" in pod:
        pod["status"].setdefault("qosClass", (old.get("status") or {}).get("qosClass", "BestEffort"))


def _quality(spec: Mapping[str, Any]) -> str:
    """BestEffort without requests, Guaranteed where every container's cpu and memory limits are its requests."""
    pairs = [(c["resources"].get("requests") or {}, c["resources"].get("limits") or {}) for c in containers(spec)]
    if not any(r.get(k) or li.get(k) for r, li in pairs for k in ("cpu", "memory")):
        return "BestEffort"
    full = all(li.get(k) and r.get(k) == li.get(k) for r, li in pairs for k in ("cpu", "memory"))
    return "Guaranteed" if full else "Burstable"


def validate(pod: Obj, old: Obj | None) -> list[Cause]:
    if old is not None:
        return _validate_update(pod["spec"], old["spec"])
    return check_spec(pod["spec"], "spec")


def _validate_update(spec: Obj, old: Obj) -> list[Cause]:
    """Only images, the deadline, more tolerations, fewer gates and a shorter grace period may change."""
    allowed = ("activeDeadlineSeconds", "tolerations", "schedulingGates", "terminationGracePeriodSeconds")

    def rest(value: Obj) -> Obj:
        kept = {k: v for k, v in value.items() if k not in allowed}
        for field in _CONTAINERS:
            kept[field] = [{k: v for k, v in c.items() if k != "image"} for c in value.get(field) or ()]
        return kept

    found: list[Cause] = []
    if any(t not in spec.get("tolerations", ()) for t in old.get("tolerations") or ()):
        found.append(
            not_allowed("spec.tolerations", "existing toleration can not be modified except its tolerationSeconds")
        )
    if rest(spec) != rest(old):
        found.append(not_allowed("spec", _UPDATE_RULE))
    return found


def check_spec(spec: Obj, path: str) -> list[Cause]:
    """What is wrong with a pod's or a template's spec."""
    found = [] if spec.get("containers") else [required(f"{path}.containers")]
    volumes = _check_volumes(spec.get("volumes") or (), f"{path}.volumes", found)
    seen: set[str] = set()
    for field in _CONTAINERS:
        for i, container in enumerate(spec.get(field) or ()):
            where = f"{path}.{field}[{i}]"
            name = container.get("name", "")
            if name in seen:
                found.append(duplicate(f"{where}.name", name))
            seen.add(name)
            found += _label(f"{where}.name", name) + _check_container(container, where, volumes)
    if path == "spec" and spec["restartPolicy"] not in ("Always", "OnFailure", "Never"):
        found.append(not_supported(f"{path}.restartPolicy", spec["restartPolicy"], ("Always", "OnFailure", "Never")))
    for field in ("hostname", "subdomain"):
        if spec.get(field):
            found += _label(f"{path}.{field}", spec[field])
    deadline = spec.get("activeDeadlineSeconds")
    if deadline is not None and (not isinstance(deadline, int) or deadline < 1):
        found.append(wrong(f"{path}.activeDeadlineSeconds", deadline, "must be between 1 and 2147483647, inclusive"))
    if not isinstance(grace := spec["terminationGracePeriodSeconds"], int):
        raise bad_request(f"{path}.terminationGracePeriodSeconds: expected seconds, found {grace!r}")
    for i, toleration in enumerate(spec.get("tolerations") or ()):
        found += _check_toleration(toleration, f"{path}.tolerations[{i}]")
    return found + check_labels(spec.get("nodeSelector") or {}, f"{path}.nodeSelector")


def _label(path: str, name: Any) -> list[Cause]:
    if not name:
        return [required(path)]
    if len(str(name)) > 63:
        return [wrong(path, name, "must be no more than 63 characters")]
    return [] if LABEL.fullmatch(str(name)) else [wrong(path, name, LABEL_RULE)]


def _check_toleration(toleration: Obj, path: str) -> list[Cause]:
    operator, effect = toleration.get("operator") or "Equal", toleration.get("effect") or ""
    found: list[Cause] = []
    if operator not in ("Equal", "Exists"):
        found.append(not_supported(f"{path}.operator", operator, ("Equal", "Exists")))
    elif operator == "Exists" and toleration.get("value"):
        found.append(wrong(f"{path}.operator", toleration["value"], "value must be empty when `operator` is 'Exists'"))
    elif operator == "Equal" and not toleration.get("key"):
        found.append(wrong(f"{path}.operator", operator, "operator must be Exists when `key` is empty, which means "
                           '"match all values and all keys"'))  # fmt: skip
    if effect not in ("", "NoSchedule", "PreferNoSchedule", "NoExecute"):
        found.append(not_supported(f"{path}.effect", effect, ("NoSchedule", "PreferNoSchedule", "NoExecute")))
    return found


def _check_volumes(volumes: Sequence[Obj], path: str, found: list[Cause]) -> set[str]:
    names: set[str] = set()
    for i, volume in enumerate(volumes):
        where, name = f"{path}[{i}]", volume.get("name", "")
        found += _label(f"{where}.name", name)
        if name in names:
            found.append(duplicate(f"{where}.name", name))
        names.add(name)
        sources = [k for k in volume if k != "name"]
        if not sources:
            found.append(required(where, "must specify a volume type"))
        for extra in sources[1:]:
            found.append(not_allowed(f"{where}.{extra}", "may not specify more than 1 volume type"))
        for source, key in (("secret", "secretName"), ("configMap", "name"), ("persistentVolumeClaim", "claimName")):
            if source in volume and not (volume[source] or {}).get(key):
                found.append(required(f"{where}.{source}.{key}"))
        for j, part in enumerate((volume.get("projected") or {}).get("sources") or ()):
            seconds = (part.get("serviceAccountToken") or {}).get("expirationSeconds", 3600)
            if not isinstance(seconds, int) or seconds < 600:
                field = f"{where}.projected.sources[{j}].serviceAccountToken.expirationSeconds"
                found.append(wrong(field, seconds, "may not specify a duration less than 10 minutes"))
    return names


def _check_container(container: Obj, path: str, volumes: set[str]) -> list[Cause]:
    found = [] if container.get("image") else [required(f"{path}.image")]
    if container["terminationMessagePolicy"] not in ("File", "FallbackToLogsOnError"):
        policies = ("FallbackToLogsOnError", "File")
        found.append(not_supported(f"{path}.terminationMessagePolicy", container["terminationMessagePolicy"], policies))
    if container["imagePullPolicy"] not in ("Always", "IfNotPresent", "Never"):
        pulls = ("Always", "IfNotPresent", "Never")
        found.append(not_supported(f"{path}.imagePullPolicy", container["imagePullPolicy"], pulls))
    for i, variable in enumerate(container.get("env") or ()):
        found += _check_variable(variable, f"{path}.env[{i}]")
    mounted: set[str] = set()
    for i, mount in enumerate(container.get("volumeMounts") or ()):
        where, name, at = f"{path}.volumeMounts[{i}]", mount.get("name", ""), mount.get("mountPath", "")
        if name not in volumes:
            found.append(Cause(f"{where}.name", f'Not found: "{name}"', "FieldValueNotFound"))
        if not at:
            found.append(required(f"{where}.mountPath"))
        elif at in mounted:
            found.append(wrong(f"{where}.mountPath", at, "must be unique"))
        mounted.add(at)
    for i, port in enumerate(container.get("ports") or ()):
        number = port.get("containerPort")
        if not isinstance(number, int) or not 1 <= number <= 65535:
            found.append(wrong(f"{path}.ports[{i}].containerPort", number, "must be between 1 and 65535, inclusive"))
    return found + _check_resources(container["resources"], f"{path}.resources")


def _check_variable(variable: Obj, path: str) -> list[Cause]:
    name, source = variable.get("name", ""), variable.get("valueFrom")
    found: list[Cause] = []
    if not name:
        found.append(required(f"{path}.name"))
    elif "=" in name or not name.isprintable():
        why = "a valid environment variable name must consist only of printable ASCII characters other than '='"
        found.append(wrong(f"{path}.name", name, why))
    if source is None:
        if not isinstance(variable.get("value", ""), str):
            raise bad_request(f"{path}.value: expected a string, found {type(variable['value']).__name__}")
        return found
    kinds = [k for k in _VALUE_SOURCES if k in source]
    if variable.get("value"):
        found.append(wrong(f"{path}.valueFrom", "", "may not be specified when `value` is not empty"))
    if len(kinds) != 1:
        why = "must specify exactly one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef` or `secretKeyRef`"
        found.append(wrong(f"{path}.valueFrom", "", why))
    field = (source.get("fieldRef") or {}).get("fieldPath", "metadata.name")
    if field not in _FIELD_PATHS and not field.startswith(("metadata.labels['", "metadata.annotations['")):
        found.append(not_supported(f"{path}.valueFrom.fieldRef.fieldPath", field, _FIELD_PATHS))
    for kind in ("configMapKeyRef", "secretKeyRef"):
        if kind in source and not source[kind].get("key"):
            found.append(required(f"{path}.valueFrom.{kind}.key"))
    return found


def _check_resources(resources: Obj, path: str) -> list[Cause]:
    found: list[Cause] = []
    values: dict[tuple[str, str], Any] = {}
    for kind in ("limits", "requests"):
        for name, text in (resources.get(kind) or {}).items():
            try:
                values[(kind, name)] = parse(text)
            except ValueError as error:
                raise bad_request(f"{path}.{kind}[{name}]: {error}") from error
            if values[(kind, name)] < 0:
                found.append(wrong(f"{path}.{kind}[{name}]", text, "must be greater than or equal to 0"))
    for (kind, name), value in values.items():
        if kind != "requests":
            continue
        limit = values.get(("limits", name))
        extended = "/" in name
        if limit is None and extended:
            found.append(required(f"{path}.limits", "Limit must be set for non overcommitable resources"))
        elif limit is not None and (value > limit or (extended and value != limit)):
            relation = "equal to" if extended else "less than or equal to"
            text = f"must be {relation} {name} limit of {resources['limits'][name]}"
            found.append(wrong(f"{path}.requests", resources["requests"][name], text))
    return found
