"""Objects as nobody should write them: made from sound ones by putting odd values at places that the schemas know.

A case is a short list of changes, so that a failure shrinks to the one value that matters.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hypothesis import strategies as st
from pydantic import TypeAdapter

from finetune_api.crd import job_crd, profile_crd
from finetune_api.failures import TerminationMessage

Object = dict[str, Any]
Path = tuple[str | int, ...]
GONE = "<gone>"
"""In place of a value: the field is missing."""
FAR = [2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 10**19, 10**400, 10**4000]
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, *FAR, *(-n for n in FAR)]),
    st.integers(),
    st.floats(),
    st.sampled_from([1e300, -1e300, 5e-324, 0.1]),
)
TIMES = st.sampled_from(
    [
        "0000-01-01T00:00:00Z",
        "0001-01-01T00:00:00Z",
        "0001-01-01T00:00:00+14:00",
        "1969-12-31T23:59:59Z",
        "9999-12-31T23:59:59Z",
        "9999-12-31T23:59:59.999999-12:00",
        "2026-03-01T12:00:00",
        "2026-03-01T12:00:00.123456789Z",
        "2026-03-01T12:00:00+23:59",
        "2026-03-01",
        "2026-13-45T99:99:99Z",
        "now",
        "",
    ]
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "x" * 5000,
            "9" * 4301,
            "9" * 30 + "Ti",
            "0." + "0" * 40 + "1",
            "-1",
            "NaN",
            "1e999",
            "\0",
            "a\nb\u2028c\x1b[2J\u202e",
            "\ud800",
            "²",
            "٣",
            "../../../../api/v1/secrets",
            "{" * 3000,
            "[" * 100_000,
            '{"prepared": ' * 2000,
            "null",
            "true",
            '{"schedulingGraceSeconds": 1000000000000, "maxActiveDeadlineSeconds": 9007199254740991}',
        ]
    ),
)


class Nested(NamedTuple):
    """Lists in objects in lists; made where it is put, since Python cannot print what is nested deeply."""

    depth: int

    def made(self) -> Any:
        value: Any = []
        for level in range(self.depth):
            value = [value] if level % 2 else {"a": value}
        return value


OTHERS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([[], {}, [None], [[]], [{}], {"": None}, [1, "a"], {"a": {"b": [1]}}, [{"type": "Failed"}]]),
    st.sampled_from([Nested(50), Nested(2500)]),
    st.just(GONE),
)
ANYTHING: st.SearchStrategy[Any] = st.one_of(NUMBERS, TIMES, TEXTS, OTHERS)


class Place(NamedTuple):
    path: Path
    schema: Mapping[str, Any]


def places(schema: Mapping[str, Any], defs: Mapping[str, Any] | None = None, path: Path = ()) -> Iterator[Place]:
    """Every member that a JSON schema knows; of a list the first item, of a map one key."""
    defs = schema.get("$defs", {}) if defs is None else defs
    if "$ref" in schema:
        yield from places(defs[schema["$ref"].rsplit("/", 1)[1]], defs, path)
        return
    for choice in schema.get("anyOf", ()):
        if choice.get("type") != "null":
            yield from places(choice, defs, path)
    if "anyOf" in schema:
        return
    if path:
        yield Place(path, schema)
    for name, child in schema.get("properties", {}).items():
        yield from places(child, defs, (*path, name))
    if isinstance(schema.get("items"), dict):
        yield from places(schema["items"], defs, (*path, 0))
    if isinstance(schema.get("additionalProperties"), dict):
        yield from places(schema["additionalProperties"], defs, (*path, "key"))


def values(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Something of the right kind, in or out of bounds; now and then anything else."""
    match schema.get("type"):
        case "integer" | "number":
            edges = [schema[key] + step for key in ("minimum", "maximum") if key in schema for step in (-1, 0, 1)]
            near = st.sampled_from(edges) if edges else st.nothing()
            return st.one_of(NUMBERS, near, ANYTHING)
        case "string":
            known = st.sampled_from(schema["enum"]) if "enum" in schema else st.nothing()
            return st.one_of(TIMES if schema.get("format") == "date-time" else TEXTS, known, ANYTHING)
        case "boolean":
            return st.one_of(st.booleans(), ANYTHING)
    return ANYTHING


def put(target: Any, path: Path, value: Any) -> Any:
    """The target with the value at that place; what is in the way there is replaced."""
    if not path:
        return value.made() if isinstance(value, Nested) else value
    step, rest = path[0], path[1:]
    if isinstance(step, int):
        items = list(target) if isinstance(target, list) else []
        found = put(items[step] if step < len(items) else None, rest, value)
        items[step : step + 1] = [] if found == GONE and not rest else [found]
        return items
    members = dict(target) if isinstance(target, dict) else {}
    if value == GONE and not rest:
        members.pop(step, None)
    else:
        members[step] = put(members.get(step), rest, value)
    return members


def _places_of(crd: Object) -> list[Place]:
    return list(places(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]))


