"""Serves a CRD from the moment that it is stored until the last of its objects is gone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_sandbox import custom
from finetune_sandbox.errors import invalid as invalid_error
from finetune_sandbox.errors import wrong
from finetune_sandbox.registry import Registry
from finetune_sandbox.resources import Resource
from finetune_sandbox.store import Entry

KIND = "CustomResourceDefinition"


class CrdLoader:
    """Follows the stored CRDs; a CRD that would take a name of another kind is refused."""

    def __init__(self, registry: Registry) -> None:
        self.registry, self.store = registry, registry.store
        registry.admission.append(self._admit)
        registry.observers.append(self._observe)

    def _admit(self, resource: Resource, crd: dict[str, Any]) -> None:
        if resource.kind != KIND:
            return
        spec: Mapping[str, Any] = crd["spec"]
        key = f"{spec.get('names', {}).get('plural')}.{spec.get('group')}"
        taken = self.registry.kinds.by_key.get(key)
        if taken is not None and not taken.custom:
            cause = wrong("spec.names.plural", spec["names"]["plural"], f"{key} is a built-in kind")
            raise invalid_error(KIND, resource.group, crd["metadata"].get("name", ""), [cause])

    def _observe(self, resource: Resource, before: Entry | None, after: Entry | None) -> None:
        if resource.kind != KIND:
            return
        entry = after or before
        assert entry is not None
        key = entry.key[1]
        kinds = self.registry.kinds
        if after is None:
            kinds.remove(key)
            self.store.drop(key)
            return
        if before is not None and before.obj["spec"] == after.obj["spec"]:
            return
        made = custom.resource(after.obj)
        if before is not None:
            kinds.remove(key)
        kinds.add(made)
        if key not in self.store.tables:
            self.store.define(key, made.selectable)
