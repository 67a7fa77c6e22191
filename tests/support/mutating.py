"""A manifest with one property added, changed, deleted or at its bounds, by the CRD's own schema."""

import copy
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from hypothesis import strategies as st

from finetune_api.crd import job_crd

Schema = dict[str, Any]
Path = tuple[str | int, ...]
ABSENT = object()


class Mutation(NamedTuple):
    path: Path
    how: str
    manifest: dict[str, Any]

    def __str__(self) -> str:
        found = value_at(self.manifest["spec"], self.path)
        return f"spec.{'.'.join(map(str, self.path))} {self.how}: {'' if found is ABSENT else repr(found)[:200]}"


def schema() -> Schema:
    versions = job_crd()["spec"]["versions"]
    spec: Schema = versions[0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return spec


def places(node: Schema, value: Any, path: Path = (), depth: int = 0) -> Iterator[tuple[Path, Schema, bool]]:
    """(path, schema, whether its parent must have it) of every property, also below what the value lacks."""
    required = node.get("required", ())
    for name, child in node.get("properties", {}).items():
        below = value.get(name, ABSENT) if isinstance(value, dict) else ABSENT
        yield (*path, name), child, name in required
        if child["type"] == "object" and "properties" in child:
            yield from places(child, below, (*path, name))
        items = child.get("items") or {}
        if isinstance(below, list) and below and items.get("type") == "object":
            yield from places(items, below[0], (*path, name, 0))


def values(node: Schema) -> st.SearchStrategy[Any]:
    """What the schema allows."""
    if "enum" in node:
        return st.sampled_from(node["enum"])
    match node["type"]:
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(node.get("minimum", -(2**31)), node.get("maximum", 2**31 - 1))
        case "number":
            return st.floats(
                node.get("minimum", -1e6),
                node.get("maximum", 1e6),
                exclude_min=bool(node.get("exclusiveMinimum")),
                exclude_max=bool(node.get("exclusiveMaximum")),
                allow_subnormal=False,
            )
        case "string":
            longest = node.get("maxLength", 1024)
            if "pattern" in node:
                # `$` of the schema is the end; Python's is also what precedes a last newline.
                pattern = re.sub(r"\$$", r"\\Z", node["pattern"])
                return st.from_regex(pattern, alphabet=st.characters(max_codepoint=127)).filter(
                    lambda text: node.get("minLength", 0) <= len(text) <= longest
                )
            return st.text("abcXYZ019 _-.", min_size=node.get("minLength", 0), max_size=min(longest, 16))
        case "array":
            least = node.get("minItems", 0)
            return st.lists(values(node["items"]), min_size=least, max_size=max(least, 2))
        case "object" if "properties" in node:
            required = node.get("required", ())
            own = {name: values(child) for name, child in node["properties"].items()}
            return st.fixed_dictionaries({name: own[name] for name in required}) | st.fixed_dictionaries(
                {name: own[name] for name in required}, optional={n: s for n, s in own.items() if n not in required}
            )
        case _:
            return st.dictionaries(st.sampled_from(["a", "b"]), values(node["additionalProperties"]), max_size=2)


def bounds(node: Schema) -> list[Any]:
    """Values at the bounds, and just beyond them."""
    if "enum" in node:
        return [*node["enum"], "Nothing", ""]
    match node["type"]:
        case "integer":
            low, high = node.get("minimum", 0), node.get("maximum", 2**31 - 1)
            return [low, low - 1, high, high + 1, 0, -1]
        case "number":
            low, high = node.get("minimum", 0), node.get("maximum", 1e6)
            return [low, low - 0.5, high, high + 0.5, 0, 1]
        case "string":
            longest = node.get("maxLength", 1024)
            return ["", "a", "a" * min(longest, 2000), "a" * (longest + 1), 7]
        case "array":
            return [[], None]
        case "boolean":
            return [True, False, "yes"]
    return [{}, []]


@st.composite
def mutations(draw: st.DrawFn, seed: dict[str, Any]) -> Mutation:
    path, node, _ = draw(st.sampled_from(places_of(seed)))
    how = draw(st.sampled_from(["given", "given", "at its bounds", "deleted"]))
    manifest = copy.deepcopy(seed)
    if how == "deleted":
        if value_at(seed["spec"], path) is ABSENT:
            how = "given"
        else:
            parent = value_at(manifest["spec"], path[:-1])
            del parent[path[-1]]
            return Mutation(path, how, manifest)
    value = draw(values(node) if how == "given" else st.sampled_from(bounds(node)))
    put(manifest["spec"], path, value)
    return Mutation(path, how, manifest)


def places_of(seed: dict[str, Any]) -> list[tuple[Path, Schema, bool]]:
    return list(places(schema(), seed["spec"]))


def value_at(value: Any, path: Path) -> Any:
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return ABSENT
    return value


def put(value: Any, path: Path, new: Any) -> None:
    """With the objects on the way to it."""
    for step in path[:-1]:
        value = value.setdefault(step, {}) if isinstance(value, dict) else value[step]
    value[path[-1]] = new
