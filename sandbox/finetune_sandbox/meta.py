"""ObjectMeta: what every object has, and what may be in it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from finetune_sandbox.errors import Cause, Obj, bad_request, not_allowed, required, wrong

FIELDS = {
    "name": str,
    "generateName": str,
    "namespace": str,
    "uid": str,
    "resourceVersion": str,
    "generation": int,
    "creationTimestamp": str,
    "deletionTimestamp": str,
    "deletionGracePeriodSeconds": int,
    "labels": dict,
    "annotations": dict,
    "ownerReferences": list,
    "finalizers": list,
    "managedFields": list,
    "selfLink": str,
}
SERVER_OWNED = ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation")
OWNER_FIELDS = ("apiVersion", "kind", "name", "uid", "controller", "blockOwnerDeletion")

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9]")
PATH_SEGMENT = re.compile(r"(?!\.\.?$)[^/%]+")

SUBDOMAIN_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
LABEL_RULE = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
LABEL_1035_RULE = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, "
    "and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is "
    "'[a-z]([-a-z0-9]*[a-z0-9])?')"
)
KEY_RULE = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', with an optional DNS subdomain prefix and '/' "
    "(e.g. 'example.com/MyName')"
)
VALUE_RULE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)


def now() -> str:
    """The time as the API writes it: UTC, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def random_suffix(length: int = 5) -> str:
    return "".join(secrets.choice("bcdfghjklmnpqrstvwxz2456789") for _ in range(length))


def clean(obj: Obj) -> list[str]:
    """Drops unknown metadata and checks the types. Returns the paths dropped. Raises ApiError 400."""
    meta = obj.setdefault("metadata", {})
    if not isinstance(meta, dict):
        raise bad_request("metadata: expected an object")
    unknown = [f"metadata.{k}" for k in meta if k not in FIELDS]
    for key in [k for k in meta if k not in FIELDS or meta[k] is None]:
        del meta[key]
    for key, value in meta.items():
        if not isinstance(value, FIELDS[key]) or isinstance(value, bool):
            raise bad_request(f"metadata.{key}: expected {FIELDS[key].__name__}, found {type(value).__name__}")
    for field in ("labels", "annotations"):
        for key, value in meta.get(field, {}).items():
            if not isinstance(value, str):
                raise bad_request(f"metadata.{field}[{key}]: expected a string, found {type(value).__name__}")
    for ref in meta.get("ownerReferences", []):
        if not isinstance(ref, dict) or not all(isinstance(ref.get(k, ""), str) for k in OWNER_FIELDS[:4]):
            raise bad_request("metadata.ownerReferences: expected objects of strings")
        for key in [k for k in ref if k not in OWNER_FIELDS]:
            unknown.append(f"metadata.ownerReferences.{key}")
            del ref[key]
    if not all(isinstance(f, str) for f in meta.get("finalizers", [])):
        raise bad_request("metadata.finalizers: expected strings")
    for key in ("labels", "annotations", "ownerReferences", "finalizers", "managedFields"):
        if key == "managedFields" or not meta.get(key, True):
            meta.pop(key, None)
    meta.pop("selfLink", None)
    return unknown


def check_name(name: str, rule: str) -> list[Cause]:
    """`rule`: subdomain, label, label1035 or path."""
    pattern, why = {
        "subdomain": (SUBDOMAIN, SUBDOMAIN_RULE),
        "label": (LABEL, LABEL_RULE),
        "label1035": (LABEL_1035, LABEL_1035_RULE),
        "path": (PATH_SEGMENT, "may not be '.' or '..' or contain '/' or '%'"),
    }[rule]
    if not name:
        return [required("metadata.name", "name or generateName is required")]
    longest = 253 if rule in ("subdomain", "path") else 63
    if len(name) > longest:
        return [wrong("metadata.name", name, f"must be no more than {longest} characters")]
    return [] if pattern.fullmatch(name) else [wrong("metadata.name", name, why)]


def check_labels(labels: Mapping[str, str], field: str) -> list[Cause]:
    found = [c for key in labels for c in _check_key(key, field)]
    for value in labels.values():
        if len(value) > 63:
            found.append(wrong(field, value, "must be no more than 63 bytes"))
        elif value and not QUALIFIED.fullmatch(value):
            found.append(wrong(field, value, VALUE_RULE))
    return found


def _check_key(key: str, field: str) -> list[Cause]:
    prefix, slash, name = key.rpartition("/")
    if not QUALIFIED.fullmatch(name) or (slash and not SUBDOMAIN.fullmatch(prefix)):
        return [wrong(field, key, KEY_RULE)]
    return []


def validate(meta: Mapping[str, Any], rule: str, *, core: bool = True) -> list[Cause]:
    """What is wrong with the metadata of an object whose names follow `rule`; `core` kinds know few bare finalizers."""
    found = check_name(meta.get("name", ""), rule) + check_labels(meta.get("labels", {}), "metadata.labels")
    annotations = meta.get("annotations", {})
    found += [c for key in annotations for c in _check_key(key.lower(), "metadata.annotations")]
    if sum(len(k) + len(v.encode()) for k, v in annotations.items()) > 256 * 1024:
        found.append(Cause("metadata.annotations", "Too long: may not be more than 262144 bytes", "FieldValueTooLong"))
    for ref in meta.get("ownerReferences", ()):
        missing = [k for k in OWNER_FIELDS[:4] if not ref.get(k)]
        found += [wrong(f"metadata.ownerReferences.{k}", "", "must not be empty") for k in missing]
    if sum(1 for r in meta.get("ownerReferences", ()) if r.get("controller")) > 1:
        found.append(wrong("metadata.ownerReferences", "", "Only one reference can have Controller set to true"))
    for finalizer in meta.get("finalizers", ()):
        found += _check_key(finalizer, "metadata.finalizers")
        if core and "/" not in finalizer and finalizer not in ("orphan", "foregroundDeletion", "kubernetes"):
            why = "name is neither a standard finalizer name nor is it fully qualified"
            found.append(wrong("metadata.finalizers", finalizer, why))
    return found


def validate_update(meta: Mapping[str, Any], old: Mapping[str, Any]) -> list[Cause]:
    if "deletionTimestamp" in old:
        added = [f for f in meta.get("finalizers", ()) if f not in old.get("finalizers", ())]
        if added:
            quoted = ", ".join(f'"{f}"' for f in added)
            return [not_allowed("metadata.finalizers", "no new finalizers can be added if the object is being deleted, "
                                f"found new finalizers []string{{{quoted}}}")]  # fmt: skip
    return []
