"""What the controller manager does for every kind: garbage collection (pods that no node had too), namespaces, the end
of a CRD.

Driven by changes alone: an object is looked at when an owner of it goes or it names one that is not there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from finetune_sandbox import custom
from finetune_sandbox.auth import User
from finetune_sandbox.errors import ApiError, Obj
from finetune_sandbox.gate import Asked
from finetune_sandbox.identities import GARBAGE_COLLECTOR, NAMESPACE_CONTROLLER, POD_COLLECTOR
from finetune_sandbox.policies import Policies
from finetune_sandbox.registry import FOREGROUND, ORPHAN, DeleteOptions, Registry
from finetune_sandbox.resources import Resource
from finetune_sandbox.store import Entry, Key

log = logging.getLogger(__name__)
Place = tuple[str, Key]
DENIED, RETRY_SECONDS = (403, 422), 2.0  # by a policy, which may be another one by then
ABANDONED_SECONDS = 1.0  # a real pod garbage collector comes by every 20; others may see the pod terminating meanwhile


class Collector:
    def __init__(self, registry: Registry, policies: Policies, ca: str) -> None:
        self.registry, self.store, self._policies, self._ca = registry, registry.store, policies, ca
        self._queue: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
        registry.observers.append(self.observe)

    async def run(self) -> None:
        """Works until cancelled, one step at a time so that requests are served in between."""
        while True:
            step = await self._queue.get()
            try:
                step()
            except ApiError as error:  # the object changed under us: its own change brings us back
                log.warning("garbage collection: %s", error)
                if error.code in DENIED:
                    asyncio.get_running_loop().call_later(RETRY_SECONDS, self._queue.put_nowait, step)
            await asyncio.sleep(0)

    def observe(self, resource: Resource, before: Entry | None, after: Entry | None) -> None:
        entry = after or before
        assert entry is not None
        data = entry.obj["metadata"]
        uid, key = data["uid"], entry.key
        if after is None:
            for place in self.store.dependents.get(uid, ()):
                self._later(self._check, place)
            for ref in data.get("ownerReferences", ()):
                self._later(self._settle, ref["uid"])
            self._container_emptied(resource, entry)
        else:
            if any(self._owner_state(r, entry) != "solid" for r in data.get("ownerReferences", ())):
                self._later(self._check, (resource.key, key))
            if "deletionTimestamp" in data:
                self._deleting(resource, uid, key[1])
            if resource.key == "pods" and _abandoned(after.obj):
                asyncio.get_running_loop().call_later(ABANDONED_SECONDS, self._later, self._fail_pod, key)
        if resource.key == "namespaces" and before is None:
            self._later(self._furnish, key[1])

    def _later(self, step: Callable[..., None], argument: object) -> None:
        self._queue.put_nowait(lambda: step(argument))

    def _deleting(self, resource: Resource, uid: str, name: str) -> None:
        self._later(self._settle, uid)
        if resource.key == "namespaces":
            self._later(self._empty_namespace, name)
        elif resource.kind == "CustomResourceDefinition":
            self._later(self._empty_crd, name)

    def _container_emptied(self, resource: Resource, entry: Entry) -> None:
        if self.store.tables[resource.key].spaces.get(entry.key[0]):
            return
        namespace = self.store.get("namespaces", "", entry.key[0]) if entry.key[0] else None
        if namespace and "deletionTimestamp" in namespace.obj["metadata"]:
            self._later(self._empty_namespace, entry.key[0])
        if resource.custom:
            self._later(self._empty_crd, resource.key)

    def _owner_state(self, ref: Obj, dependent: Entry) -> str:
        """solid, waiting (being deleted in the foreground) or absent (gone, another UID, or another namespace)."""
        found = self.store.by_uid(ref["uid"])
        if found is None:
            return "absent"
        resource, owner = self.registry.kinds.by_key[found[0]], found[1]
        if owner.key[0] not in ("", dependent.key[0]) or (owner.key[1], resource.kind) != (ref["name"], ref["kind"]):
            return "absent"
        data = owner.obj["metadata"]
        return "waiting" if "deletionTimestamp" in data and FOREGROUND in data.get("finalizers", ()) else "solid"

    def _check(self, place: Place) -> None:
        """One object with owners: kept by a live one, deleted without."""
        entry = self.store.get(place[0], *place[1]) if place[0] in self.store.tables else None
        if entry is None or not (refs := entry.obj["metadata"].get("ownerReferences")):
            return
        resource, data = self.registry.kinds.by_key[place[0]], entry.obj["metadata"]
        states = {r["uid"]: self._owner_state(r, entry) for r in refs}
        if "solid" in states.values():
            if set(states.values()) != {"solid"}:
                self._drop_owners(resource, entry, {u for u, s in states.items() if s != "solid"})
            return
        if "deletionTimestamp" in data:
            return
        finalizers = data.get("finalizers", ())
        policy = "Orphan" if ORPHAN in finalizers else "Foreground" if FOREGROUND in finalizers else "Background"
        if "waiting" in states.values() and self.store.dependents.get(data["uid"]):
            policy = "Foreground"
        self._delete(GARBAGE_COLLECTOR, resource, entry, DeleteOptions(policy=policy, uid=data["uid"]))

    def _drop_owners(self, resource: Resource, entry: Entry, uids: set[str]) -> None:
        def change(obj: Obj) -> None:
            left = [r for r in obj["metadata"]["ownerReferences"] if r["uid"] not in uids]
            obj["metadata"]["ownerReferences"] = left
            if not left:
                del obj["metadata"]["ownerReferences"]

        self._modify(GARBAGE_COLLECTOR, resource, entry, change)

    def _delete(self, user: User, resource: Resource, entry: Entry, options: DeleteOptions) -> None:
        given = {"propagationPolicy": options.policy} if options.policy else {}
        self._policies.check_deletion(user, resource, entry.obj, given)
        self.registry.delete(resource, *entry.key, options)

    def _modify(
        self, user: User, resource: Resource, entry: Entry, change: Callable[[Obj], None], sub: str = ""
    ) -> None:
        changed = entry.copy()
        change(changed)
        asked = Asked(user, "UPDATE", resource, sub, changed, entry.copy(), dry_run=False)
        if self._policies.concern(asked):
            self._policies.check(asked)
        self.registry.modify(resource, entry, change)

    def _settle(self, uid: str) -> None:
        """An owner that waits for its dependents (Foreground) or lets them go (Orphan)."""
        found = self.store.by_uid(uid)
        if found is None or "deletionTimestamp" not in found[1].obj["metadata"]:
            return
        resource, owner = self.registry.kinds.by_key[found[0]], found[1]
        finalizers = owner.obj["metadata"].get("finalizers", ())
        dependents = list(self.store.dependents.get(uid, ()))
        if ORPHAN in finalizers:
            for place in dependents:
                if entry := self.store.get(place[0], *place[1]):
                    self._drop_owners(self.registry.kinds.by_key[place[0]], entry, {uid})
            self._release(resource, owner, ORPHAN)
        elif FOREGROUND in finalizers:
            for place in dependents:
                self._later(self._check, place)
            if not any(self._blocks(place, uid) for place in dependents):
                self._release(resource, owner, FOREGROUND)

    def _blocks(self, place: Place, uid: str) -> bool:
        entry = self.store.get(place[0], *place[1])
        refs = entry.obj["metadata"].get("ownerReferences", ()) if entry else ()
        return any(r["uid"] == uid and r.get("blockOwnerDeletion") for r in refs)

    def _release(self, resource: Resource, entry: Entry, finalizer: str) -> None:
        def change(obj: Obj) -> None:
            obj["metadata"]["finalizers"] = [f for f in obj["metadata"]["finalizers"] if f != finalizer]
            if not obj["metadata"]["finalizers"]:
                del obj["metadata"]["finalizers"]

        self._modify(GARBAGE_COLLECTOR, resource, entry, change)

    def _furnish(self, name: str) -> None:
        """What every namespace has: the default service account and the CA."""
        namespace = self.store.get("namespaces", "", name)
        if namespace is None or "deletionTimestamp" in namespace.obj["metadata"]:
            return
        for key, obj in (
            ("serviceaccounts", {"metadata": {"name": "default"}}),
            ("configmaps", {"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": self._ca}}),
        ):
            if self.store.get(key, name, obj["metadata"]["name"]) is None:
                self.registry.create(self.registry.kinds.by_key[key], name, obj)

    def _fail_pod(self, key: Key) -> None:
        """A pod that ends before any node had it: no kubelet will ever say so, as the pod garbage collector does."""
        entry = self.store.get("pods", *key)
        if entry is None or not _abandoned(entry.obj):
            return
        pods = self.registry.kinds.by_key["pods"]
        self._modify(POD_COLLECTOR, pods, entry, lambda pod: pod["status"].update(phase="Failed"), "status")

    def _empty_namespace(self, name: str) -> None:
        namespace = self.store.get("namespaces", "", name)
        if namespace is None or "deletionTimestamp" not in namespace.obj["metadata"]:
            return
        for key, table in self.store.tables.items():
            for entry in list(table.spaces.get(name, {}).values()) if name else ():
                if "deletionTimestamp" not in entry.obj["metadata"]:
                    self._delete(NAMESPACE_CONTROLLER, self.registry.kinds.by_key[key], entry, DeleteOptions())
        if not any(table.spaces.get(name) for table in self.store.tables.values()):

            def finalize(obj: Obj) -> None:
                obj["spec"]["finalizers"] = [f for f in obj["spec"].get("finalizers", ()) if f != "kubernetes"]

            self.registry.modify(self.registry.kinds.by_key["namespaces"], namespace, finalize)

    def _empty_crd(self, name: str) -> None:
        crds = self.registry.kinds.by_key["customresourcedefinitions.apiextensions.k8s.io"]
        crd = self.store.get(crds.key, "", name)
        if crd is None or "deletionTimestamp" not in crd.obj["metadata"] or name not in self.store.tables:
            return
        entries = [e for space in self.store.tables[name].spaces.values() for e in space.values()]
        for entry in entries:
            if "deletionTimestamp" not in entry.obj["metadata"]:
                self.registry.delete(self.registry.kinds.by_key[name], *entry.key, DeleteOptions())
        empty = not any(self.store.tables[name].spaces.values())
        if empty and custom.CLEANUP in crd.obj["metadata"].get("finalizers", ()):
            self._release(crds, crd, custom.CLEANUP)


def _abandoned(pod: Obj) -> bool:
    ended = (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
    return "deletionTimestamp" in pod["metadata"] and not pod["spec"].get("nodeName") and not ended
