"""The verbs: create, update, patch and delete with everything that the API conventions promise about them.

Pure of HTTP. Server-side apply creates or merges and takes `force` and `fieldManager`, but no field has an owner: there
are no managedFields, an apply never conflicts, and a field that is left out of a later apply stays.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_sandbox import meta, patch, schema
from finetune_sandbox.errors import (
    ApiError,
    Cause,
    Obj,
    already_exists,
    bad_request,
    conflict,
    forbidden,
    invalid,
    not_found,
    wrong,
)
from finetune_sandbox.resources import Kinds, Resource
from finetune_sandbox.store import Entry, Filter, Store

FOREGROUND, ORPHAN = "foregroundDeletion", "orphan"
POLICIES = {"Background": None, "Foreground": FOREGROUND, "Orphan": ORPHAN}


@dataclass
class Call:
    """What a request asks for besides its object; `warnings` go back to the client."""

    dry_run: bool = False
    field_validation: str = "Warn"  # Ignore, Warn or Strict
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DeleteOptions:
    grace: int | None = None
    policy: str | None = None
    uid: str | None = None
    resource_version: str | None = None

    @staticmethod
    def parse(body: Mapping[str, Any]) -> DeleteOptions:
        """From a metav1.DeleteOptions. Raises ApiError 400 or 422."""
        policy = body.get("propagationPolicy")
        if (legacy := body.get("orphanDependents")) is not None:
            if policy:
                raise bad_request("orphanDependents and propagationPolicy cannot both be set")
            policy = "Orphan" if legacy else "Background"
        if policy is not None and policy not in POLICIES:
            cause = wrong("propagationPolicy", policy, 'must be "Foreground", "Background", "Orphan", or null')
            raise invalid("DeleteOptions", "meta.k8s.io", "", [cause])
        grace = body.get("gracePeriodSeconds")
        if grace is not None and (not isinstance(grace, int) or grace < 0):
            raise bad_request(f"gracePeriodSeconds: expected a number of seconds from 0 on, found {grace!r}")
        pre = body.get("preconditions") or {}
        return DeleteOptions(grace, policy, pre.get("uid"), pre.get("resourceVersion"))


Admission = Callable[[Resource, Obj], None]
Watcher = Callable[[Resource, Entry | None, Entry | None], None]


class Registry:
    """The one place that writes to the store. `admission` runs on every create and may change the object;
    `observers` are told of every change, with the version before and after."""

    def __init__(self, store: Store, kinds: Kinds) -> None:
        self.store, self.kinds = store, kinds
        self.admission: list[Admission] = []
        self.observers: list[Watcher] = []
        for resource in kinds.all():
            store.define(resource.key, resource.selectable)

    def get(self, resource: Resource, namespace: str, name: str) -> Entry:
        entry = self.store.get(resource.key, namespace, name)
        if entry is None:
            raise not_found(resource.key, name)
        return entry

    def create(self, resource: Resource, namespace: str, obj: Obj, call: Call | None = None) -> Entry:
        call = call or Call()
        self._decode(resource, obj, call)
        data = obj["metadata"]
        self._place(resource, namespace, data)
        if data.get("resourceVersion", "") not in ("", "0"):
            raise bad_request("resourceVersion should not be set on objects to be created")
        for key in (*SERVER, "resourceVersion"):
            data.pop(key, None)
        if not data.get("name") and data.get("generateName"):
            data["name"] = data["generateName"][:58] + meta.random_suffix()
        data |= {"uid": str(uuid.uuid4()), "creationTimestamp": meta.now()}
        if resource.generation:
            data["generation"] = 1
        if resource.status and not resource.keeps_status:
            obj.pop("status", None)
        self._default(resource, obj)
        self._check_namespace(resource, namespace, data.get("name", ""))
        resource.prepare(obj, None)
        for admit in self.admission:
            admit(resource, obj)
        self._validate(resource, obj, None)
        if self.store.get(resource.key, namespace, data["name"]):
            raise already_exists(resource.key, data["name"])
        if call.dry_run:
            return Entry(obj, self.store.rev, {})
        entry = self.store.put(resource.key, obj)
        self._tell(resource, None, entry)
        return entry

    def update(self, resource: Resource, namespace: str, name: str, obj: Obj, sub: str, call: Call) -> Entry:
        """PUT: replaces the object, or with sub `status` its status alone."""
        old = self.get(resource, namespace, name)
        if resource.custom and not obj.get("metadata", {}).get("resourceVersion"):
            cause = Cause("metadata.resourceVersion", "Invalid value: 0: must be specified for an update")
            raise invalid(resource.kind, resource.group, name, [cause])
        return self._replace(resource, old, obj, sub, call)

    def patch(
        self, resource: Resource, namespace: str, name: str, kind: str, body: Any, sub: str, call: Call
    ) -> tuple[Entry, bool]:
        """PATCH of `kind` json, merge, strategic or apply. Returns the object and whether it was created."""
        old = self.store.get(resource.key, namespace, name)
        if kind == "apply":
            self._check_apply(resource, namespace, name, body)
            if old is None and not sub:
                body["metadata"].setdefault("name", name)
                return self.create(resource, namespace, body, call), True
        elif kind != "json" and not isinstance(body, dict):
            raise bad_request("a merge patch is an object")
        if old is None:
            raise not_found(resource.key, name)
        before = old.copy()
        match kind:
            case "json":
                after = patch.json_patch(before, body)
            case "merge":
                after = patch.merge(before, body)
            case "strategic":
                if resource.custom:
                    raise ApiError(415, "UnsupportedMediaType", "the body of the request was in an unknown format - "
                                   "accepted media types include: application/json-patch+json, "
                                   "application/merge-patch+json, application/apply-patch+yaml")  # fmt: skip
                after = patch.strategic(before, body)
            case _:
                keys = schema.list_keys(resource.schema) if resource.schema else patch.builtin_list_keys
                after = patch.apply(before, body, keys)
        if not isinstance(after, dict):
            raise bad_request("the patched object is not an object")
        return self._replace(resource, old, after, sub, call), False

    def modify(self, resource: Resource, old: Entry, change: Callable[[Obj], None]) -> Entry:
        """A change that the server itself makes; it may touch what clients may not."""
        obj = old.copy()
        change(obj)
        return self._commit(resource, old, obj, Call())

    def delete(
        self, resource: Resource, namespace: str, name: str, options: DeleteOptions, call: Call | None = None
    ) -> tuple[Entry, bool]:
        """Returns the object as it is now and whether it is gone; if not, something still has to let it go."""
        old = self.get(resource, namespace, name)
        data = old.obj["metadata"]
        for label, want, have in (
            ("UID", options.uid, data["uid"]),
            ("ResourceVersion", options.resource_version, data["resourceVersion"]),
        ):
            if want is not None and want != have:
                why = f"Precondition failed: {label} in precondition: {want}, {label} in object meta: {have}"
                raise conflict(resource.key, name, why)
        if resource.key == "namespaces" and name in ("default", "kube-system"):
            raise forbidden(resource.key, name, "this namespace may not be deleted")
        finalizers = list(data.get("finalizers", ()))
        if options.policy:
            finalizers = [f for f in finalizers if f not in (FOREGROUND, ORPHAN)]
            if wanted := POLICIES[options.policy]:
                finalizers.append(wanted)
        grace = _grace(resource, old.obj, options)
        holds = bool(finalizers) or grace > 0 or bool(old.obj.get("spec", {}).get("finalizers") and _is_ns(resource))
        if call and call.dry_run:
            return old, not holds
        if not holds:
            gone = self.store.remove(resource.key, old.copy())
            self._tell(resource, old, None)
            return gone, True
        if (
            data.get("deletionTimestamp")
            and finalizers == data.get("finalizers", [])
            and grace >= data.get("deletionGracePeriodSeconds", 0)
        ):
            return old, False
        obj = old.copy()
        _mark_deleted(obj, finalizers, grace, resource)
        entry = self.store.put(resource.key, obj)
        self._tell(resource, old, entry)
        return entry, False

    def _decode(self, resource: Resource, obj: Any, call: Call) -> None:
        if not isinstance(obj, dict):
            raise bad_request(f"expected a {resource.kind}, found {type(obj).__name__}")
        if resource.custom and not (obj.get("apiVersion") and obj.get("kind")):
            raise bad_request(f"the object provided is unrecognized (must be of type {resource.kind}): apiVersion or "
                              "kind is missing")  # fmt: skip
        for key, want in (("apiVersion", resource.api_version), ("kind", resource.kind)):
            if obj.setdefault(key, want) != want:
                raise bad_request(f"{key} in the data ({obj[key]}) does not match the expected {key} ({want})")
        unknown = meta.clean(obj)
        if resource.schema is not None:
            unknown += schema.prune(resource.schema, obj)
            schema.default(resource.schema, obj)
        else:
            _drop_nulls(obj)
        if resource.schema is None and call.field_validation == "Strict":
            call.warnings.append(f"unknown fields of {resource.kind} are not checked by the sandbox")
        if unknown and call.field_validation == "Strict":
            listed = ", ".join(f'unknown field "{u}"' for u in unknown)
            raise bad_request(f"{resource.kind} in version {json.dumps(resource.version)} cannot be handled as a "
                              f"{resource.kind}: strict decoding error: {listed}")  # fmt: skip
        if unknown and call.field_validation == "Warn":
            call.warnings += [f'unknown field "{u}"' for u in unknown]

    def _default(self, resource: Resource, obj: Obj) -> None:
        """A built-in object of a wrong shape is one that a real server could not decode."""
        try:
            resource.default(obj)
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise bad_request(f"{resource.kind} cannot be decoded: {error}") from error

    def _place(self, resource: Resource, namespace: str, data: Obj) -> None:
        if not resource.namespaced:
            data.pop("namespace", None)
        elif data.setdefault("namespace", namespace) != namespace:
            raise bad_request("the namespace of the provided object does not match the namespace sent on the request")

    def _check_namespace(self, resource: Resource, namespace: str, name: str) -> None:
        if not resource.namespaced:
            return
        entry = self.store.get("namespaces", "", namespace)
        if entry is None:
            raise not_found("namespaces", namespace)
        if "deletionTimestamp" in entry.obj["metadata"]:
            why = f"unable to create new content in namespace {namespace} because it is being terminated"
            cause = Cause("metadata.namespace", f"namespace {namespace} is being terminated", "NamespaceTerminating")
            raise forbidden(resource.key, name, why, [cause])

    def _check_apply(self, resource: Resource, namespace: str, name: str, body: Any) -> None:
        if not isinstance(body, dict) or body.get("kind") != resource.kind:
            raise bad_request(f"an apply needs apiVersion {resource.api_version} and kind {resource.kind}")
        if body.get("apiVersion") != resource.api_version:
            raise bad_request(f"invalid apiVersion {body.get('apiVersion')!r}, must be {resource.api_version}")
        data = body.setdefault("metadata", {})
        if data.get("managedFields"):
            raise bad_request("metadata.managedFields must be nil")
        if data.get("name", name) != name or data.get("namespace", namespace) != namespace:
            raise bad_request("the name or namespace in the applied object does not match the URL")

    def _replace(self, resource: Resource, old: Entry, obj: Obj, sub: str, call: Call) -> Entry:
        self._decode(resource, obj, call)
        data, was = obj["metadata"], old.obj["metadata"]
        self._place(resource, was.get("namespace", ""), data)
        if data.setdefault("name", was["name"]) != was["name"]:
            raise bad_request(
                f"the name of the object ({data['name']}) does not match the name on the URL ({was['name']})"
            )
        # As on a real server, the status of a custom object is written whatever UID the caller believes in.
        if data.get("uid", was["uid"]) != was["uid"] and not (sub == "status" and resource.custom):
            why = f"Precondition failed: UID in precondition: {data['uid']}, UID in object meta: {was['uid']}"
            raise conflict(resource.key, was["name"], why)
        if data.get("resourceVersion") not in (None, "", "0", was["resourceVersion"]):
            raise conflict(resource.key, was["name"])
        for key in SERVER:
            data.pop(key, None)
            if key in was:
                data[key] = was[key]
        if sub == "status":
            _only_status(resource, obj, old.copy())
        elif resource.status:
            obj.pop("status", None)
            if "status" in old.obj:
                obj["status"] = old.obj["status"]
        self._default(resource, obj)
        resource.prepare(obj, old.obj)
        if sub != "status" or resource.custom:
            self._validate(resource, obj, old.obj)
        return self._commit(resource, old, obj, call)

    def _validate(self, resource: Resource, obj: Obj, old: Obj | None) -> None:
        causes = meta.validate(obj["metadata"], resource.names, core=resource.core)
        if old is not None:
            causes += meta.validate_update(obj["metadata"], old["metadata"])
        try:
            causes += resource.validate(obj, old)
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            if resource.custom:
                raise
            raise bad_request(f"{resource.kind} cannot be decoded: {error}") from error
        if causes:
            raise invalid(resource.kind, resource.group, obj["metadata"].get("name", ""), causes)

    def _commit(self, resource: Resource, old: Entry, obj: Obj, call: Call) -> Entry:
        data = obj["metadata"]
        data["resourceVersion"] = old.obj["metadata"]["resourceVersion"]
        if resource.generation and _spec_changed(resource, obj, old.obj):
            data["generation"] = old.obj["metadata"].get("generation", 0) + 1
        released = "deletionTimestamp" in data and not data.get("finalizers")
        released = released and not data.get("deletionGracePeriodSeconds")
        released = released and not (_is_ns(resource) and obj["spec"].get("finalizers"))
        if obj == old.obj and not released:
            return old
        if call.dry_run:
            return Entry(obj, old.rev, {})
        if released:
            entry = self.store.remove(resource.key, obj)
            self._tell(resource, old, None)
        else:
            entry = self.store.put(resource.key, obj)
            self._tell(resource, old, entry)
        return entry

    def _tell(self, resource: Resource, before: Entry | None, after: Entry | None) -> None:
        for observer in self.observers:
            observer(resource, before, after)

    def select(self, resource: Resource, want: Filter) -> list[Entry]:
        return self.store.tables[resource.key].select(want)


SERVER = meta.SERVER_OWNED


def _drop_nulls(value: Any) -> None:
    """In a built-in kind a null is as good as absent."""
    if isinstance(value, dict):
        for key in [k for k, v in value.items() if v is None]:
            del value[key]
        for child in value.values():
            _drop_nulls(child)
    elif isinstance(value, list):
        for child in value:
            _drop_nulls(child)


def _is_ns(resource: Resource) -> bool:
    return resource.key == "namespaces"


def _grace(resource: Resource, obj: Obj, options: DeleteOptions) -> int:
    """Seconds that a pod has to end: none where no kubelet holds it."""
    if resource.key != "pods" or not obj["spec"].get("nodeName"):
        return 0
    if obj.get("status", {}).get("phase") in ("Succeeded", "Failed"):
        return 0
    data = obj["metadata"]
    grace = options.grace
    if grace is None:
        own = int(obj["spec"].get("terminationGracePeriodSeconds", 30))
        grace = int(data.get("deletionGracePeriodSeconds", own))
    return min(grace, int(data.get("deletionGracePeriodSeconds", grace)))


def _mark_deleted(obj: Obj, finalizers: list[str], grace: int, resource: Resource) -> None:
    data = obj["metadata"]
    begun = datetime.now(UTC)
    if "deletionTimestamp" in data:
        begun = meta.parse_time(data["deletionTimestamp"])
        begun -= timedelta(seconds=data.get("deletionGracePeriodSeconds", 0))
    elif resource.generation:
        data["generation"] = data.get("generation", 0) + 1
    data["deletionTimestamp"] = (begun + timedelta(seconds=grace)).strftime("%Y-%m-%dT%H:%M:%SZ")
    data["deletionGracePeriodSeconds"] = grace
    data.pop("finalizers", None)
    if finalizers:
        data["finalizers"] = finalizers
    if _is_ns(resource):
        obj.setdefault("status", {})["phase"] = "Terminating"


def _only_status(resource: Resource, obj: Obj, old: Obj) -> None:
    """Turns `obj` into the old object with the new status (built-in kinds also take metadata this way)."""
    status, data = obj.get("status"), obj["metadata"]
    obj.clear()
    obj.update(old)
    obj.pop("status", None)
    if status is not None:
        obj["status"] = status
    if not resource.custom:
        obj["metadata"] = data


def _spec_changed(resource: Resource, obj: Obj, old: Obj) -> bool:
    ignored = {"metadata", "status"} if resource.status else {"metadata"}
    return {k: v for k, v in obj.items() if k not in ignored} != {k: v for k, v in old.items() if k not in ignored}
