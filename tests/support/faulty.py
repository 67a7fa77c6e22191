"""An HTTP proxy before any API server that fails on purpose: request by request, and event by event of a watch.

It counts what was committed there, however the operator was answered: that is what a fault-free run is compared with.
"""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import aiohttp
from aiohttp import web

from support.operating import Proxy

Object = dict[str, Any]
Verb = Literal["get", "list", "watch", "create", "replace", "patch", "delete"]
HOP = {"host", "authorization", "content-length", "transfer-encoding", "connection"}
REASONS = {
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}


class Call(NamedTuple):
    """What a request asks for."""

    verb: Verb
    resource: str
    """The plural; with `/status` where that is what is written."""
    name: str

    @property
    def kind(self) -> str:
        """The verb and the resource: of what every fault is tried."""
        return f"{self.verb} {self.resource}"


def read_call(method: str, path: str, query: Any, body: bytes) -> Call:
    parts = path.strip("/").split("/")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    if not parts:
        return Call("get", "discovery", "")
    if parts[0] == "namespaces" and len(parts) > 2:
        parts = parts[2:]
    resource, name = parts[0], parts[1] if len(parts) > 1 else ""
    resource += f"/{parts[2]}" if len(parts) > 2 else ""
    if method == "GET":
        watches = query.get("watch") in ("true", "1")
        return Call("watch" if watches else "get" if name else "list", resource, name)
    if method == "POST":
        name = (json.loads(body).get("metadata") or {}).get("name", "")
        return Call("create", resource, name)
    return Call({"PUT": "replace", "PATCH": "patch", "DELETE": "delete"}[method], resource, name)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Refuse:
    """The server says no, and does nothing."""

    code: int
    retry_after: str | None = None
    plain: bool = False
    """As something else on the way says it: no metav1.Status."""

    def __str__(self) -> str:
        return f"{self.code}{' of another' if self.plain else ''}"


@dataclass(frozen=True)
class Reset:
    """The connection breaks: before the request reached the server, or (`committed`) on the way back."""

    committed: bool

    def __str__(self) -> str:
        return "reset after the commit" if self.committed else "reset before the send"


@dataclass(frozen=True)
class Hang:
    """No answer, until the client gives up."""

    committed: bool

    def __str__(self) -> str:
        return "timeout after the commit" if self.committed else "timeout before the send"


@dataclass(frozen=True)
class Kill:
    """The operator is killed with SIGKILL and hears no answer."""

    committed: bool

    def __str__(self) -> str:
        return "killed after the commit" if self.committed else "killed before the send"


@dataclass(frozen=True)
class Meanwhile:
    """Something happens between what the operator read and what it writes."""

    action: Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Stale:
    """The first answer that this path ever gave is given again: a cache that lags behind."""

    def __str__(self) -> str:
        return "a stale answer"


@dataclass(frozen=True)
class Broken:
    """A watch, from its event number `at` on (counted over all watches of the resource)."""

    how: Literal["drop", "duplicate", "delay", "error 410", "error 500", "silence", "cut", "torn"]

    def __str__(self) -> str:
        return self.how


Fault = Refuse | Reset | Hang | Kill | Meanwhile | Stale | Broken


@dataclass
class Rule:
    """The fault for `times` calls (of a watch: events) of a kind, from number `first` (0: the first one) on."""

    kind: str
    """`verb resource`; `write`: any write but Events and Leases; `any`: everything but watches."""
    fault: Fault
    first: int = 0
    times: int = 1
    seen: int = 0
    used: int = 0

    def applies(self, call: Call) -> bool:
        if not (self.kind == call.kind or (self.kind == "write" and is_work(call)) or self._any(call)):
            return False
        self.seen += 1
        hit = self.first < self.seen <= self.first + self.times
        self.used += hit
        return hit

    def _any(self, call: Call) -> bool:
        return self.kind == "any" and call.verb != "watch"


def is_work(call: Call) -> bool:
    """A write whose number is the same in every run: an Event is posted after the status, and lost in a crash."""
    return call.verb not in ("get", "list", "watch") and call.resource not in ("events", "leases", "tokenreviews")


