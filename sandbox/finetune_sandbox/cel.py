"""x-kubernetes-validations: compiled once when a CRD is registered, then run on every write.

The CEL library has the core language. Of Kubernetes' extensions there are the string functions below; optionals
(`self.?a`), quantities, IPs, URLs and the cost budget are not: a CRD that uses them is refused, never half checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import cel

from finetune_sandbox.errors import Cause, Obj, shown, wrong
from finetune_sandbox.schema import ABSENT, Schema, by_keys, map_key, pattern


def _find(text: str, regex: str) -> str:
    found = pattern(regex).search(text)
    return found[0] if found else ""


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "lowerAscii": lambda s: s.lower(),
    "upperAscii": lambda s: s.upper(),
    "trim": lambda s: s.strip(),
    "replace": lambda s, old, new, n=-1: s.replace(old, new, n),
    "split": lambda s, by, n=-1: s.split(by, n - 1) if n > 0 else s.split(by),
    "join": lambda items, by="": by.join(items),
    "substring": lambda s, start, end=None: s[start:end],
    "indexOf": lambda s, part: s.find(part) if isinstance(s, str) else s.index(part) if part in s else -1,
    "lastIndexOf": lambda s, part: s.rfind(part),
    "charAt": lambda s, i: s[i : i + 1],
    "find": _find,
    "isSorted": lambda items: all(a <= b for a, b in itertools.pairwise(items)),
    "sum": lambda items: sum(items),
    "min": lambda items: min(items),
    "max": lambda items: max(items),
}
CORE = frozenset(
    [
        *("size", "string", "int", "uint", "double", "bool", "bytes", "type", "dyn", "has", "all", "exists"),
        *(
            "exists_one",
            "map",
            "filter",
            "matches",
            "contains",
            "startsWith",
            "endsWith",
            "duration",
            "timestamp",
            "getFullYear",
        ),
        *("getMonth", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getHours", "getMinutes"),
        *("getSeconds", "getMilliseconds"),
    ]
)
_RESERVED = frozenset(
    [
        *("true", "false", "null", "in", "as", "break", "const", "continue", "else", "for", "function", "if", "import"),
        *("let", "loop", "package", "namespace", "return", "var", "void", "while"),
    ]
)
_REASONS = frozenset({"FieldValueRequired", "FieldValueForbidden", "FieldValueInvalid", "FieldValueDuplicate"})


@dataclass(frozen=True)
class Rule:
    text: str
    program: cel.Program
    message: str
    message_program: cel.Program | None
    reason: str
    field_path: str
    transition: bool


@dataclass(frozen=True)
class Node:
    """The rules at one place of a schema and below it; places without any have no node."""

    schema: Schema
    rules: tuple[Rule, ...]
    properties: Mapping[str, Node]
    items: Node | None
    extra: Node | None
    functions: dict[str, Callable[..., Any]]  # those of FUNCTIONS that the rules call: each costs time on every run


def compile_rules(schema: Schema, path: str, problems: list[Cause], *, top: bool = True) -> Node | None:
    """The rules of a schema, None where there are none; what does not compile is added to `problems`."""
    raw = schema.get("x-kubernetes-validations") or ()
    rules = [_rule(r, schema, f"{path}.x-kubernetes-validations[{i}]", problems, top=top) for i, r in enumerate(raw)]
    children = {
        key: node
        for key, child in schema.get("properties", {}).items()
        if (node := compile_rules(child, f"{path}.properties[{key}]", problems, top=False))
    }
    items, extra = (
        compile_rules(schema[key], f"{path}.{key}", problems, top=False)
        if isinstance(schema.get(key), Mapping)
        else None
        for key in ("items", "additionalProperties")
    )
    if not (rules or children or items or extra):
        return None
    compiled = tuple(r for r in rules if r)
    programs = [p for r in compiled for p in (r.program, r.message_program) if p]
    functions = {f: FUNCTIONS[f] for p in programs for f in p.functions() if f in FUNCTIONS}
    return Node(schema, compiled, children, items, extra, functions)


def _rule(raw: Mapping[str, Any], schema: Schema, path: str, problems: list[Cause], *, top: bool) -> Rule | None:
    text = raw.get("rule", "")
    program = _compile(text, f"{path}.rule", problems)
    if program and (problem := _try(program, schema, top=top)):
        problems.append(wrong(f"{path}.rule", text, f"compilation failed: {problem}"))
    message_text = raw.get("messageExpression")
    message_program = _compile(message_text, f"{path}.messageExpression", problems) if message_text else None
    if raw.get("optionalOldSelf"):
        problems.append(wrong(f"{path}.optionalOldSelf", True, "the sandbox does not support it"))
    if (reason := raw.get("reason", "FieldValueInvalid")) not in _REASONS:
        problems.append(wrong(f"{path}.reason", reason, f"must be one of {', '.join(sorted(_REASONS))}"))
    if program is None:
        return None
    transition = "oldSelf" in program.variables()
    message = raw.get("message") or f"failed rule: {text}"
    return Rule(text, program, message, message_program, reason, raw.get("fieldPath", ""), transition)


def _compile(text: str, path: str, problems: list[Cause]) -> cel.Program | None:
    try:
        program = cel.compile(text)
    except ValueError as error:
        problems.append(wrong(path, text, f"compilation failed: {error}"))
        return None
    names = (f for f in program.functions() if f.isidentifier() or "." in f)
    unknown = sorted(f for f in names if f not in CORE and f not in FUNCTIONS)
    if unknown:
        problems.append(wrong(path, text, f"compilation failed: undeclared reference to {', '.join(unknown)} "
                              "(the sandbox has the core language and string functions)"))  # fmt: skip
    if {"self", "oldSelf"}.isdisjoint(program.variables()):
        problems.append(wrong(path, text, "a rule must refer to self"))
    return program


def _try(program: cel.Program, schema: Schema, *, top: bool) -> str:
    """What a try on a made-up value shows, "" for nothing: this stands in for the type check of a real server."""
    value = to_cel(schema, sample(schema), top=top)
    if top:
        value["metadata"] = {"name": "a", "generateName": "a"}
    try:
        result = program.execute(cel.Context({"self": value, "oldSelf": value}, dict(FUNCTIONS)))
    except KeyError as error:
        return "" if _open(schema) else f"undefined field '{error.args[0]}'"
    except (TypeError, ValueError, RuntimeError, IndexError, OverflowError):
        return ""  # depends on the value, so it is found when a rule runs
    return "" if isinstance(result, bool) else "must evaluate to a bool"


def sample(schema: Schema) -> Any:
    """A value with every field that the schema names and one element in every list and map."""
    match schema.get("type"):
        case "object" if isinstance(schema.get("additionalProperties"), Mapping):
            return {"a": sample(schema["additionalProperties"])}
        case "object":
            return {k: sample(v) for k, v in schema.get("properties", {}).items()}
        case "array":
            return [sample(schema["items"])]
        case "string":
            moment = "2026-01-02T03:04:05Z"
            return moment if schema.get("format") == "date-time" else next(iter(schema.get("enum", ())), "a")
        case "boolean":
            return True
        case "number":
            return 1.5
    return 1


def _open(schema: Any) -> bool:
    """Whether the schema has places with keys that it does not name."""
    if isinstance(schema, Mapping):
        free = schema.get("additionalProperties") or schema.get("x-kubernetes-preserve-unknown-fields")
        return bool(free) or any(_open(v) for v in schema.values())
    return isinstance(schema, list) and any(_open(v) for v in schema)


def check(root: Node, obj: Obj, old: Obj | None) -> list[Cause]:
    """What the rules say about `obj`. Rules with oldSelf run on update only, the others only on what changed."""
    return list(_check(root, obj, ABSENT if old is None else old, "", top=True))


def _check(node: Node, value: Any, old: Any, path: str, *, top: bool = False) -> Iterator[Cause]:
    if value is None:
        return
    yield from _run(node, value, old, path, top=top)
    if isinstance(value, dict):
        before = old if isinstance(old, dict) else {}
        for key, child in value.items():
            below = node.properties.get(key) or (None if key in node.schema.get("properties", {}) else node.extra)
            if below:
                yield from _check(below, child, before.get(key, ABSENT), f"{path}.{key}" if path else key)
    elif isinstance(value, list) and node.items:
        keys = node.schema.get("x-kubernetes-list-map-keys", ())
        was = by_keys(old, keys) if keys and isinstance(old, list) else {}
        for i, item in enumerate(value):
            match = was.get(map_key(item, keys), ABSENT) if keys and isinstance(item, dict) else ABSENT
            yield from _check(node.items, item, match, f"{path}[{i}]")


def _run(node: Node, value: Any, old: Any, path: str, *, top: bool) -> Iterator[Cause]:
    known = old is not ABSENT
    same = known and value == old
    wanted = [r for r in node.rules if (known if r.transition else not same)]
    if not wanted:
        return
    variables = {"self": to_cel(node.schema, value, top=top)}
    if any(r.transition for r in wanted):
        variables["oldSelf"] = variables["self"] if same else to_cel(node.schema, old, top=top)
    context = cel.Context(variables, node.functions)
    shape = "" if isinstance(value, dict | list) else f"{shown(value)}: "
    for rule in wanted:
        try:
            held = rule.program.execute(context)
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError, OverflowError) as error:
            why = f"no such key: {error.args[0]}" if isinstance(error, KeyError) else str(error)
            yield _cause(rule, path, shape, f"{why} evaluating rule: {rule.message}")
            continue
        if held is not True:
            yield _cause(rule, path, shape, _message(rule, context))


def _message(rule: Rule, context: cel.Context) -> str:
    """The message expression's string; as on a real server the plain message where it fails."""
    if rule.message_program:
        try:
            text = rule.message_program.execute(context)
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError, OverflowError):
            return rule.message
        if isinstance(text, str) and text.strip() and "\n" not in text:
            return text
    return rule.message


