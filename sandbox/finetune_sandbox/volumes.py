"""A pod's volumes as folders of the host. What is in them is computed by pure functions; `write_files` writes it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_sandbox.environment import ConfigError, Object, Place, Sources, byte_data, field_value, resource_value

_SIMPLE = ("configMap", "secret", "downwardAPI")
_READ_ONLY = 0o555
TOKEN_MODE = 0o400


class UnsupportedVolume(Exception):
    """A volume that the process node refuses."""


@dataclass(frozen=True)
class File:
    content: bytes
    mode: int


@dataclass(frozen=True)
class Token:
    """A projected service-account token: to be requested, written to `path` in `volume`, and renewed."""

    volume: str
    path: str
    audience: str
    expiration_seconds: int


def check(pod: Object) -> None:
    """Raises UnsupportedVolume for what cannot be presented as a folder, hostPath above all."""
    for volume in pod["spec"].get("volumes") or []:
        kind = volume_type(volume)
        if kind not in (*_SIMPLE, "emptyDir", "projected"):
            raise UnsupportedVolume(
                f'volume "{volume["name"]}" of type {kind} is refused by the process node: '
                "allowed are configMap, secret, downwardAPI, projected and emptyDir"
            )
        for source in projections(volume):
            if volume_type(source) not in (*_SIMPLE, "serviceAccountToken"):
                raise UnsupportedVolume(
                    f'volume "{volume["name"]}" projects {volume_type(source)}, which the process node refuses: '
                    "allowed are configMap, secret, downwardAPI and serviceAccountToken"
                )


def volume_type(volume: Object) -> str:
    return next((key for key in volume if key != "name"), "emptyDir")


def projections(volume: Object) -> list[Object]:
    return list((volume.get("projected") or {}).get("sources") or [])


def in_memory(volume: Object) -> bool:
    return bool((volume.get("emptyDir") or {}).get("medium") == "Memory")


def volume_sources(pod: Object) -> set[tuple[str, str]]:
    """The Secrets and ConfigMaps that a pod's volumes name, as (kind, name)."""
    found: set[tuple[str, str]] = set()
    for volume in pod["spec"].get("volumes") or []:
        for part in (volume, *projections(volume)):
            if "configMap" in part:
                found.add(("ConfigMap", part["configMap"]["name"]))
            if "secret" in part:
                found.add(("Secret", part["secret"].get("secretName") or part["secret"].get("name")))
    return found


def tokens(pod: Object) -> list[Token]:
    return [
        Token(
            volume["name"],
            source["serviceAccountToken"]["path"],
            source["serviceAccountToken"].get("audience") or "",
            int(source["serviceAccountToken"].get("expirationSeconds") or 3600),
        )
        for volume in pod["spec"].get("volumes") or []
        for source in projections(volume)
        if "serviceAccountToken" in source
    ]


def files(pod: Object, volume: Object, sources: Sources, place: Place) -> dict[str, File]:
    """A volume's files by relative path, tokens apart. Read-only, whatever mode is asked for.

    Raises ConfigError where a Secret, ConfigMap or key that is not optional is absent.
    """
    kind = volume_type(volume)
    if kind == "emptyDir":
        return {}
    mode = int(volume[kind].get("defaultMode") or 0o644)
    parts = projections(volume) if kind == "projected" else [volume]
    found: dict[str, File] = {}
    for part in parts:
        for path, content, own_mode in _contents(pod, part, sources, place):
            if path.startswith("/") or ".." in path.split("/"):
                raise ConfigError(f'volume "{volume["name"]}": path "{path}" must be relative and without ".."')
            found[path] = File(content, (own_mode or mode) & _READ_ONLY)
    return found


def _contents(pod: Object, part: Object, sources: Sources, place: Place) -> Iterator[tuple[str, bytes, int | None]]:
    if "downwardAPI" in part:
        for item in part["downwardAPI"].get("items") or []:
            if "fieldRef" in item:
                value = field_value(pod, item["fieldRef"]["fieldPath"], place)
            else:
                value = resource_value(pod, {}, item["resourceFieldRef"], place)
            yield item["path"], value.encode(), item.get("mode")
    for kind, key in (("ConfigMap", "configMap"), ("Secret", "secret")):
        if key in part:
            yield from _keyed(kind, part[key], sources, pod["metadata"]["namespace"])


def _keyed(
    kind: str, reference: Mapping[str, Any], sources: Sources, namespace: str
) -> Iterator[tuple[str, bytes, int | None]]:
    name = str(reference.get("secretName") or reference["name"])
    found = sources.get((kind, name))
    optional = bool(reference.get("optional"))
    if found is None and not optional:
        raise ConfigError(f'{kind.lower()} "{name}" not found')
    data = byte_data(found) if found else {}
    if not reference.get("items"):
        yield from ((key, content, None) for key, content in data.items())
        return
    for item in reference["items"]:
        if item["key"] in data:
            yield item["path"], data[item["key"]], item.get("mode")
        elif not optional:
            raise ConfigError(f"references non-existent {kind.lower()} key: {item['key']} in {namespace}/{name}")


def write_files(folder: Path, content: Mapping[str, File]) -> None:
    for relative, file in content.items():
        write_file(folder / relative, file)


def write_file(path: Path, file: File) -> None:
    """Replaces the file in one step, so that a reader sees the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    with os.fdopen(handle, "wb") as stream:
        stream.write(file.content)
        os.fchmod(stream.fileno(), file.mode)
    os.replace(temporary, path)
