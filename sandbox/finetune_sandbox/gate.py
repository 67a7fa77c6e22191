"""Who is asked before an object is written: admission policies, and of creations and updates validating webhooks too.

Connections and mutation are not there: a configuration that asks for them is refused, never half obeyed.
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
OPERATIONS = ("CREATE", "UPDATE", "DELETE")


@dataclass(frozen=True)
class Asked:
    """A write as it would be stored: with its defaults, and past its schema. A deletion has no `new`."""

    user: User
    operation: str
    resource: Resource
    sub: str
    new: Obj | None
    old: Obj | None
    dry_run: bool
    options: Obj | None = None

    @property
    def metadata(self) -> Obj:
        found: Obj = (self.new or self.old or {})["metadata"]
        return found

    @property
    def namespace(self) -> str:
        return str(self.metadata.get("namespace", ""))

    @property
    def name(self) -> str:
        return str(self.metadata.get("name", ""))

    def request(self, uid: str) -> Obj:
        """The members of an AdmissionRequest that are not empty, as a real server sends them, but for the objects."""
        kind = {"group": self.resource.group, "version": self.resource.version, "kind": self.resource.kind}
        what = {"group": self.resource.group, "version": self.resource.version, "resource": self.resource.plural}
        whole = {
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
            "options": self.options,
        }
        return {key: value for key, value in whole.items() if value not in ("", None)}


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
    """Whether `namespaceSelector` and, before or after the write, `objectSelector` let it through to the question."""
    wanted = from_label_selector(where.get("objectSelector") or {})
    if not any(wanted.matches(obj["metadata"].get("labels") or {}) for obj in (asked.new, asked.old) if obj):
        return False
    return placed(where, asked, store)


def placed(where: Mapping[str, Any], asked: Asked, store: Store) -> bool:
    """Whether `namespaceSelector` lets the write through."""
    if not asked.namespace:
        return True
    namespace = store.get("namespaces", "", asked.namespace)
    found = namespace.labels if namespace else {}
    return from_label_selector(where.get("namespaceSelector") or {}).matches(found)


def check_rules(rules: Any, path: str, operations: Sequence[str] = OPERATIONS) -> list[Cause]:
    """What of a configuration's rules this server does not do."""
    found = []
    for i, rule in enumerate(rules or ()):
        for operation in rule.get("operations") or ("",):
            if operation not in operations:
                found.append(not_supported(f"{path}[{i}].operations", operation, operations))
        if rule.get("resourceNames"):
            found.append(not_supported(f"{path}[{i}].resourceNames", rule["resourceNames"], ("none in the sandbox",)))
    return found


def check_match(match: Mapping[str, Any], path: str) -> list[Cause]:
    """What of a policy's matchConstraints or of a binding's matchResources this server does not do."""
    found = []
    if excluded := match.get("excludeResourceRules"):
        found.append(not_supported(f"{path}.excludeResourceRules", excluded, ("none in the sandbox",)))
    return found + check_rules(match.get("resourceRules"), f"{path}.resourceRules")