def _cause(rule: Rule, path: str, shape: str, message: str) -> Cause:
    field = f"{path}{rule.field_path}".lstrip(".") or "<nil>"
    match rule.reason:
        case "FieldValueRequired":
            text = f"Required value: {message}"
        case "FieldValueForbidden":
            text = f"Forbidden: {message}"
        case "FieldValueDuplicate":
            text = f"Duplicate value: {shape}{message}"
        case _:
            text = f"Invalid value: {shape}{message}"
    return Cause(field, text, rule.reason)


def to_cel(schema: Schema, value: Any, *, top: bool = False) -> Any:
    """A value as CEL sees it: numbers are doubles, names that CEL reserves are escaped, unknown fields are left out."""
    if isinstance(value, dict):
        properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
        keep = schema.get("x-kubernetes-preserve-unknown-fields")
        out: dict[str, Any] = {}
        if top or schema.get("x-kubernetes-embedded-resource"):
            out |= {k: value[k] for k in ("apiVersion", "kind") if k in value}
            data = value.get("metadata") or {}
            out["metadata"] = {k: data[k] for k in ("name", "generateName") if k in data}
        for key, child in value.items():
            if key in properties:
                out[_escaped(key)] = to_cel(properties[key], child)
            elif isinstance(extra, Mapping):
                out[key] = to_cel(extra, child)
            elif keep or extra is True:
                out.setdefault(key, child)
        return out
    if isinstance(value, list):
        items = schema.get("items")
        return [to_cel(items, v) for v in value] if isinstance(items, Mapping) else value
    if schema.get("type") == "number" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and schema.get("format") == "date-time":
        return datetime.fromisoformat(value.replace("Z", "+00:00"))
    return value


@lru_cache(maxsize=4096)
def _escaped(name: str) -> str:
    if name in _RESERVED:
        return f"__{name}__"
    if name.isidentifier() and "__" not in name:
        return name
    escapes = (("__", "__underscores__"), (".", "__dot__"), ("-", "__dash__"), ("/", "__slash__"))
    for plain, escaped in escapes:
        name = name.replace(plain, escaped)
    return name
