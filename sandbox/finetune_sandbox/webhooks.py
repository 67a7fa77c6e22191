"""ValidatingWebhookConfiguration: an AdmissionReview to each webhook that is registered for a write.

There is no network of Services here: a webhook is reached by its `url`, or by a Service that is an ExternalName.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import uuid
from typing import Any

import aiohttp

from finetune_sandbox.errors import ApiError, Cause, Obj, not_supported, required
from finetune_sandbox.gate import Asked, check_rules, configurations, meant, placed, selected
from finetune_sandbox.store import Store

_FAILURES = ("Fail", "Ignore")


def default(configuration: Obj) -> None:
    for webhook in configuration.get("webhooks") or ():
        webhook.setdefault("failurePolicy", "Fail")
        webhook.setdefault("timeoutSeconds", 10)


def validate(configuration: Obj, old: Obj | None) -> list[Cause]:
    found = []
    for i, webhook in enumerate(configuration.get("webhooks") or ()):
        path = f"webhooks[{i}]"
        found += [required(f"{path}.{key}") for key in ("name", "clientConfig", "sideEffects") if not webhook.get(key)]
        found += check_rules(webhook.get("rules"), f"{path}.rules", ("CREATE", "UPDATE"))
        if webhook["failurePolicy"] not in _FAILURES:
            found.append(not_supported(f"{path}.failurePolicy", webhook["failurePolicy"], _FAILURES))
        if webhook.get("matchConditions"):
            found.append(not_supported(f"{path}.matchConditions", "CEL", ("none in the sandbox",)))
    return found


class Webhooks:
    def __init__(self, store: Store) -> None:
        self._store = store

    def _meant(self, asked: Asked) -> list[Obj]:
        return [
            webhook
            for configuration in configurations(self._store, "validatingwebhookconfigurations")
            for webhook in configuration.get("webhooks") or ()
            if meant(webhook.get("rules") or (), asked)
        ]

    def _concerned(self, asked: Asked) -> list[Obj]:
        return [webhook for webhook in self._meant(asked) if selected(webhook, asked, self._store)]

    def concern(self, asked: Asked) -> bool:
        """Whether there may be a webhook to ask: what the object will be labelled is not known yet."""
        return any(placed(webhook, asked, self._store) for webhook in self._meant(asked))

    async def check(self, asked: Asked) -> list[str]:
        """Warnings. Raises ApiError where a webhook denies the write, or cannot be asked and must be."""
        answers = await asyncio.gather(*(self._ask(webhook, asked) for webhook in self._concerned(asked)))
        return [warning for answer in answers for warning in answer]

    async def _ask(self, webhook: Obj, asked: Asked) -> list[str]:
        uid = str(uuid.uuid4())
        review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"}
        try:
            response = await self._call(webhook, review | {"request": asked.request(uid) | _objects(asked)})
            if response["uid"] != uid or not isinstance(response["allowed"], bool):
                raise ValueError("the response is not to this request")
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
            if webhook["failurePolicy"] == "Ignore":
                return []
            why = f"failed calling webhook {json.dumps(webhook['name'])}: failed to call webhook: {error!r}"
            raise ApiError(500, "InternalError", f"Internal error occurred: {why}") from error
        warnings: list[str] = response.get("warnings") or []
        if response["allowed"]:
            return warnings
        status = response.get("status") or {}
        why = status.get("message") or "without explanation"
        message = f"admission webhook {json.dumps(webhook['name'])} denied the request: {why}"
        raise ApiError(max(400, int(status.get("code") or 400)), status.get("reason") or "", message)

    async def _call(self, webhook: Obj, review: Obj) -> Any:
        client = webhook["clientConfig"]
        url, name = (client["url"], None) if "url" in client else self._resolve(client["service"])
        authority = base64.b64decode(client.get("caBundle") or "").decode()
        trust = ssl.create_default_context(cadata=authority or None)
        limit = aiohttp.ClientTimeout(total=webhook["timeoutSeconds"])
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust), timeout=limit) as session,
            session.post(url, json=review, allow_redirects=False, server_hostname=name) as answer,
        ):
            if answer.status != 200:
                raise ValueError(f"the server answered {answer.status}: {(await answer.text())[:200]}")
            return (await answer.json())["response"]

    def _resolve(self, ref: Obj) -> tuple[str, str]:
        """Where a Service's server is, and the name that its certificate must have."""
        service = self._store.get("services", ref["namespace"], ref["name"])
        if service is None or service.obj["spec"].get("type") != "ExternalName":
            raise OSError(f"no endpoints available for service {json.dumps(ref['name'])}")
        host = f"{service.obj['spec']['externalName']}:{ref.get('port', 443)}"
        return f"https://{host}{ref.get('path', '')}", f"{ref['name']}.{ref['namespace']}.svc"


def _objects(asked: Asked) -> Obj:
    return {"object": asked.new, "oldObject": asked.old, "options": {}}
