"""The three patch languages and the merge of server-side apply, as functions of (document, patch)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finetune_sandbox.errors import ApiError, Obj, bad_request

# Lists of objects that merge by a key. The name of the field is enough for the kinds that are served, except `ports`.
MERGE_KEYS: Mapping[str, Sequence[str]] = {
    "addresses": ("type",),
    "conditions": ("type",),
    "containers": ("name",),
    "ephemeralContainers": ("name",),
    "env": ("name",),
    "hostAliases": ("ip",),
    "imagePullSecrets": ("name",),
    "initContainers": ("name",),
    "ownerReferences": ("uid",),
    "podIPs": ("ip",),
    "ports": ("containerPort", "port"),
    "resourceClaims": ("name",),
    "secrets": ("name",),
    "taints": ("key",),
    "topologySpreadConstraints": ("topologyKey",),
    "volumeDevices": ("devicePath",),
    "volumeMounts": ("mountPath",),
    "volumes": ("name",),
    "webhooks": ("name",),
}
MERGED_SETS = frozenset({"finalizers"})  # lists of scalars that merge; every other one is replaced
ListKeys = Callable[[tuple[str, ...]], Sequence[str] | None]  # path -> merge keys, () = a set, None = atomic


def merge(document: Any, patch: Any) -> Any:
    """JSON merge patch, RFC 7386."""
    if not isinstance(patch, Mapping):
        return patch
    out = dict(document) if isinstance(document, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merge(out.get(key), value)
    return out


def json_patch(document: Any, operations: Any) -> Any:
    """JSON patch, RFC 6902. Raises ApiError 400 on a malformed patch, 422 on one that does not apply."""
    if not isinstance(operations, list):
        raise bad_request("a JSON patch is a list of operations")
    document = copy.deepcopy(document)
    for op in operations:
        if not isinstance(op, Mapping) or not isinstance(op.get("path"), str):
            raise bad_request(f"a JSON patch operation needs op and path, found {op!r}")
        document = _apply_operation(document, op)
    return document


def _apply_operation(document: Any, op: Mapping[str, Any]) -> Any:
    path = _pointer(op["path"])
    match op.get("op"):
        case "add":
            return _write(document, path, copy.deepcopy(op.get("value")), insert=True)
        case "replace":
            _read(document, path)
            return _write(document, path, copy.deepcopy(op.get("value")), insert=False)
        case "remove":
            return _remove(document, path)
        case "test":
            found = _read(document, path)
            if found != op.get("value"):
                raise _unprocessable(f"testing value {op['path']} failed")
            return document
        case "copy" | "move" as kind:
            source = _pointer(str(op.get("from", "")))
            value = copy.deepcopy(_read(document, source))
            if kind == "move":
                document = _remove(document, source)
            return _write(document, path, value, insert=True)
    raise bad_request(f"unknown JSON patch operation {op.get('op')!r}")


def _unprocessable(why: str) -> ApiError:
    return ApiError(422, "Invalid", f"the server rejected our request due to an error in our request: {why}", {})


def _pointer(path: str) -> list[str]:
    if path and not path.startswith("/"):
        raise bad_request(f"a JSON pointer starts with '/', found {path!r}")
    return [p.replace("~1", "/").replace("~0", "~") for p in path.split("/")[1:]]


def _position(items: list[Any], token: str, *, end: bool) -> int:
    if token == "-" and end:
        return len(items)
    if not token.isdigit() or int(token) >= len(items) + end:
        raise _unprocessable(f"index {token!r} is not in a list of {len(items)}")
    return int(token)


def _read(document: Any, path: Sequence[str]) -> Any:
    for token in path:
        if isinstance(document, list):
            document = document[_position(document, token, end=False)]
        elif isinstance(document, dict) and token in document:
            document = document[token]
        else:
            raise _unprocessable(f"there is no {'/' + '/'.join(path)}")
    return document


def _write(document: Any, path: Sequence[str], value: Any, *, insert: bool) -> Any:
    if not path:
        return value
    parent = _read(document, path[:-1])
    if isinstance(parent, list):
        at = _position(parent, path[-1], end=insert)
        parent[at : at if insert else at + 1] = [value]
    elif isinstance(parent, dict):
        parent[path[-1]] = value
    else:
        raise _unprocessable(f"/{'/'.join(path[:-1])} is neither an object nor a list")
    return document


def _remove(document: Any, path: Sequence[str]) -> Any:
    _read(document, path)
    if not path:
        return None
    parent = _read(document, path[:-1])
    del parent[_position(parent, path[-1], end=False) if isinstance(parent, list) else path[-1]]
    return document


def strategic(document: Any, patch: Obj) -> Any:
    """Strategic merge patch by MERGE_KEYS, with the $patch, $deleteFromPrimitiveList, $setElementOrder and
    $retainKeys directives."""
    directive = patch.get("$patch")
    if directive == "delete":
        return {}
    content = {k: v for k, v in patch.items() if not k.startswith("$")}
    if directive == "replace":
        return content
    if directive not in (None, "merge"):
        raise bad_request(f"unknown $patch directive {directive!r}")
    out = dict(document) if isinstance(document, Mapping) else {}
    if "$retainKeys" in patch:
        out = {k: v for k, v in out.items() if k in patch["$retainKeys"]}
    for key, dropped in patch.items():
        if key.startswith("$deleteFromPrimitiveList/"):
            field = key.partition("/")[2]
            out[field] = [v for v in out.get(field) or [] if v not in dropped]
    for key, value in content.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict):
            out[key] = strategic(out.get(key), value)
        elif isinstance(value, list):
            out[key] = _strategic_list(key, out.get(key) or [], value)
        else:
            out[key] = value
    for key, order in patch.items():
        if key.startswith("$setElementOrder/"):
            field = key.partition("/")[2]
            out[field] = _ordered(field, out.get(field) or [], order)
    return out


def _merge_key(field: str, items: Sequence[Any]) -> str | None:
    keys = MERGE_KEYS.get(field, ())
    return next((k for k in keys if all(isinstance(i, Mapping) and k in i for i in items)), keys[0] if keys else None)


def _strategic_list(field: str, items: list[Any], patch: list[Any]) -> list[Any]:
    if field in MERGED_SETS:
        return items + [v for v in patch if v not in items]
    if any(isinstance(p, Mapping) and p.get("$patch") == "replace" for p in patch):
        return [p for p in patch if not (isinstance(p, Mapping) and "$patch" in p)]
    key = _merge_key(field, [p for p in patch if isinstance(p, Mapping)])
    if key is None:
        return patch
    out = list(items)
    for element in patch:
        if not isinstance(element, dict) or key not in element:
            raise bad_request(f"an element of {field} in a strategic merge patch needs its merge key {key!r}")
        at = next((i for i, o in enumerate(out) if o.get(key) == element[key]), None)
        if element.get("$patch") == "delete":
            out = [o for o in out if o.get(key) != element[key]]
        elif at is None:
            out.append(strategic({}, element))
        else:
            out[at] = strategic(out[at], element)
    return out


def _ordered(field: str, items: list[Any], order: list[Any]) -> list[Any]:
    key = _merge_key(field, order)

    def identity(item: Any) -> Any:
        return item.get(key) if key and isinstance(item, Mapping) else item

    wanted = [identity(o) for o in order]
    place = {i: wanted.index(identity(item)) for i, item in enumerate(items) if identity(item) in wanted}
    listed = sorted(place, key=lambda i: place[i])
    return [items[i] for i in listed] + [item for i, item in enumerate(items) if i not in place]


def builtin_list_keys(path: tuple[str, ...]) -> Sequence[str] | None:
    """How the lists of built-in kinds merge in server-side apply."""
    field = path[-1]
    return () if field in MERGED_SETS else MERGE_KEYS.get(field)


def apply(document: Any, config: Any, keys: ListKeys, path: tuple[str, ...] = ()) -> Any:
    """Server-side apply's merge: objects merge, lists merge by their keys, everything else is replaced."""
    if isinstance(config, Mapping) and isinstance(document, Mapping):
        out = dict(document)
        for field, value in config.items():
            out[field] = apply(out[field], value, keys, (*path, field)) if field in out else value
        return out
    if not (isinstance(config, list) and isinstance(document, list)) or (by := keys(path)) is None:
        return config
    if not by:
        return document + [v for v in config if v not in document]
    by = [k for k in by if all(isinstance(c, Mapping) and k in c for c in config)] or by
    out_list = list(document)
    for element in config:
        same = (i for i, o in enumerate(out_list) if all(o.get(k) == element.get(k) for k in by))
        at = next(same, None)
        if at is None:
            out_list.append(element)
        else:
            out_list[at] = apply(out_list[at], element, keys, path)
    return out_list
