"""What kinds there are: one row each for the built-in ones; a registered CRD adds a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_sandbox.errors import Cause, Obj

VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")
NAME_FIELDS = ("metadata.name", "metadata.namespace")


def _nothing(obj: Obj) -> None:
    return None


def _prepared(obj: Obj, old: Obj | None) -> None:
    return None


def _valid(obj: Obj, old: Obj | None) -> list[Cause]:
    return []


@dataclass(frozen=True)
class Column:
    """One column of a Table; `cell` gets the object and answers a string, integer, number, boolean or None."""

    name: str
    cell: Callable[[Mapping[str, Any]], Any]
    type: str = "string"
    priority: int = 0
    description: str = ""
    format: str = ""


@dataclass(frozen=True)
class Resource:
    """A kind and what is particular to it.

    `default(obj)` fills in, `prepare(new, old)` sets what the server decides (old is None on create),
    `validate(new, old)` names what is wrong. `schema` is a CRD's structural schema, None for built-in kinds.
    """

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    status: bool = False
    generation: bool = False
    subresources: tuple[str, ...] = ()
    names: str = "subdomain"
    keeps_status: bool = False  # the status given on create is stored
    default: Callable[[Obj], None] = _nothing
    prepare: Callable[[Obj, Obj | None], None] = _prepared
    validate: Callable[[Obj, Obj | None], list[Cause]] = _valid
    columns: tuple[Column, ...] = ()
    schema: Mapping[str, Any] | None = None
    singular: str = ""
    list_kind: str = ""

    @property
    def key(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def custom(self) -> bool:
        return self.schema is not None

    @property
    def core(self) -> bool:
        return not self.custom and self.group != "apiextensions.k8s.io"

    @property
    def selectable(self) -> tuple[str, ...]:
        return NAME_FIELDS + self.fields

    def discovery(self) -> list[Obj]:
        """The rows of an APIResourceList."""
        first: Obj = {"name": self.plural, "singularName": self.singular or self.kind.lower()}
        first |= {"namespaced": self.namespaced, "kind": self.kind, "verbs": list(VERBS)}
        if self.short_names:
            first["shortNames"] = list(self.short_names)
        if self.categories:
            first["categories"] = list(self.categories)
        rows = [first]
        if self.status:
            rows.append(self._sub("status", self.kind, ["get", "patch", "update"]))
        for name in self.subresources:
            kind, verbs = SUBRESOURCES[name]
            rows.append(self._sub(name, kind or self.kind, list(verbs)))
        return rows

    def _sub(self, name: str, kind: str, verbs: list[str]) -> Obj:
        row: Obj = {"name": f"{self.plural}/{name}", "singularName": "", "namespaced": self.namespaced, "kind": kind}
        if name in ("token", "eviction"):
            group = {"token": "authentication.k8s.io", "eviction": "policy"}[name]
            row |= {"group": group, "version": "v1"}
        return row | {"verbs": verbs}


SUBRESOURCES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "binding": ("Binding", ("create",)),
    "eviction": ("Eviction", ("create",)),
    "finalize": ("", ("update",)),
    "log": ("", ("get",)),
    "token": ("TokenRequest", ("create",)),
}


class Kinds:
    """The resources that are served now, by (group, version, plural) and by group."""

    def __init__(self, rows: tuple[Resource, ...]) -> None:
        self._rows: dict[tuple[str, str, str], Resource] = {}
        self.by_key: dict[str, Resource] = {}
        for row in rows:
            self.add(row)

    def add(self, resource: Resource) -> None:
        self._rows[(resource.group, resource.version, resource.plural)] = resource
        self.by_key[resource.key] = resource

    def remove(self, key: str) -> None:
        resource = self.by_key.pop(key)
        del self._rows[(resource.group, resource.version, resource.plural)]

    def find(self, group: str, version: str, plural: str) -> Resource | None:
        return self._rows.get((group, version, plural))

    def all(self) -> list[Resource]:
        return list(self._rows.values())

    def groups(self) -> dict[str, list[str]]:
        """Named groups with their versions, in the order of registration."""
        found: dict[str, list[str]] = {}
        for group, version, _ in self._rows:
            if group and version not in found.setdefault(group, []):
                found[group].append(version)
        return found

    def version(self, group: str, version: str) -> list[Resource]:
        return [r for (g, v, _), r in self._rows.items() if (g, v) == (group, version)]
