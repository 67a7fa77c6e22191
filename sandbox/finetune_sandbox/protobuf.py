"""Kubernetes' protobuf bodies of the few kinds that kubectl creates itself (`create token`, `auth can-i`, …).

Everything else that kubectl sends is JSON. A kind or a field without a row here is refused, never dropped. Answers are
JSON, which such a client accepts too.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any

from finetune_sandbox.errors import ApiError, Obj, bad_request

MAGIC = b"k8s\x00"
Fields = Mapping[int, tuple[str, Any]]  # number -> (name, type); a type in a list repeats; None is left out

_META: Fields = {
    1: ("name", str),
    2: ("generateName", str),
    3: ("namespace", str),
    4: ("selfLink", None),
    5: ("uid", str),
    6: ("resourceVersion", str),
    7: ("generation", None),
    8: ("creationTimestamp", None),
    11: ("labels", (str, str)),
    12: ("annotations", (str, str)),
    14: ("finalizers", [str]),
}
_REFERENCE: Fields = {1: ("kind", str), 2: ("apiVersion", str), 3: ("name", str), 4: ("uid", str)}
_TOKEN: Fields = {1: ("audiences", [str]), 3: ("boundObjectRef", _REFERENCE), 4: ("expirationSeconds", int)}
_RESOURCE: Fields = {
    1: ("namespace", str),
    2: ("verb", str),
    3: ("group", str),
    4: ("version", str),
    5: ("resource", str),
    6: ("subresource", str),
    7: ("name", str),
}
_PATH: Fields = {1: ("path", str), 2: ("verb", str)}
_ACCESS: Fields = {1: ("resourceAttributes", _RESOURCE), 2: ("nonResourceAttributes", _PATH)}
_PRECONDITIONS: Fields = {1: ("uid", str), 2: ("resourceVersion", str)}
_DELETE: Fields = {
    1: ("gracePeriodSeconds", int),
    2: ("preconditions", _PRECONDITIONS),
    3: ("orphanDependents", bool),
    4: ("propagationPolicy", str),
    5: ("dryRun", [str]),
}


def _object(**fields: tuple[int, Any]) -> Fields:
    return {1: ("metadata", _META)} | {number: (name, kind) for name, (number, kind) in fields.items()}


KINDS: Mapping[str, Fields] = {
    "ConfigMap": _object(data=(2, (str, str)), binaryData=(3, (str, bytes)), immutable=(4, bool)),
    "Secret": _object(data=(2, (str, bytes)), type=(3, str), stringData=(4, (str, str)), immutable=(5, bool)),
    "Namespace": _object(spec=(2, {1: ("finalizers", [str])}), status=(3, None)),
    "ServiceAccount": _object(automountServiceAccountToken=(4, bool)),
    "TokenRequest": _object(spec=(2, _TOKEN), status=(3, None)),
    "SelfSubjectAccessReview": _object(spec=(2, _ACCESS), status=(3, None)),
    "SelfSubjectRulesReview": _object(spec=(2, {1: ("namespace", str)}), status=(3, None)),
    "SelfSubjectReview": _object(status=(2, None)),
    "Eviction": _object(deleteOptions=(2, _DELETE)),
    "DeleteOptions": _DELETE,
}


def decode(body: bytes) -> Obj:
    """The object of a body in Kubernetes' envelope. Raises ApiError 400, or 415 for what has no row above."""
    if not body.startswith(MAGIC):
        raise bad_request("the body is not Kubernetes protobuf: it does not start with k8s\\0")
    try:
        envelope = dict(_parts(body[len(MAGIC) :]))
        head = _message(envelope[1], {1: ("apiVersion", str), 2: ("kind", str)}, "TypeMeta")
        if head.get("kind") not in KINDS:
            raise _unsupported(str(head.get("kind")))
        return head | _message(envelope.get(2, b""), KINDS[head["kind"]], head["kind"])
    except (IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise bad_request(f"the protobuf body cannot be decoded: {error}") from error


def _unsupported(what: str) -> ApiError:
    message = f"the sandbox reads {what} as JSON or YAML only, not as application/vnd.kubernetes.protobuf"
    return ApiError(415, "UnsupportedMediaType", message)


def _message(body: bytes, fields: Fields, kind: str) -> Obj:
    out: Obj = {}
    for number, raw in _parts(body):
        if number not in fields:
            raise _unsupported(f"field {number} of {kind}")
        name, of = fields[number]
        if isinstance(of, list):
            out.setdefault(name, []).append(_value(raw, of[0], name))
        elif isinstance(of, tuple):
            pair = dict(_parts(raw))
            out.setdefault(name, {})[_value(pair.get(1, b""), of[0], name)] = _value(pair.get(2, b""), of[1], name)
        elif of is not None and raw != b"":  # an empty string is what an absent one looks like
            out[name] = _value(raw, of, name)
    return out


def _value(raw: Any, of: Any, name: str) -> Any:
    if isinstance(of, Mapping):
        return _message(raw, of, name)
    if of is str:
        return raw.decode()
    return base64.b64encode(raw).decode() if of is bytes else of(raw)


def _parts(body: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, bytes or integer) of each part. Raises IndexError on a body that is cut short."""
    at = 0
    while at < len(body):
        tag, at = _varint(body, at)
        if tag & 7 == 0:
            value, at = _varint(body, at)
            yield tag >> 3, value
        elif tag & 7 == 2:
            size, at = _varint(body, at)
            if at + size > len(body):
                raise IndexError("it is cut short")
            yield tag >> 3, body[at : at + size]
            at += size
        else:
            raise _unsupported(f"wire type {tag & 7}")


def _varint(body: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