def _typed(paths: Mapping[str, str]) -> list[Place]:
    """`a/0/b` by its type, for kinds that have no schema here."""
    steps = {path: tuple(int(s) if s.isdigit() else s.replace("~", "/") for s in path.split("/")) for path in paths}
    times = ("Time", "Timestamp", "At")
    return [
        Place(steps[path], {"type": kind} | ({"format": "date-time"} if path.endswith(times) else {}))
        for path, kind in paths.items()
    ]


META = {
    "metadata": "object",
    "metadata/name": "string",
    "metadata/namespace": "string",
    "metadata/uid": "string",
    "metadata/generation": "integer",
    "metadata/resourceVersion": "string",
    "metadata/creationTimestamp": "string",
    "metadata/deletionTimestamp": "string",
    "metadata/labels": "object",
    "metadata/annotations": "object",
    "metadata/ownerReferences": "array",
    "metadata/ownerReferences/0/uid": "string",
    "metadata/ownerReferences/0/controller": "boolean",
    "metadata/labels/finetune.dev~attempt": "string",
    "metadata/labels/finetune.dev~job-name": "string",
    "metadata/annotations/finetune.dev~gpus": "string",
    "metadata/annotations/finetune.dev~profile": "string",
    "metadata/annotations/finetune.dev~profile-generation": "string",
    "metadata/annotations/finetune.dev~profile-snapshot": "string",
    "metadata/annotations/batch.kubernetes.io~job-completion-index": "string",
    "spec": "object",
    "status": "object",
}
JOB = {
    "spec/completions": "integer",
    "spec/suspend": "boolean",
    "spec/template": "object",
    "status/conditions": "array",
    "status/conditions/0/type": "string",
    "status/conditions/0/status": "string",
    "status/conditions/0/message": "string",
    "status/conditions/0/lastTransitionTime": "string",
}
_STATE = "status/containerStatuses/0/state"
POD = {
    "spec/nodeName": "string",
    "status/phase": "string",
    "status/reason": "string",
    "status/message": "string",
    "status/conditions": "array",
    "status/conditions/0/type": "string",
    "status/conditions/0/status": "string",
    "status/conditions/0/reason": "string",
    "status/conditions/0/message": "string",
    "status/conditions/0/lastTransitionTime": "string",
    "status/containerStatuses": "array",
    "status/containerStatuses/0/name": "string",
    _STATE: "object",
    f"{_STATE}/running/startedAt": "string",
    f"{_STATE}/waiting/reason": "string",
    f"{_STATE}/waiting/message": "string",
    f"{_STATE}/terminated/exitCode": "integer",
    f"{_STATE}/terminated/reason": "string",
    f"{_STATE}/terminated/startedAt": "string",
    f"{_STATE}/terminated/finishedAt": "string",
    f"{_STATE}/terminated/message": "string",
}
TERMINATED: Path = ("status", "containerStatuses", 0, "state", "terminated", "message")
PLACES: Mapping[str, Sequence[Place]] = {
    "FineTuneJob": [*_typed(META), *_places_of(job_crd())],
    "FineTuneProfile": [*_typed(META), *_places_of(profile_crd())],
    "Job": _typed(META | JOB),
    "Pod": _typed(META | POD),
    "message": list(places(TypeAdapter(TerminationMessage).json_schema(by_alias=True))),
}
"""By kind of object; `message`: in a pod's termination message."""


class Change(NamedTuple):
    kind: str
    number: int
    """Which of the objects of that kind; one that is not there is the last."""
    path: Path
    value: Any


@dataclass(frozen=True)
class Stage:
    """What there is of one job at one time of its life, sound."""

    name: str
    objects: Mapping[str, Sequence[Object]]


def changes(kinds: Sequence[str], numbers: int = 3) -> st.SearchStrategy[list[Change]]:
    """Up to four changes to objects of these kinds."""

    def at(kind: str) -> st.SearchStrategy[Change]:
        return st.sampled_from(PLACES[kind]).flatmap(
            lambda place: st.builds(
                Change, st.just(kind), st.integers(0, numbers - 1), st.just(place.path), values(place.schema)
            )
        )

    return st.lists(st.sampled_from(kinds).flatmap(at), min_size=1, max_size=4)


def dumped(value: Any) -> str:
    """As JSON text, or as text that is nearly JSON."""
    try:
        return json.dumps(value)
    except (ValueError, RecursionError):
        return "9" * 5000


def wrecked(stage: Stage, made: Sequence[Change]) -> dict[str, list[Object]]:
    """The stage's objects with the changes made to them."""
    found = {kind: [copy.deepcopy(one) for one in some] for kind, some in stage.objects.items()}
    for kind, number, path, value in made:
        if not (some := found.get("Pod" if kind == "message" else kind)):
            continue
        index = min(number, len(some) - 1)
        if kind == "message":
            text = _at(some[index], TERMINATED)
            try:
                known = json.loads(text) if isinstance(text, str) else {}
            except (ValueError, RecursionError):
                known = {}
            some[index] = put(some[index], TERMINATED, dumped(put(known, path, value)))
        else:
            some[index] = put(some[index], path, value)
    return found


def _at(value: Any, path: Path) -> Any:
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value
