"""PURE. What is kept of an object that the API server sends. All else is skipped while the answer is parsed.

Tenants store objects of up to 1.5 MiB, which as Python objects would take up to thirty times that. Fields that no type
names here are never made into objects; the result is plain dicts as the server sends them, with fewer members.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct, field

Object = dict[str, Any]
"""A Kubernetes object as JSON."""
Data = bytes | bytearray | memoryview

LONGEST_TEXT = 16384
"""Characters that are kept of a message. A kubelet keeps 4,096 bytes of a container's termination message."""
MOST_ANNOTATIONS = 16384
"""Characters of a FineTuneJob's annotations that are kept."""
DIGEST = "finetune.dev/annotations-digest"
"""Stands for annotations that are more than that: it tells whether they changed."""


class _Part(Struct, rename="camel", omit_defaults=True):
    """Members that are absent or null in the answer are absent in the result."""


class _Message(_Part):
    message: str | None = None

    def __post_init__(self) -> None:
        if self.message and len(self.message) > LONGEST_TEXT:
            self.message = self.message[:LONGEST_TEXT]


class _Owner(_Part):
    api_version: str | None = None
    kind: str | None = None
    name: str | None = None
    uid: str | None = None
    controller: bool | None = None


class _Identity(_Part):
    name: str
    uid: str
    namespace: str | None = None
    resource_version: str | None = None
    generation: int | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None


class _Labels(Struct, omit_defaults=True):
    managed_by: str | None = field(default=None, name="app.kubernetes.io/managed-by")
    job: str | None = field(default=None, name="finetune.dev/job-name")
    attempt: str | None = field(default=None, name="finetune.dev/attempt")
    test: str | None = field(default=None, name="finetune.dev/network-test")


class _Annotations(Struct, omit_defaults=True):
    index: str | None = field(default=None, name="batch.kubernetes.io/job-completion-index")


class _ChildMeta(_Identity):
    labels: _Labels | None = None
    annotations: _Annotations | None = None
    owner_references: list[_Owner] | None = None

    def __post_init__(self) -> None:
        # An object may name thousands of owners; one of them is the controller.
        self.owner_references = [owner for owner in self.owner_references or () if owner.controller][:1] or None


class _Condition(_Message):
    type: str | None = None
    status: str | None = None
    reason: str | None = None
    last_transition_time: str | None = None


class _JobSpec(_Part):
    completions: int | None = None
    suspend: bool | None = None


class _JobStatus(_Part):
    conditions: list[_Condition] | None = None


class _Kinded(_Part):
    api_version: str | None = None
    kind: str | None = None


class _Job(_Kinded, kw_only=True):
    metadata: _ChildMeta
    spec: _JobSpec = field(default_factory=_JobSpec)
    status: _JobStatus | None = None


class _Running(_Part):
    started_at: str | None = None


class _Waiting(_Message):
    reason: str | None = None


class _Terminated(_Message):
    exit_code: int | None = None
    reason: str | None = None
    started_at: str | None = None
    finished_at: str | None = None


class _State(_Part):
    running: _Running | None = None
    waiting: _Waiting | None = None
    terminated: _Terminated | None = None


class _Container(_Part):
    name: str | None = None
    state: _State | None = None


class _PodSpec(_Part):
    node_name: str | None = None


class _PodStatus(_Message):
    phase: str | None = None
    reason: str | None = None
    conditions: list[_Condition] | None = None
    container_statuses: list[_Container] | None = None


class _Pod(_Kinded, kw_only=True):
    metadata: _ChildMeta
    spec: _PodSpec | None = None
    status: _PodStatus | None = None


class _OwnMeta(_Identity):
    annotations: dict[str, str] | None = None

    def __post_init__(self) -> None:
        notes = self.annotations or {}
        if sum(len(key) + len(value) for key, value in notes.items()) > MOST_ANNOTATIONS:
            digest = hashlib.sha256(msgspec.json.encode(notes, order="sorted")).hexdigest()
            self.annotations = {DIGEST: digest}


