"""What a container's process is told: variables, arguments, addresses. Pure functions over pods as plain dicts."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_sandbox.quantity import parse

Object = Mapping[str, Any]
Sources = Mapping[tuple[str, str], Object | None]
"""The Secrets and ConfigMaps that a pod names, by (kind, name); None: there is no such object."""

_REFERENCE = re.compile(r"\$(?:\$|\(([-._a-zA-Z0-9]+)\))")
_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")
_POD_NAME = re.compile(r"([a-z0-9-]+)\.([a-z0-9-]+)\.([a-z0-9-]+)\.svc(?:\.cluster\.local)?\.?")


class ConfigError(Exception):
    """The container cannot be configured (yet): a kubelet's CreateContainerConfigError."""


@dataclass(frozen=True)
class Mount:
    """`path`, as the pod names it, is `host` on this machine."""

    path: str
    host: str


@dataclass(frozen=True)
class Place:
    """Where a pod runs, as its downward API reports it. `seed` tells clusters on one machine apart."""

    node: str
    host_ip: str
    pod_ip: str
    seed: str
    allocatable: Mapping[str, str]


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` becomes the variable's value, `$$` a dollar; an unknown name stays as it is, as in a kubelet."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return variables.get(match[1], match[0])

    return _REFERENCE.sub(value, text)


def rewrite(text: str, mounts: Sequence[Mount]) -> str:
    """A text that is a mounted path or lies below one, with the host's path instead; the longest path wins."""
    for mount in sorted(mounts, key=lambda mount: len(mount.path), reverse=True):
        path = mount.path.rstrip("/")
        if text in (path, mount.path):
            return mount.host
        if path and text.startswith(path + "/"):
            return mount.host + text[len(path) :]
    return text


def pod_address(seed: str, namespace: str, subdomain: str, hostname: str) -> str:
    """The loopback address of the pod that has this DNS name, known before the pod exists.

    One of 16 million, by hash: never 127.0.x.x, which belongs to the host.
    """
    digest = hashlib.sha256("\0".join((seed, namespace, subdomain, hostname)).encode()).digest()
    return f"127.{digest[0] % 254 + 1}.{digest[1]}.{digest[2] % 254 + 1}"


def own_address(seed: str, pod: Object) -> str:
    metadata, spec = pod["metadata"], pod["spec"]
    hostname = spec.get("hostname") or metadata["name"]
    subdomain = spec.get("subdomain")
    return pod_address(seed, metadata["namespace"], subdomain or "", hostname if subdomain else metadata["uid"])


def resolve_pod_name(text: str, seed: str) -> str:
    """A text that is exactly `<hostname>.<subdomain>.<namespace>.svc` becomes that pod's address."""
    match = _POD_NAME.fullmatch(text)
    return pod_address(seed, match[3], match[2], match[1]) if match else text


def field_value(pod: Object, path: str, place: Place) -> str:
    """A downward API fieldRef. Raises ConfigError for a path that a kubelet would not know either."""
    metadata, spec = pod["metadata"], pod["spec"]
    if match := _SUBSCRIPT.fullmatch(path):
        return str((metadata.get(match[1]) or {}).get(match[2], ""))
    if path in ("metadata.labels", "metadata.annotations"):
        entries = metadata.get(path.removeprefix("metadata.")) or {}
        return "\n".join(f'{key}="{_escape(str(value))}"' for key, value in sorted(entries.items()))
    values = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": place.node,
        "spec.serviceAccountName": spec.get("serviceAccountName") or "default",
        "status.podIP": place.pod_ip,
        "status.podIPs": place.pod_ip,
        "status.hostIP": place.host_ip,
        "status.hostIPs": place.host_ip,
    }
    if path not in values:
        raise ConfigError(f'fieldRef "{path}" is not supported')
    return str(values[path])


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def resource_value(pod: Object, container: Object, reference: Object, place: Place) -> str:
    """A downward API resourceFieldRef: rounded up to whole divisors; an absent limit is the node's allocatable."""
    name = reference.get("containerName")
    if name:
        everyone = [*(pod["spec"].get("initContainers") or []), *pod["spec"]["containers"]]
        found = [candidate for candidate in everyone if candidate["name"] == name]
        if not found:
            raise ConfigError(f'resourceFieldRef names container "{name}", which the pod does not have')
        container = found[0]
    section, _, key = str(reference["resource"]).partition(".")
    resources = container.get("resources") or {}
    value = (resources.get(section) or {}).get(key)
    if value is None:
        fallback = place.allocatable.get(key, "0") if section == "limits" else "0"
        value = (resources.get("limits") or {}).get(key, fallback) if section == "requests" else fallback
    return str(math.ceil(parse(value) / (parse(reference.get("divisor") or "1") or 1)))


def _entry(sources: Sources, kind: str, reference: Object, namespace: str) -> str | None:
    """The value of a secretKeyRef or configMapKeyRef; None where it is optional and absent."""
    name, key = str(reference["name"]), str(reference["key"])
    found = sources.get((kind, name))
    data = text_data(found) if found else {}
    if key in data:
        return data[key]
    if reference.get("optional"):
        return None
    if found is None:
        raise ConfigError(f'{kind.lower()} "{name}" not found')
    raise ConfigError(f"couldn't find key {key} in {kind} {namespace}/{name}")


def text_data(item: Object) -> dict[str, str]:
    """A Secret's or ConfigMap's entries as text (environment variables hold no bytes)."""
    return {key: value.decode(errors="surrogateescape") for key, value in byte_data(item).items()}


def byte_data(item: Object) -> dict[str, bytes]:
    if item["kind"] == "Secret":
        return {key: base64.b64decode(value) for key, value in (item.get("data") or {}).items()}
    plain = {key: str(value).encode() for key, value in (item.get("data") or {}).items()}
    return plain | {key: base64.b64decode(value) for key, value in (item.get("binaryData") or {}).items()}


def environment(pod: Object, container: Object, sources: Sources, place: Place) -> dict[str, str]:
    """The variables that the pod's spec gives a container, expanded but with the pod's own paths and names.

    Raises ConfigError with a kubelet's words where something that is not optional is absent.
    """
    variables: dict[str, str] = {}
    for group in container.get("envFrom") or []:
        variables |= _from_source(group, sources)
    for entry in container.get("env") or []:
        value = _value(pod, container, entry, sources, place, variables)
        if value is not None:
            variables[entry["name"]] = value
    return variables


def _from_source(group: Object, sources: Sources) -> dict[str, str]:
    kind = "Secret" if "secretRef" in group else "ConfigMap"
    reference = group.get("secretRef") or group["configMapRef"]
    found = sources.get((kind, reference["name"]))
    if found is None:
        if reference.get("optional"):
            return {}
        raise ConfigError(f'{kind.lower()} "{reference["name"]}" not found')
    return {str(group.get("prefix") or "") + key: value for key, value in text_data(found).items()}


def _value(
    pod: Object, container: Object, entry: Object, sources: Sources, place: Place, variables: Mapping[str, str]
) -> str | None:
    origin = entry.get("valueFrom")
    if not origin:
        return expand(str(entry.get("value") or ""), variables)
    namespace = pod["metadata"]["namespace"]
    if "fieldRef" in origin:
        return field_value(pod, origin["fieldRef"]["fieldPath"], place)
    if "resourceFieldRef" in origin:
        return resource_value(pod, container, origin["resourceFieldRef"], place)
    if "secretKeyRef" in origin:
        return _entry(sources, "Secret", origin["secretKeyRef"], namespace)
    if "configMapKeyRef" in origin:
        return _entry(sources, "ConfigMap", origin["configMapKeyRef"], namespace)
    raise ConfigError(f'env "{entry["name"]}": valueFrom {sorted(origin)} is not supported')


def env_sources(container: Object) -> set[tuple[str, str]]:
    """The Secrets and ConfigMaps that a container's variables name, as (kind, name)."""
    found: set[tuple[str, str]] = set()
    for group in container.get("envFrom") or []:
        found |= {("Secret", group["secretRef"]["name"])} if "secretRef" in group else set()
        found |= {("ConfigMap", group["configMapRef"]["name"])} if "configMapRef" in group else set()
    for entry in container.get("env") or []:
        origin = entry.get("valueFrom") or {}
        found |= {("Secret", origin["secretKeyRef"]["name"])} if "secretKeyRef" in origin else set()
        found |= {("ConfigMap", origin["configMapKeyRef"]["name"])} if "configMapKeyRef" in origin else set()
    return found


@dataclass(frozen=True)
class Invocation:
    command: tuple[str, ...]
    env: Mapping[str, str]
    working_dir: str


def invocation(
    pod: Object, container: Object, variables: Mapping[str, str], mounts: Sequence[Mount], place: Place, root: str
) -> Invocation:
    """Command, arguments and variables as the process gets them: mounted paths are host paths, pod names addresses.

    `root` is the working directory (and HOME) of a container that names none.
    """
    words = [*(container.get("command") or []), *(container.get("args") or [])]
    command = tuple(rewrite(expand(word, variables), mounts) for word in words)
    env = {name: resolve_pod_name(rewrite(value, mounts), place.seed) for name, value in variables.items()}
    env = {"HOME": root, "HOSTNAME": str(pod["spec"].get("hostname") or pod["metadata"]["name"])} | env
    # `root` is a path of this machine already, and may well begin like a mount.
    working_dir = rewrite(container["workingDir"], mounts) if container.get("workingDir") else root
    return Invocation(command, env, working_dir)
