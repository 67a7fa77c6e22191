"""The API server: TLS, tokens, RBAC and the routes; what a request means is in registry.py and its neighbours."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import math
import ssl
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from finetune_sandbox import discovery, openapi, protobuf, table, watch
from finetune_sandbox.admission import Admission
from finetune_sandbox.auth import Attributes, Authenticator, Authorizer, User, impersonate
from finetune_sandbox.certificates import Authority, write_kubeconfig, write_private
from finetune_sandbox.collector import Collector
from finetune_sandbox.crds import CrdLoader
from finetune_sandbox.errors import (
    ApiError,
    Obj,
    bad_request,
    forbidden,
    invalid,
    method_not_allowed,
    not_implemented,
    not_supported,
    path_not_found,
    required,
)
from finetune_sandbox.gate import Asked
from finetune_sandbox.kinds import BUILTIN, DEFAULTS
from finetune_sandbox.lists import Lister
from finetune_sandbox.logs import LogSource
from finetune_sandbox.policies import Policies
from finetune_sandbox.registry import Call, DeleteOptions, Registry
from finetune_sandbox.requests import Route, parse_path, wants_table
from finetune_sandbox.resources import Kinds, Resource
from finetune_sandbox.reviews import Reviews
from finetune_sandbox.store import Entry, Store, dump
from finetune_sandbox.subresources import Subresources
from finetune_sandbox.webhooks import Webhooks

log = logging.getLogger(__name__)
MAX_BODY = 3 * 1024 * 1024
PATCHES = {
    "application/json-patch+json": "json",
    "application/merge-patch+json": "merge",
    "application/strategic-merge-patch+json": "strategic",
    "application/apply-patch+yaml": "apply",
}
IDLE = (("apps", "deployments"), ("batch", "cronjobs"))
"""What a chart installs beside what runs here."""
OPEN_PATHS = ("/healthz", "/livez", "/readyz", "/version")


class ApiServer:
    """An in-memory Kubernetes API server.

    After `start`: `url`, `kubeconfig` (an admin's), `store`. `log_source` answers `pods/<name>/log`; without one such a
    request is 501.
    """

    url: str
    kubeconfig: Path

    def __init__(self, history: int = 10_000) -> None:
        self.store = Store(history)
        self.registry = Registry(self.store, Kinds(BUILTIN))
        self.kinds = self.registry.kinds
        self.auth, self.authorizer = Authenticator(self.store), Authorizer(self.store)
        self.reviews = Reviews(self.auth, self.authorizer)
        self.subresources = Subresources(self.registry, self.auth)
        self.lister = Lister(self.registry)
        self.crds = CrdLoader(self.registry)
        self.registry.admission.append(Admission(self.store))
        self.policies = Policies(self.store, self.kinds, self.authorizer)
        self.webhooks = Webhooks(self.store)
        self._tasks: list[asyncio.Task[None]] = []
        self._streams: set[asyncio.Task[Any]] = set()

    @property
    def log_source(self) -> LogSource | None:
        return self.subresources.log_source

    @log_source.setter
    def log_source(self, source: LogSource | None) -> None:
        self.subresources.log_source = source

    async def start(self, directory: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        """Serves on `host:port` (0 = any free port); certificates and the kubeconfig go to `directory`."""
        directory.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240  (once, before anything is served)
        authority = Authority("finetune-sandbox-ca")
        hosts = tuple(dict.fromkeys((host, "127.0.0.1", "localhost", "kubernetes.default.svc")))
        pair = authority.issue("kube-apiserver", hosts=hosts)
        (directory / "ca.crt").write_bytes(authority.certificate)
        (directory / "apiserver.crt").write_bytes(pair.certificate)
        write_private(directory / "apiserver.key", pair.key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "apiserver.crt", directory / "apiserver.key")
        collector = Collector(self.registry, self.policies, authority.certificate.decode())
        for resource, namespace, obj in DEFAULTS:
            self.registry.create(self.kinds.by_key[resource], namespace, json.loads(dump(obj)))
        self._tasks.append(asyncio.create_task(collector.run(), name="collector"))
        self._runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=context)
        await site.start()
        self.url = f"https://{host}:{self._runner.addresses[0][1]}"
        path, token = directory / "kubeconfig", self.auth.admin_token
        self.kubeconfig = write_kubeconfig(path, url=self.url, ca=authority.certificate, token=token)

    async def stop(self) -> None:
        for task in (*self._tasks, *self._streams):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._streams, return_exceptions=True)
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            user = impersonate(self.auth.user(request.headers.get("Authorization")), request.headers)
            return await self._route(request, user)
        except ApiError as error:
            headers = {"WWW-Authenticate": "Bearer"} if error.code == 401 else None
            return answer(error.status(), error.code, headers)
        except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
            log.exception("%s %s", request.method, request.path)
            broken = ApiError(500, "InternalError", f"Internal error occurred: {type(error).__name__}: {error}", {})
            return answer(broken.status(), broken.code)

    async def _route(self, request: web.BaseRequest, user: User) -> web.StreamResponse:
        route = parse_path(request.path)
        if route is None:
            return self._plain(request, user)
        if request.headers.get("Upgrade") or route.sub in ("exec", "attach", "portforward", "proxy"):
            raise not_implemented(f"{route.plural}/{route.sub}: the sandbox has no exec, attach, port-forward or proxy")
        query = dict(request.query)
        watching = query.get("watch", "") in ("true", "1")
        verb = _verb(request.method, route, watching)
        asked = Attributes(verb, route.group, route.plural, route.sub, route.namespace, route.name)
        if verb in ("list", "watch", "deletecollection") and (pinned := _pinned_name(query)):
            asked = Attributes(verb, route.group, route.plural, route.sub, route.namespace, pinned)
        self._authorize(user, asked)
        body = await _body(request) if request.method in ("POST", "PUT", "PATCH", "DELETE") else None
        if self.reviews.serves(route):
            if request.method != "POST":
                raise method_not_allowed()
            return answer(self.reviews.create(route, user, body), 201)
        resource = self.kinds.find(route.group, route.version, route.plural)
        if resource is None:
            if verb in ("create", "update", "patch"):
                discovery.refuse_unserved(route)
            raise path_not_found()
        if resource.namespaced and not route.namespace and verb not in ("list", "watch"):
            raise method_not_allowed() if not route.name else path_not_found()
        if not resource.namespaced and route.namespace:
            raise path_not_found()
        call = _call(query)
        if verb == "create" and (resource.group, resource.plural) in IDLE:
            call.warnings.append(f"the sandbox stores a {resource.kind} and runs nothing of it")
        if verb == "watch":
            return await self._stream(watch.serve(request, self.registry, resource, route, query))
        if verb == "list":
            return answer_bytes(self.lister.answer(resource, route, query, request.headers.get("Accept", "")))
        if route.sub and route.sub != "status":
            if verb == "create":
                self._admit_part(resource, route, body, call, user)
            done = self.subresources.serve(request, resource, route, body, query, call)
            return await self._stream(done) if route.sub == "log" else await done
        if route.sub == "status" and not resource.status:
            raise path_not_found()
        if verb in ("create", "update", "patch"):
            await self._admit(request, verb, resource, route, body, call, user)
        if verb == "delete" and (old := self.store.get(resource.key, route.namespace, route.name)):
            given = self._options(body, request)
            call.warnings += self.policies.check_deletion(user, resource, old.obj, given, dry_run=call.dry_run)
        code, result = self._object(request, verb, resource, route, body, call, user)
        return self._shown(request, resource, result, code, call)

    async def _admit(
        self, request: web.BaseRequest, verb: str, resource: Any, route: Route, body: Any, call: Call, user: User
    ) -> None:
        """Asks policies and webhooks about what would be stored. Raises ApiError where one of them denies it.

        Another write may come in between, as webhooks take their time; then what was asked about is a version too old.
        """
        old = self.store.get(resource.key, route.namespace, route.name) if route.name else None
        operation = "UPDATE" if old else "CREATE"
        # Whom it concerns can be told from what was sent, and mostly that is nobody.
        sent: Obj = old.obj if old else {"metadata": (body if isinstance(body, dict) else {}).get("metadata") or {}}
        sent = {"metadata": sent["metadata"] | ({"namespace": route.namespace} if route.namespace else {})}
        asked = Asked(user, operation, resource, route.sub, sent, None, call.dry_run)
        if not self.policies.concern(asked) and not self.webhooks.concern(asked):
            return
        trial = Call(True, call.field_validation)
        _, made = self._object(request, verb, resource, route, json.loads(dump(body)), trial, user)
        assert isinstance(made, Entry)
        asked = replace(asked, new=made.copy(), old=old.copy() if old else None)
        call.warnings += [*self.policies.check(asked), *await self.webhooks.check(asked)]

    def _admit_part(self, resource: Resource, route: Route, body: Any, call: Call, user: User) -> None:
        """Asks policies about a binding, an eviction or a token. Raises ApiError where one of them denies it."""
        if not isinstance(body, dict):
            return
        sent = copy.deepcopy(body)
        sent["metadata"] = {"name": route.name, "namespace": route.namespace} | (sent.get("metadata") or {})
        asked = Asked(user, "CREATE", resource, route.sub, sent, None, call.dry_run)
        if self.policies.concern(asked):
            call.warnings += self.policies.check(asked)

    def _options(self, body: Any, request: web.BaseRequest) -> Obj:
        return {"apiVersion": "meta.k8s.io/v1", "kind": "DeleteOptions"} | dict(_delete_body(body, request.query))

    def _object(
        self, request: web.BaseRequest, verb: str, resource: Any, route: Route, body: Any, call: Call, user: User
    ) -> tuple[int, Entry | Obj]:
        """One request for one object, or for the deletion of many: the status code and what to send."""
        where = (resource, route.namespace, route.name)
        if verb in ("create", "update", "patch"):
            self._no_escalation(user, resource, route)
        match verb:
            case "get":
                return 200, self.registry.get(*where)
            case "create":
                return 201, self.registry.create(resource, route.namespace, body, call)
            case "update":
                if not isinstance(body, dict):
                    raise bad_request("expected an object")
                return 200, self.registry.update(*where, body, route.sub, call)
            case "patch":
                kind = PATCHES.get(request.content_type)
                if kind is None:
                    accepted = ", ".join(PATCHES)
                    raise ApiError(415, "UnsupportedMediaType", f"the media type of a patch is one of {accepted}")
                if kind == "apply":
                    if not self.store.get(resource.key, route.namespace, route.name):
                        self._authorize(user, Attributes("create", route.group, route.plural, "", route.namespace))
                    if "fieldManager" not in request.query:
                        cause = required("fieldManager", "is required for apply patch")
                        raise invalid("PatchOptions", "meta.k8s.io", "", [cause])
                entry, created = self.registry.patch(*where, kind, body, route.sub, call)
                return (201 if created else 200), entry
            case "delete":
                options = DeleteOptions.parse(_delete_body(body, request.query))
                entry, gone = self.registry.delete(*where, options, call)
                if gone and resource.key not in ("pods", "serviceaccounts", "services", "persistentvolumeclaims"):
                    return 200, deleted(resource, entry)
                return 200, entry
            case "deletecollection":
                options = DeleteOptions.parse(_delete_body(body, request.query))
                given = self._options(body, request)

                def admit(entry: Entry) -> None:
                    self.policies.check_deletion(user, resource, entry.obj, given, dry_run=call.dry_run)

                return 200, self.lister.delete_collection(resource, route, dict(request.query), options, call, admit)
        raise method_not_allowed()

    def _shown(
        self, request: web.BaseRequest, resource: Any, result: Entry | Obj, code: int, call: Call
    ) -> web.Response:
        headers = {"Warning": ", ".join(f"299 - {json.dumps(w)}" for w in call.warnings)} if call.warnings else None
        if isinstance(result, Entry):
            if include := wants_table(request.headers.get("Accept", ""), request.query):
                version = {"resourceVersion": result.obj["metadata"].get("resourceVersion", "")}
                return answer(table.render(resource, [result], version, include), code, headers)
            return answer_bytes(result.raw, code, headers)
        return answer(result, code, headers)

    def _no_escalation(self, user: User, resource: Any, route: Route) -> None:
        """Nobody grants more than they have: stricter than a real server, which compares rule by rule."""
        if resource.group == "rbac.authorization.k8s.io":
            verb = "escalate" if resource.plural.endswith("roles") else "bind"
            self._authorize(user, Attributes(verb, route.group, route.plural, "", route.namespace, route.name))

    def _authorize(self, user: User, asked: Attributes) -> None:
        if not self.authorizer.allows(user, asked):
            if asked.path:
                raise ApiError(403, "Forbidden", f"forbidden: {asked.sentence(user)}", {})
            resource = f"{asked.resource}.{asked.group}" if asked.group else asked.resource
            raise forbidden(resource, asked.name, asked.sentence(user))

    def _plain(self, request: web.BaseRequest, user: User) -> web.Response:
        path = request.path.rstrip("/") or "/"
        self._authorize(user, Attributes(request.method.lower(), path=path))
        if request.method not in ("GET", "HEAD"):
            raise method_not_allowed()
        if path.split("/")[1] in ("healthz", "livez", "readyz"):
            return web.Response(text="ok")
        if path.startswith("/openapi"):
            return openapi.serve(path, self.kinds, request.headers.get("Accept", ""))
        found = discovery.serve(path, self.kinds, self.url)
        if found is None:
            raise path_not_found()
        return answer(found)

    async def _stream(self, serving: Any) -> web.StreamResponse:
        """A long answer, known to `stop` so that it ends with the server."""
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            response: web.StreamResponse = await serving
            return response
        finally:
            self._streams.discard(task)


def _verb(method: str, route: Route, watching: bool) -> str:
    if method in ("GET", "HEAD"):
        return "watch" if watching and not route.sub else "get" if route.name else "list"
    if method == "DELETE" and not route.name:
        return "deletecollection"
    verbs = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
    if method not in verbs or (method in ("PUT", "PATCH") and not route.name) or (
        method == "POST" and route.name and not route.sub
    ):  # fmt: skip
        raise method_not_allowed()
    return verbs[method]


def _pinned_name(query: Mapping[str, str]) -> str:
    """`fieldSelector=metadata.name=x` counts as a request for x."""
    terms = query.get("fieldSelector", "").split(",")
    return next((t.partition("=")[2].lstrip("=") for t in terms if t.startswith("metadata.name=")), "")


def _call(query: Mapping[str, str]) -> Call:
    if query.get("dryRun", "All") != "All":
        raise invalid("CreateOptions", "meta.k8s.io", "", [not_supported("dryRun", [query["dryRun"]], ("All",))])
    check = query.get("fieldValidation", "Warn")
    if check not in ("Ignore", "Warn", "Strict"):
        raise bad_request(f"fieldValidation: expected Ignore, Warn or Strict, found {check!r}")
    return Call("dryRun" in query, check)


def _delete_body(body: Any, query: Mapping[str, str]) -> Mapping[str, Any]:
    given: Obj = dict(body) if isinstance(body, dict) else {}
    if "propagationPolicy" in query:
        given.setdefault("propagationPolicy", query["propagationPolicy"])
    if "gracePeriodSeconds" in query:
        text = query["gracePeriodSeconds"]
        if not text.isdigit():
            raise bad_request(f"gracePeriodSeconds: expected a number of seconds, found {text!r}")
        given.setdefault("gracePeriodSeconds", int(text))
    return given


def deleted(resource: Any, entry: Entry) -> Obj:
    data = entry.obj["metadata"]
    details = {"name": data["name"], "kind": resource.plural, "uid": data["uid"]}
    if resource.group:
        details["group"] = resource.group
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}


async def _body(request: web.BaseRequest) -> Any:
    """The decoded body, None where there is none. Raises ApiError 400, 413 or 415."""
    raw = bytearray()
    try:
        async for chunk in request.content.iter_chunked(1 << 16):
            raw += chunk
            if len(raw) > MAX_BODY:
                raise ApiError(413, "RequestEntityTooLarge", f"Request entity too large: limit is {MAX_BODY}")
    except HttpProcessingError as error:
        raise bad_request(f"the request body cannot be read: {error.message}") from error
    if not raw:
        return None
    kind = request.content_type
    try:
        if kind in ("application/yaml", "application/apply-patch+yaml"):
            return yaml.load(bytes(raw), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if kind.endswith("json") or kind == "application/octet-stream":
            return json.loads(raw, parse_int=_whole, parse_constant=_no_number)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise bad_request(f"the request body cannot be decoded: {error}") from error
    if kind == "application/vnd.kubernetes.protobuf":
        return protobuf.decode(bytes(raw))
    raise ApiError(415, "UnsupportedMediaType", f"the sandbox reads JSON and YAML, not {kind}")


def _whole(text: str) -> int | float:
    """As Go reads it into an object without a type: an int64, else a float. Raises ValueError."""
    if len(text) < 19 or -(2**63) <= int(text) < 2**63:
        return int(text)
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"a number of {len(text)} digits is out of range")
    return number


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def answer(body: Obj, code: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return answer_bytes(dump(body), code, headers)


def answer_bytes(body: bytes, code: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=body, status=code, content_type="application/json", headers=headers)
