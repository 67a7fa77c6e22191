"""Who is asked before an object is written: admission policies and validating webhooks, of creations and updates.

Deletions, connections and mutation are not there: a configuration that asks for them is refused, never half obeyed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_sandbox.auth import User
from finetune_sandbox.errors import Cause, Obj, not_supported
from finetune_sandbox.resources import Resource
from finetune_sandbox.selectors import from_label_selector
from finetune_sandbox.store import Filter, Store

REGISTRATION = "admissionregistration.k8s.io"
OPERATIONS = ("CREATE", "UPDATE")


@dataclass(frozen=True)
class Asked:
    """A write as it would be stored: with its defaults, and past its schema."""

    user: User
    operation: str
    resource: Resource
    sub: str
    new: Obj
    old: Obj | None
    dry_run: bool

    @property
    def namespace(self) -> str:
        return str(self.new["metadata"].get("namespace", ""))

    @property
    def name(self) -> str:
        return str(self.new["metadata"]["name"])

    def request(self, uid: str) -> Obj:
        """The members of an AdmissionRequest, but for the objects."""
        kind = {"group": self.resource.group, "version": self.resource.version, "kind": self.resource.kind}
        what = {"group": self.resource.group, "version": self.resource.version, "resource": self.resource.plural}
        return {
            "uid": uid,
            "kind": kind,
            "requestKind": kind,
            "resource": what,
            "requestResource": what,
            "subResource": self.sub,
            "name": self.name,
            "namespace": self.namespace,
            "operation": self.operation,
            "userInfo": self.user.info(),
            "dryRun": self.dry_run,
        }


def configurations(store: Store, plural: str) -> Iterator[Obj]:
    """The registered objects of this kind, by name."""
    found = [entry.obj for entry in store.tables[f"{plural}.{REGISTRATION}"].select(Filter())]
    return iter(sorted(found, key=lambda obj: str(obj["metadata"]["name"])))


def meant(rules: Sequence[Mapping[str, Any]], asked: Asked) -> bool:
    """Whether one of these rules names the write."""
    resource = f"{asked.resource.plural}/{asked.sub}" if asked.sub else asked.resource.plural
    alike = {resource, f"{asked.resource.plural}/*", f"*/{asked.sub}", "*/*"} if asked.sub else {resource, "*", "*/*"}

    def has(rule: Mapping[str, Any], key: str, *wanted: str) -> bool:
        return not {"*", *wanted}.isdisjoint(rule.get(key) or ())

    return any(
        has(rule, "apiGroups", asked.resource.group)
        and has(rule, "apiVersions", asked.resource.version)
        and asked.operation in rule["operations"]
        and not alike.isdisjoint(rule["resources"])
        and rule.get("scope", "*") in ("*", "Namespaced" if asked.namespace else "Cluster")
        for rule in rules
    )


def selected(where: Mapping[str, Any], asked: Asked, store: Store) -> bool:
    """Whether `namespaceSelector` and `objectSelector` let the write through to the question."""
    labels = asked.new["metadata"].get("labels") or {}
    if not from_label_selector(where.get("objectSelector") or {}).matches(labels):
        return False
    if not asked.namespace:
        return True
    namespace = store.get("namespaces", "", asked.namespace)
    found = namespace.labels if namespace else {}
    return from_label_selector(where.get("namespaceSelector") or {}).matches(found)


def check_rules(rules: Any, path: str) -> list[Cause]:
    """What of a configuration's rules this server does not do."""
    found = []
    for i, rule in enumerate(rules or ()):
        for operation in rule.get("operations") or ("",):
            if operation not in OPERATIONS:
                found.append(not_supported(f"{path}[{i}].operations", operation, OPERATIONS))
    return found
