"""kopf's part: the watch of FineTuneJobs, login and signals. The controller deals with events."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import kopf

from finetune_api import API_VERSION, GROUP, VERSION
from finetune_operator import reflector
from finetune_operator.cluster import ApiError, in_cluster
from finetune_operator.connection import changes, lines, parsed
from finetune_operator.controller import Controller
from finetune_operator.essentials import page_reader
from finetune_operator.tls import TlsError
from finetune_operator.webhook_callers import Unrecognisable

ANSWER_SECONDS = 30
"""For one of kopf's requests; a page of a LIST takes less."""
CHUNK = 20
"""FineTuneJobs that kopf lists at once: it cannot be told to ask for fewer where they are large, and each may have
1.5 MiB."""


def registry(controller: Controller) -> kopf.OperatorRegistry:
    """The handlers of one controller. Only `on.event`: it writes nothing to any object and needs no finalizer."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.startup(registry=handlers)
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings)
        try:
            await controller.start()
        except (ApiError, TlsError, Unrecognisable, OSError) as error:
            raise kopf.PermanentError(str(error)) from error

    @kopf.on.cleanup(registry=handlers)
    async def stop(**_: Any) -> None:
        await controller.stop()

    @kopf.on.login(registry=handlers, retries=3)
    async def login(**kwargs: Any) -> Any:
        # A coroutine: a session belongs to the event loop.
        # The same choice as for our own client; without a handler any installed library's credentials may be used.
        found = kopf.login_with_service_account(**kwargs) if in_cluster() else kopf.login_with_kubeconfig(**kwargs)
        return found and kopf.AiohttpSession(aiohttp_session=session(found), server=found.server)

    # Coroutines: kopf calls plain functions in threads, and the controller belongs to the event loop.
    @kopf.on.event(GROUP, VERSION, "finetunejobs", registry=handlers)
    async def job(event: kopf.RawEvent, **_: Any) -> None:
        controller.on_job(event["type"], event["object"])

    return handlers


class Answer(aiohttp.ClientResponse):
    """An answer to kopf. Of FineTuneJobs it gets what is kept of them, and the rest is never parsed."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        await super().start(connection)
        if self.status == 200 and self.url.query.get("watch"):
            self.content = Changes(self.content)  # type: ignore[assignment]
        return self

    async def json(self, **options: Any) -> Any:
        if self.status != 200 or not self.url.path.endswith("/finetunejobs"):
            return await super().json(**options)
        page = parsed(page_reader("FineTuneJob"), await self.read())
        meta = {"resourceVersion": page.version, "continue": page.token}
        return {"apiVersion": API_VERSION, "kind": "FineTuneJobList", "metadata": meta, "items": page.items}


class Changes:
    """The stream of a watch; kopf reads it by `iter_chunked`."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._content, name)

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        async for change in changes("FineTuneJob", lines(self._content.iter_any())):
            yield change.encode() + b"\n"


def session(found: kopf.ConnectionInfo) -> aiohttp.ClientSession:
    """A session with these credentials, as kopf makes it, for its LIST and its watch of FineTuneJobs."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=found.as_ssl_context()),
        # Uncompressed: a few bytes on the wire could be a thousand times that here, before anybody counts them.
        headers=found.as_http_headers() | {"Accept-Encoding": "identity"},
        proxy=found.proxy_url,
        trust_env=found.trust_env,
        response_class=Answer,
    )


class NoDiff(kopf.DiffBaseStorage):
    """Keeps nothing of an object: kopf would copy each one that it hears of, for a difference that nobody reads."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        return None

    def store(self, **_: Any) -> None:
        """Nothing is written to any object."""


def configure(settings: kopf.OperatorSettings) -> None:
    settings.persistence.diffbase_storage = NoDiff()
    # Events are posted by the controller, after the status write; kopf would turn its own log lines into more.
    settings.posting.enabled = False
    # No watches on namespaces and CRDs: they need rights of their own, and nothing here waits for either.
    settings.scanning.disabled = True
    settings.watching.chunk_size = CHUNK
    # Each object is kept for so long after its last event.
    settings.queueing.idle_timeout = 0.01
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = reflector.SILENCE_SECONDS
    settings.networking.error_backoffs = reflector.BACKOFFS
    settings.networking.request_timeout = ANSWER_SECONDS
    # The process is to be gone before the kubelet's patience of 30 seconds ends.
    settings.process.ultimate_exiting_timeout = 10
