"""What hangs below an object besides its status: binding, eviction, tokens, logs, a namespace's finalizers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from finetune_sandbox import meta
from finetune_sandbox.auth import Authenticator
from finetune_sandbox.errors import (
    ApiError,
    Obj,
    bad_request,
    conflict,
    method_not_allowed,
    not_implemented,
    path_not_found,
    required,
    wrong,
)
from finetune_sandbox.errors import invalid as invalid_error
from finetune_sandbox.logs import LogSource
from finetune_sandbox.registry import Call, DeleteOptions, Registry
from finetune_sandbox.requests import Route
from finetune_sandbox.resources import Resource
from finetune_sandbox.selectors import from_label_selector
from finetune_sandbox.store import Entry, Filter, dump

LOG_OPTIONS = {"container", "follow", "tailLines", "pretty", "insecureSkipTLSVerifyBackend"}


class Subresources:
    def __init__(self, registry: Registry, auth: Authenticator) -> None:
        self.registry, self.store, self.auth = registry, registry.store, auth
        self.log_source: LogSource | None = None

    async def serve(
        self,
        request: web.BaseRequest,
        resource: Resource,
        route: Route,
        body: Any,
        query: Mapping[str, str],
        call: Call,
    ) -> web.StreamResponse:
        if route.sub not in resource.subresources:
            raise path_not_found()
        wanted = {"log": "GET", "finalize": "PUT"}.get(route.sub, "POST")
        if request.method != wanted:
            raise method_not_allowed()
        entry = self.registry.get(resource, route.namespace, route.name)
        if route.sub == "log":
            return await self._log(request, route, entry, query)
        if not isinstance(body, dict):
            raise bad_request("expected an object")
        match route.sub:
            case "token":
                done, code = self._token(route, body), 201
            case "binding":
                done, code = self._bind(resource, entry, body, call), 201
            case "eviction":
                done, code = self._evict(resource, route, body, call), 201
            case _:
                done, code = self._finalize(resource, entry, body), 200
        return web.Response(body=dump(done), status=code, content_type="application/json")

    def _token(self, route: Route, body: Obj) -> Obj:
        spec = dict(body.get("spec") or {})
        seconds = spec.setdefault("expirationSeconds", 3600)
        if not isinstance(seconds, int) or not 600 <= seconds <= 1 << 32:
            cause = wrong("spec.expirationSeconds", seconds, "may not specify a duration less than 10 minutes")
            raise invalid_error("TokenRequest", "authentication.k8s.io", "", [cause])
        token, end, audiences = self.auth.issue(route.namespace, route.name, spec)
        expires = datetime.fromtimestamp(end, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        head = {"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1"}
        data = {"name": route.name, "namespace": route.namespace, "creationTimestamp": meta.now()}
        spec |= {"audiences": audiences, "boundObjectRef": spec.get("boundObjectRef")}
        return head | {"metadata": data, "spec": spec, "status": {"token": token, "expirationTimestamp": expires}}

    def _bind(self, resource: Resource, entry: Entry, body: Obj, call: Call) -> Obj:
        name, node = entry.key[1], (body.get("target") or {}).get("name")
        if (body.get("metadata") or {}).get("name") != name:
            raise bad_request("name in URL does not match name in Binding object")
        if not node:
            raise invalid_error("Binding", "", name, [required("target.name")])
        if "deletionTimestamp" in entry.obj["metadata"]:
            raise conflict("pods/binding", name, f"pod {name} is being deleted, cannot be assigned to a host")
        if taken := entry.obj["spec"].get("nodeName"):
            raise conflict("pods/binding", name, f'pod {name} is already assigned to node "{taken}"')

        def change(pod: Obj) -> None:
            pod["spec"]["nodeName"] = node
            condition = {
                "type": "PodScheduled",
                "status": "True",
                "lastProbeTime": None,
                "lastTransitionTime": meta.now(),
            }
            conditions = [c for c in pod["status"].get("conditions", ()) if c["type"] != "PodScheduled"]
            pod["status"]["conditions"] = [*conditions, condition]

        if not call.dry_run:
            self.registry.modify(resource, entry, change)
        return success(201)

    def _evict(self, resource: Resource, route: Route, body: Obj, call: Call) -> Obj:
        entry = self.registry.get(resource, route.namespace, route.name)
        budgets = self.registry.kinds.by_key["poddisruptionbudgets.policy"]
        spent = [
            budget
            for budget in self.registry.select(budgets, Filter(route.namespace))
            if from_label_selector(budget.obj["spec"].get("selector") or {}).matches(entry.labels)
        ]
        for budget in spent:
            _check_budget(budget.obj)
        options = DeleteOptions.parse(body.get("deleteOptions") or {})
        self.registry.delete(resource, route.namespace, route.name, options, call)

        def spend(budget: Obj) -> None:
            budget["status"]["disruptionsAllowed"] -= 1

        for budget in () if call.dry_run else spent:
            self.registry.modify(budgets, budget, spend)
        return success(201)

    def _finalize(self, resource: Resource, entry: Entry, body: Obj) -> Obj:
        finalizers = (body.get("spec") or {}).get("finalizers") or []

        def change(namespace: Obj) -> None:
            namespace["spec"]["finalizers"] = finalizers

        return self.registry.modify(resource, entry, change).obj

    async def _log(
        self, request: web.BaseRequest, route: Route, entry: Entry, query: Mapping[str, str]
    ) -> web.StreamResponse:
        if self.log_source is None:
            raise not_implemented("pods/log: no node of the sandbox serves logs")
        unsupported = query.keys() - LOG_OPTIONS
        if any(query[k] not in ("", "false") for k in unsupported):
            raise not_implemented(f"pods/log: the sandbox has no {', '.join(sorted(unsupported))}")
        container = _container(entry.obj, query.get("container", ""))
        tail = query.get("tailLines", "")
        if tail and not tail.isdigit():
            raise bad_request(f"tailLines: expected a number, found {tail!r}")
        follow = query.get("follow", "") in ("true", "1")
        chunks = self.log_source.stream(route.namespace, route.name, container, follow, int(tail) if tail else None)
        try:
            first = await anext(chunks, b"")
        except LookupError as error:
            raise bad_request(str(error)) from None
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        try:
            if first:
                await response.write(first)
            async for chunk in chunks:
                await response.write(chunk)
            await response.write_eof()
        except ConnectionError:
            pass  # the reader has left
        finally:
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()
        return response


def _container(pod: Obj, wanted: str) -> str:
    names = [c["name"] for key in ("containers", "initContainers") for c in pod["spec"].get(key, ())]
    if not wanted:
        if len(pod["spec"]["containers"]) > 1:
            listed = " ".join(names)
            raise bad_request(
                f"a container name must be specified for pod {pod['metadata']['name']}, choose one of: [{listed}]"
            )
        return str(names[0])
    if wanted not in names:
        raise bad_request(f"container {wanted} is not valid for pod {pod['metadata']['name']}")
    return wanted


def _check_budget(budget: Obj) -> None:
    """Raises ApiError 429. No controller counts disruptions here: a budget allows none until its status is written."""
    status, name = budget.get("status") or {}, budget["metadata"]["name"]
    if status.get("observedGeneration", 0) < budget["metadata"]["generation"]:
        why = f"The disruption budget {name} is still being processed by the server."
    elif status.get("disruptionsAllowed", 0) < 1:
        why = f"The disruption budget {name} allows no disruption."
    else:
        return
    message = "Cannot evict pod as it would violate the pod's disruption budget."
    raise ApiError(429, "TooManyRequests", message, {"causes": [{"reason": "DisruptionBudget", "message": why}]})


def success(code: int) -> Obj:
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": code}
