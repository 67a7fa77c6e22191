"""What goes wrong, as the metav1.Status that a Kubernetes client expects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Obj = dict[str, Any]


@dataclass(frozen=True)
class Cause:
    """One reason an object is invalid: `field` is a path such as `spec.parallelism`."""

    field: str
    message: str
    reason: str = "FieldValueInvalid"


class ApiError(Exception):
    """An answer other than success: `code` is the HTTP status, `reason` a metav1.StatusReason."""

    def __init__(self, code: int, reason: str, message: str, details: Obj | None = None) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.details = code, reason, message, details

    def status(self) -> Obj:
        body: Obj = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
        body |= {"message": self.message, "reason": self.reason}
        if self.details is not None:
            body["details"] = self.details
        return body | {"code": self.code}


def _details(group_resource: str, name: str) -> Obj:
    plural, _, group = group_resource.partition(".")
    return ({"name": name} if name else {}) | {"kind": plural} | ({"group": group} if group else {})


def not_found(group_resource: str, name: str) -> ApiError:
    return ApiError(404, "NotFound", f'{group_resource} "{name}" not found', _details(group_resource, name))


def already_exists(group_resource: str, name: str) -> ApiError:
    return ApiError(409, "AlreadyExists", f'{group_resource} "{name}" already exists', _details(group_resource, name))


def conflict(group_resource: str, name: str, why: str = "") -> ApiError:
    why = why or "the object has been modified; please apply your changes to the latest version and try again"
    message = f'Operation cannot be fulfilled on {group_resource} "{name}": {why}'
    return ApiError(409, "Conflict", message, _details(group_resource, name))


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def forbidden(group_resource: str, name: str, why: str, causes: Sequence[Cause] = ()) -> ApiError:
    details = _details(group_resource, name)
    if causes:
        details["causes"] = [{"reason": c.reason, "message": c.message, "field": c.field} for c in causes]
    subject = f'{group_resource} "{name}"' if name else group_resource
    return ApiError(403, "Forbidden", f"{subject} is forbidden: {why}", details)


def expired(message: str) -> ApiError:
    return ApiError(410, "Expired", message)


def not_implemented(message: str) -> ApiError:
    """The real server would do it and this one does not: never a success that is none."""
    return ApiError(501, "NotImplemented", message)


def method_not_allowed() -> ApiError:
    message = "the server does not allow this method on the requested resource"
    return ApiError(405, "MethodNotAllowed", message, {})


def path_not_found() -> ApiError:
    return ApiError(404, "NotFound", "the server could not find the requested resource", {})


def invalid(kind: str, group: str, name: str, causes: Sequence[Cause]) -> ApiError:
    """422 with one `details.causes` entry for each thing that is wrong."""
    lines = [f"{c.field}: {c.message}" for c in causes]
    listed = lines[0] if len(lines) == 1 else f"[{', '.join(lines)}]"
    subject = f"{kind}.{group}" if group else kind
    details: Obj = ({"name": name} if name else {}) | ({"group": group} if group else {}) | {"kind": kind}
    details["causes"] = [{"reason": c.reason, "message": c.message, "field": c.field} for c in causes]
    return ApiError(422, "Invalid", f'{subject} "{name}" is invalid: {listed}', details)


def shown(value: Any) -> str:
    """A value as the API server writes it in messages."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def wrong(field: str, value: Any, why: str) -> Cause:
    return Cause(field, f"Invalid value: {shown(value)}: {why}")


def required(field: str, why: str = "") -> Cause:
    return Cause(field, f"Required value: {why}" if why else "Required value", "FieldValueRequired")


def not_supported(field: str, value: Any, allowed: Sequence[Any]) -> Cause:
    listed = ", ".join(shown(a) for a in allowed)
    return Cause(field, f"Unsupported value: {shown(value)}: supported values: {listed}", "FieldValueNotSupported")


def not_allowed(field: str, why: str) -> Cause:
    return Cause(field, f"Forbidden: {why}", "FieldValueForbidden")


def duplicate(field: str, value: Any) -> Cause:
    return Cause(field, f"Duplicate value: {shown(value)}", "FieldValueDuplicate")
