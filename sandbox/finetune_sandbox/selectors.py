"""Label and field selectors: parsed once, then asked of many objects."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from finetune_sandbox.errors import bad_request

_NAME = r"[A-Za-z0-9][-A-Za-z0-9_.]*"
_KEY = r"[A-Za-z0-9][-A-Za-z0-9_./]*"
_SET = re.compile(rf"({_KEY})\s+(in|notin)\s*\(([^()]*)\)")
_EQUAL = re.compile(rf"({_KEY})\s*(==|=|!=)\s*({_NAME})?")
_EXISTS = re.compile(rf"(!?)\s*({_KEY})")


@dataclass(frozen=True)
class Requirement:
    """`operator` is in, notin, exists or absent; a missing key satisfies notin and absent."""

    key: str
    operator: str
    values: frozenset[str] = frozenset()

    def matches(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        match self.operator:
            case "in":
                return value in self.values
            case "notin":
                return value not in self.values
            case "exists":
                return value is not None
            case _:
                return value is None


@dataclass(frozen=True)
class Selector:
    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(r.matches(labels) for r in self.requirements)

    def pins(self) -> list[tuple[str, str]]:
        """The (key, value) pairs that every match has: what an index can answer."""
        return [(r.key, next(iter(r.values))) for r in self.requirements if r.operator == "in" and len(r.values) == 1]


@lru_cache(maxsize=4096)
def parse_labels(text: str) -> Selector:
    """`a=b,c!=d,e in (f,g),h,!i`. Raises ApiError 400."""
    found: list[Requirement] = []
    rest = text.strip()
    while rest:
        if m := _SET.match(rest):
            values = frozenset(v.strip() for v in m[3].split(","))
            found.append(Requirement(m[1], m[2], values))
        elif m := _EQUAL.match(rest):
            found.append(Requirement(m[1], "notin" if m[2] == "!=" else "in", frozenset({m[3] or ""})))
        elif m := _EXISTS.match(rest):
            found.append(Requirement(m[2], "absent" if m[1] else "exists"))
        else:
            raise bad_request(f"unable to parse requirement: found {text!r}, expected key, key=value or key in (a, b)")
        rest = rest[m.end() :].lstrip()
        if rest and not rest.startswith(","):
            raise bad_request(f"unable to parse requirement: found {rest!r} in {text!r}, expected ',' or the end")
        if rest == ",":
            raise bad_request(f"unable to parse requirement: {text!r} ends with a comma")
        rest = rest[1:].lstrip()
    return Selector(tuple(found))


def parse_fields(text: str, supported: Collection[str]) -> Selector:
    """`metadata.name=a,status.phase!=Running`. Raises ApiError 400 on a field that the resource cannot select by."""
    found: list[Requirement] = []
    for term in filter(None, (t.strip() for t in text.split(","))):
        m = re.fullmatch(r"([^=!\s]+)\s*(==|=|!=)\s*(.*)", term)
        if not m:
            raise bad_request(f"invalid selector: {text!r}; can't understand {term!r}")
        if m[1] not in supported:
            raise bad_request(f"field label not supported: {m[1]}")
        found.append(Requirement(m[1], "notin" if m[2] == "!=" else "in", frozenset({m[3]})))
    return Selector(tuple(found))


def from_label_selector(selector: Mapping[str, Any]) -> Selector:
    """A metav1.LabelSelector (`matchLabels`, `matchExpressions`)."""
    operators = {"In": "in", "NotIn": "notin", "Exists": "exists", "DoesNotExist": "absent"}
    found = [Requirement(k, "in", frozenset({v})) for k, v in (selector.get("matchLabels") or {}).items()]
    for e in selector.get("matchExpressions") or []:
        found.append(Requirement(e["key"], operators[e["operator"]], frozenset(e.get("values") or ())))
    return Selector(tuple(found))


def field_values(obj: Mapping[str, Any], fields: Collection[str]) -> dict[str, str]:
    """The selectable fields of an object as strings; a field that is not there is the empty string."""
    out: dict[str, str] = {}
    for path in fields:
        value: Any = obj
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        out[path] = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return out
