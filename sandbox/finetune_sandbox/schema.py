"""Structural schemas: prune, default and validate a custom object as the API server does.

Pruning and defaulting change the object in place. Validation ratchets: on update a part that did not change is not
validated again, so a rule that became stricter does not lock existing objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from finetune_sandbox.errors import Cause, Obj, duplicate, not_supported, required, shown, wrong

Schema = Mapping[str, Any]
_ROOT = ("apiVersion", "kind", "metadata")
ABSENT: Any = object()


def prune(schema: Schema, obj: Obj) -> list[str]:
    """Drops what the schema does not name; returns the dropped paths. apiVersion, kind and metadata stay."""
    dropped: list[str] = []
    _prune(schema, {k: v for k, v in obj.items() if k not in _ROOT}, "", dropped, target=obj)
    return dropped


def _prune(schema: Schema, value: Any, path: str, dropped: list[str], target: Any = None) -> None:
    if isinstance(value, dict):
        keep = schema.get("x-kubernetes-preserve-unknown-fields") is True
        properties = schema.get("properties", {})
        extra = schema.get("additionalProperties")
        for key, child in list(value.items()):
            where = f"{path}.{key}" if path else key
            if child is None and key in properties and not properties[key].get("nullable"):
                del (value if target is None else target)[key]  # a null is as good as absent
            elif key in properties:
                _prune(properties[key], child, where, dropped)
            elif isinstance(extra, Mapping):
                _prune(extra, child, where, dropped)
            elif schema.get("x-kubernetes-embedded-resource") and key in _ROOT:
                continue
            elif not keep and extra is not True:
                del (value if target is None else target)[key]
                dropped.append(where)
    elif isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        for i, item in enumerate(value):
            _prune(schema["items"], item, f"{path}[{i}]", dropped)


def default(schema: Schema, value: Any) -> None:
    """Fills in defaults; a null where null is not allowed counts as absent when there is a default."""
    if isinstance(value, dict):
        for key, child in schema.get("properties", {}).items():
            if "default" in child and (key not in value or (value[key] is None and not child.get("nullable"))):
                value[key] = _fresh(child["default"])
            if key in value:
                default(child, value[key])
        if isinstance(extra := schema.get("additionalProperties"), Mapping):
            for child_value in value.values():
                default(extra, child_value)
    elif isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        for item in value:
            default(schema["items"], item)


def _fresh(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _fresh(v) for k, v in value.items()}
    return [_fresh(v) for v in value] if isinstance(value, list) else value


def list_keys(schema: Schema) -> Callable[[tuple[str, ...]], Sequence[str] | None]:
    """How the lists of a custom kind merge: their map keys, () for a set, None for an atomic list."""

    def find(path: tuple[str, ...]) -> Sequence[str] | None:
        if path[0] == "metadata":
            return {"finalizers": (), "ownerReferences": ("uid",)}.get(path[-1])
        node: Schema = schema
        for part in path:
            while "items" in node:
                node = node["items"]
            node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
            node = node if isinstance(node, Mapping) else {}
        kind = node.get("x-kubernetes-list-type")
        return () if kind == "set" else node.get("x-kubernetes-list-map-keys") if kind == "map" else None

    return find


def validate(schema: Schema, obj: Obj, old: Obj | None = None) -> list[Cause]:
    """Every place where `obj` breaks its schema (CEL rules apart)."""
    return _validate(schema, _validated(obj), _validated(old) if old is not None else ABSENT, "")


def _validated(obj: Obj) -> Obj:
    """Of the metadata a schema may only restrict the name."""
    data = {k: v for k, v in obj["metadata"].items() if k in ("name", "generateName")} if "metadata" in obj else {}
    return {k: v for k, v in obj.items() if k not in _ROOT} | {"metadata": data}


def _validate(schema: Schema, value: Any, old: Any, path: str) -> list[Cause]:
    if old is not ABSENT and value == old:
        return []
    if value is None and schema.get("nullable"):
        return []
    if (cause := _type(schema, value, path)) is not None:
        return [cause]
    found: list[Cause] = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(not_supported(path, value, schema["enum"]))
    if isinstance(value, dict):
        found += _object(schema, value, old, path)
    elif isinstance(value, list):
        found += _list(schema, value, old, path)
    elif isinstance(value, str):
        found += _string(schema, value, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found += _number(schema, value, path)
    return found + _combined(schema, value, path)


_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
_NAMES = {
    dict: "object",
    list: "array",
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def _type(schema: Schema, value: Any, path: str) -> Cause | None:
    wanted: tuple[type, ...]
    if schema.get("x-kubernetes-int-or-string"):
        wanted, names = (int, str), "integer,string"
    elif not (names := schema.get("type", "")):
        return None
    else:
        wanted = _TYPES[names]
    whole = names == "integer" and isinstance(value, float) and value.is_integer()
    if whole or (isinstance(value, wanted) and (names == "boolean" or not isinstance(value, bool))):
        return None
    found = _NAMES[type(value)]
    why = f'Invalid value: "{found}": {path} in body must be of type {names}: "{found}"'
    return Cause(path, why, "FieldValueTypeInvalid")


def _object(schema: Schema, value: Obj, old: Any, path: str) -> list[Cause]:
    found: list[Cause] = []
    properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
    before = old if isinstance(old, dict) else {}
    for key in schema.get("required", ()):
        if key not in value:
            found.append(required(f"{path}.{key}" if path else key))
    if "maxProperties" in schema and len(value) > schema["maxProperties"]:
        why = f"Too many: {len(value)}: must have at most {schema['maxProperties']} items"
        found.append(Cause(path, why, "FieldValueTooMany"))
    if len(value) < schema.get("minProperties", 0):
        found.append(_body(path, value, f"should have at least {schema['minProperties']} properties"))
    for key, child in value.items():
        part = properties.get(key, extra if isinstance(extra, Mapping) else None)
        if part is not None:
            found += _validate(part, child, before.get(key, ABSENT), f"{path}.{key}" if path else key)
    return found


def _list(schema: Schema, value: list[Any], old: Any, path: str) -> list[Cause]:
    found: list[Cause] = []
    if "maxItems" in schema and len(value) > schema["maxItems"]:
        why = f"Too many: {len(value)}: must have at most {schema['maxItems']} items"
        found.append(Cause(path, why, "FieldValueTooMany"))
    if len(value) < schema.get("minItems", 0):
        found.append(_body(path, len(value), f"should have at least {schema['minItems']} items"))
    items = schema.get("items")
    keys = schema.get("x-kubernetes-list-map-keys", ()) if schema.get("x-kubernetes-list-type") == "map" else ()
    before = by_keys(old, keys) if keys and isinstance(old, list) else {}
    seen: list[Any] = []
    for i, item in enumerate(value):
        if isinstance(items, Mapping):
            was = before.get(map_key(item, keys), ABSENT) if keys and isinstance(item, dict) else ABSENT
            found += _validate(items, item, was, f"{path}[{i}]")
        identity = item
        if keys and isinstance(item, dict):
            identity = {k: item[k] for k in keys if k in item}
        if (keys or schema.get("x-kubernetes-list-type") == "set") and identity in seen:
            found.append(duplicate(f"{path}[{i}]", identity))
        seen.append(identity)
    return found


def map_key(item: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    """What identifies an element of a map list."""
    return tuple(shown(item.get(k)) for k in keys)


def by_keys(items: Sequence[Any], keys: Sequence[str]) -> dict[tuple[str, ...], Any]:
    return {map_key(i, keys): i for i in items if isinstance(i, dict)}


def _string(schema: Schema, value: str, path: str) -> list[Cause]:
    found: list[Cause] = []
    if "maxLength" in schema and len(value) > schema["maxLength"]:
        why = f"Too long: may not be more than {schema['maxLength']} bytes"
        found.append(Cause(path, why, "FieldValueTooLong"))
    if len(value) < schema.get("minLength", 0):
        found.append(_body(path, value, f"should be at least {schema['minLength']} chars long"))
    if "pattern" in schema and not pattern(schema["pattern"]).search(value):
        found.append(_body(path, value, f"should match '{schema['pattern']}'"))
    if (form := str(schema.get("format"))) in _FORMATS and not _FORMATS[form](value):
        why = f"{path} in body must be of type {form}: {shown(value)}"
        found.append(Cause(path, f"Invalid value: {shown(value)}: {why}", "FieldValueTypeInvalid"))
    return found


def _number(schema: Schema, value: float, path: str) -> list[Cause]:
    found: list[Cause] = []
    low, high, step = schema.get("minimum"), schema.get("maximum"), schema.get("multipleOf")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and (value <= low if above else value < low):
        found.append(_body(path, value, f"should be greater than {'' if above else 'or equal to '}{_plain(low)}"))
    if high is not None and (value >= high if below else value > high):
        found.append(_body(path, value, f"should be less than {'' if below else 'or equal to '}{_plain(high)}"))
    if step and abs(value / step - round(value / step)) > 1e-9:
        found.append(_body(path, value, f"should be a multiple of {_plain(step)}"))
    bits = {"int32": 31, "int64": 63}.get(schema.get("format", ""))
    if bits and not -(1 << bits) <= value < 1 << bits:
        found.append(_body(path, value, f"must be of type {schema['format']}"))
    return found


def _combined(schema: Schema, value: Any, path: str) -> list[Cause]:
    """allOf, anyOf, oneOf and not: value validations only, as structural schemas have it."""
    found: list[Cause] = []
    for part in schema.get("allOf", ()):
        found += _validate(part, value, ABSENT, path)
    if (parts := schema.get("anyOf")) and not any(not _validate(p, value, ABSENT, path) for p in parts):
        found.append(_body(path, value, "must validate at least one schema (anyOf)"))
    if parts := schema.get("oneOf"):
        fits = sum(not _validate(p, value, ABSENT, path) for p in parts)
        if fits != 1:
            why = "must validate one and only one schema (oneOf). "
            why += "Found none valid" if not fits else f"Found {fits} valid alternatives"
            found.append(_body(path, value, why))
    if (part := schema.get("not")) is not None and not _validate(part, value, ABSENT, path):
        found.append(_body(path, value, "must not validate the schema (not)"))
    return found


def _body(path: str, value: Any, why: str) -> Cause:
    return wrong(path, value, f"{path} in body {why}")


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else repr(number)


@lru_cache(maxsize=1024)
def pattern(text: str) -> re.Pattern[str]:
    """A Go regular expression in Python's syntax: `$` is the very end, `\\z` is `\\Z`."""
    text = text.replace(r"\z", r"\Z")
    out, i, in_class = [], 0, False
    while i < len(text):
        char = text[i]
        if char == "\\":
            out.append(text[i : i + 2])
            i += 2
            continue
        in_class = char == "[" or (in_class and char != "]")
        out.append(r"\Z" if char == "$" and not in_class and "(?m" not in text else char)
        i += 1
    return re.compile("".join(out))


def _time(text: str) -> bool:
    try:
        return "T" in text and datetime.fromisoformat(text.replace("Z", "+00:00")).tzinfo is not None
    except ValueError:
        return False


def _matches(regex: str) -> Callable[[str], bool]:
    compiled = re.compile(regex)
    return lambda text: compiled.fullmatch(text) is not None


_FORMATS: Mapping[str, Callable[[str], bool]] = {
    "date-time": _time,
    "date": _matches(r"\d{4}-\d{2}-\d{2}"),
    "uuid": _matches(r"(?i)[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}"),
    "byte": _matches(r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"),
    "ipv4": _matches(r"(\d{1,3}\.){3}\d{1,3}"),
}