@dataclass
class FaultyProxy(Proxy):
    """`kill` ends the operator and returns when it is gone."""

    rules: list[Rule] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    """Every request, in order."""
    events: Counter[str] = field(default_factory=Counter)
    """How many events came of each resource's watches."""
    commits: Counter[Call] = field(default_factory=Counter)
    """What was written, however it was answered."""
    kill: Callable[[], Awaitable[None]] | None = None
    down: Refuse | Reset | Hang | None = None
    """What every request gets, and every open watch ends with, while the API server is away."""
    remembered: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def script(self, *rules: Rule) -> None:
        self.rules = list(rules)

    @property
    def work(self) -> Counter[Call]:
        """Creations and deletions, by object: equal to those of the fault-free run."""
        return Counter({c: n for c, n in self.commits.items() if c.verb in ("create", "delete") and is_work(c)})

    async def forward(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        call = read_call(request.method, request.path, request.query, body)
        self.calls.append(call)
        fault = self.down or next((rule.fault for rule in self.rules if rule.applies(call)), None)
        if call.verb == "watch" and not isinstance(fault, Refuse | Reset | Hang):
            return await self._watch(request, call)
        match fault:
            case Refuse():
                return refusal(fault, call)
            case Stale() if request.path_qs in self.remembered:
                status, data = self.remembered[request.path_qs]
                return web.Response(status=status, body=data, content_type="application/json")
            case Reset(committed=False):
                return hang_up(request)
            case Hang(committed=False):
                return await silence(request)
            case Kill(committed=False):
                return await self._die(request)
            case Meanwhile():
                await fault.action()
        status, data, headers = await self._send(request, call, body)
        match fault:
            case Reset():
                return hang_up(request)
            case Hang():
                return await silence(request)
            case Kill():
                return await self._die(request)
        return web.Response(status=status, body=data, headers=headers, content_type="application/json")

    async def _send(self, request: web.BaseRequest, call: Call, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        async with self._upstream(request, body) as answer:
            data = await answer.read()
            if request.method != "GET" and answer.status < 400:
                self.commits[call] += 1
            if request.method == "GET":
                self.remembered.setdefault(request.path_qs, (answer.status, data))
            headers = {k: v for k, v in answer.headers.items() if k == "Retry-After"}
            return answer.status, data, headers

    def _upstream(self, request: web.BaseRequest, body: bytes) -> Any:
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP} | self.headers
        return self.session.request(request.method, self.host + request.path_qs, headers=headers, data=body or None)

    async def _die(self, request: web.BaseRequest) -> web.StreamResponse:
        assert self.kill
        await self.kill()
        return hang_up(request)

    async def _watch(self, request: web.BaseRequest, call: Call) -> web.StreamResponse:
        async with self._upstream(request, b"") as answer:
            response = web.StreamResponse(status=answer.status)
            response.content_type = "application/json"
            with contextlib.suppress(ConnectionError, aiohttp.ClientError):  # the operator hung up, or the server did
                await response.prepare(request)
                await self._relay(request, answer, response, call.resource)
            return response

    async def _relay(
        self, request: web.BaseRequest, answer: aiohttp.ClientResponse, response: web.StreamResponse, resource: str
    ) -> None:
        """Lines, until one side ends: a server that says nothing does not tell that the operator has gone."""
        reading: asyncio.Task[bytes] | None = None
        buffered, late = b"", list[asyncio.Task[None]]()
        try:
            while not gone(request):
                reading = reading or asyncio.create_task(answer.content.readany())
                await asyncio.wait([reading], timeout=0.5)
                if self.down:
                    hang_up(request)
                    return
                if not reading.done():
                    continue
                chunk, reading = reading.result(), None
                if not chunk:
                    return
                *lines, buffered = (buffered + chunk).split(b"\n")
                for line in lines:
                    if not await self._tell(request, response, resource, line + b"\n", late):
                        return
        finally:
            for task in [*late, *([reading] if reading else [])]:
                task.cancel()

    async def _tell(
        self,
        request: web.BaseRequest,
        response: web.StreamResponse,
        resource: str,
        line: bytes,
        late: list[asyncio.Task[None]],
    ) -> bool:
        """One event; False: it was the last of this stream."""
        event = Call("watch", f"{resource} event", "")
        if b'"type":"BOOKMARK"' not in line[:40]:
            self.events[resource] += 1
            fault = next((r.fault for r in self.rules if isinstance(r.fault, Broken) and r.applies(event)), None)
        else:
            fault = None
        how = fault.how if isinstance(fault, Broken) else ""
        if how == "drop":
            return True
        if how == "delay":
            late.append(asyncio.create_task(later(response, line)))
            return True
        if how.startswith("error"):
            code = int(how.split()[1])
            line = json.dumps({"type": "ERROR", "object": status_of(code, f"{how} on purpose")}).encode() + b"\n"
        if how == "silence":
            await silence(request)
            return False
        if how == "cut":
            hang_up(request)
            return False
        if how == "torn":
            await response.write(line[: len(line) // 2])
            return False
        await response.write(line * (2 if how == "duplicate" else 1))
        return True


async def later(response: web.StreamResponse, line: bytes) -> None:
    """After those that follow it within a second: a watch may not do this, and an operator may not rely on that."""
    await asyncio.sleep(1.0)
    with contextlib.suppress(ConnectionError):
        await response.write(line)


def status_of(code: int, message: str) -> Object:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": REASONS[code],
        "code": code,
    }


def refusal(fault: Refuse, call: Call) -> web.Response:
    headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
    if fault.plain:
        return web.Response(status=fault.code, text=f"{fault.code} of a load balancer\n", headers=headers)
    return web.json_response(status_of(fault.code, f"{call.kind}: on purpose"), status=fault.code, headers=headers)


def gone(request: web.BaseRequest) -> bool:
    return request.transport is None or request.transport.is_closing()


def hang_up(request: web.BaseRequest) -> web.StreamResponse:
    if request.transport:
        request.transport.abort()
    return web.Response()


async def silence(request: web.BaseRequest) -> web.StreamResponse:
    while not gone(request):  # noqa: ASYNC110 - a transport tells nobody that it closes
        await asyncio.sleep(0.05)
    return web.Response()