class _FineTuneJob(_Kinded, kw_only=True):
    metadata: _OwnMeta
    spec: Any = None
    status: Any = None


class _WorkloadMeta(_Identity):
    pass


class _WorkloadSpec(_Part):
    active: bool | None = None


class _Check(_Message):
    name: str | None = None
    state: str | None = None


class _WorkloadStatus(_Part):
    conditions: list[_Condition] | None = None
    admission_checks: list[_Check] | None = None


class _Workload(_Kinded, kw_only=True):
    metadata: _WorkloadMeta
    spec: _WorkloadSpec | None = None
    status: _WorkloadStatus | None = None


class _Bare(_Kinded, kw_only=True):
    metadata: _ChildMeta


class _CoreEvent(_Bare, kw_only=True):
    count: int | None = None


_TYPES: dict[str, Any] = {
    "Job": _Job,
    "Pod": _Pod,
    "FineTuneJob": _FineTuneJob,
    "Workload": _Workload,
    "Event": _CoreEvent,
}
"""Single objects of other kinds are kept as they are."""
_LISTED: dict[str, Any] = _TYPES | {"ConfigMap": _Bare, "Service": _Bare, "NetworkPolicy": _Bare, "name": _Bare}


class _ListMeta(Struct, rename="camel"):
    resource_version: str | None = None
    continue_: str | None = field(default=None, name="continue")


class Page(Struct):
    """A part of a list."""

    items: list[Object]
    version: str
    """resourceVersion of the list."""
    token: str
    """Asks for the next part; empty: this is the last."""
    size: int
    """Bytes of the answer."""


class Change(Struct):
    """An event of a watch."""

    type: str
    object: Object
    """metav1.Status where the type is ERROR."""

    def encode(self) -> bytes:
        """A line of a watch that tells of it."""
        return msgspec.json.encode(self)


class _Event(Struct):
    type: str
    object: msgspec.Raw


class _Bookmark(Struct):
    metadata: _ListMeta


def reader(kind: str) -> Callable[[Data], Object]:
    """Reads an object of this kind. Readers raise ValueError or RecursionError where the answer has another form."""
    decoder = _DECODERS.get(kind)
    return (lambda data: _plain(decoder.decode(data))) if decoder else whole


def nothing(data: Data) -> Object:
    """Reads an answer that only says that it was done."""
    return {}


def whole(data: Data) -> Object:
    """An answer as it is."""
    found = msgspec.json.decode(data) if data else {}
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def page_reader(kind: str) -> Callable[[Data], Page]:
    """Reads a list of objects of this kind."""
    decoder = _PAGES.get(kind) or _OTHERS

    def read(data: Data) -> Page:
        found: Any = decoder.decode(data)
        items = [_plain(item) for item in found.items]
        return Page(items, found.metadata.resource_version or "", found.metadata.continue_ or "", len(data))

    return read


def change_reader(kind: str) -> Callable[[Data], Change]:
    """Reads a line of a watch of objects of this kind."""
    read = reader(kind)

    def of(data: Data) -> Change:
        event = _EVENT.decode(data)
        raw = memoryview(event.object)
        if event.type == "BOOKMARK":
            return Change(
                event.type, {"metadata": {"resourceVersion": _BOOKMARK.decode(raw).metadata.resource_version}}
            )
        return Change(event.type, whole(raw) if event.type == "ERROR" else read(raw))

    return of


def _plain(value: Any) -> Object:
    found: Object = msgspec.to_builtins(value)
    return found


def _page_decoder(found: Any) -> Any:
    fields: list[Any] = [("items", list[found]), ("metadata", _ListMeta, field(default_factory=_ListMeta))]
    return msgspec.json.Decoder(msgspec.defstruct("List", fields))


_DECODERS = {kind: msgspec.json.Decoder(found) for kind, found in _TYPES.items()}
_PAGES = {kind: _page_decoder(found) for kind, found in _LISTED.items()}
_OTHERS = _page_decoder(dict[str, Any])
_EVENT = msgspec.json.Decoder(_Event)
_BOOKMARK = msgspec.json.Decoder(_Bookmark)
