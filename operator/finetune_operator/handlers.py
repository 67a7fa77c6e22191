"""kopf's part: watching, login and signals. What happens with an event is the controller's."""

from typing import Any

import kopf

from finetune_api import GROUP, VERSION
from finetune_operator.cluster import ApiError, in_cluster
from finetune_operator.controller import Controller
from finetune_operator.manifests import MANAGED_BY
from finetune_operator.tls import TlsError
from finetune_operator.webhook_callers import Unrecognisable

SILENCE_SECONDS = 70.0
"""Without an event for so long, a bookmark included, a watch counts as dead and is opened anew where it stopped: an API
server sends bookmarks every minute and remembers what happened in the last 75 seconds."""
ANSWER_SECONDS = 30
"""For one of kopf's requests; a page of a LIST takes less."""
BACKOFFS = (1, 1, 2, 3, 5, 8, 13, *(20,) * 60)
"""Seconds between tries of what a watch asks for: 20 minutes in all. An API server that is away for a while is waited
for, with all that is known; after the last try the process ends, instead of being green without a watch."""


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
    def login(**kwargs: Any) -> Any:
        # The same choice as for our own client; without a handler any installed library's credentials may be used.
        return kopf.login_with_service_account(**kwargs) if in_cluster() else kopf.login_with_kubeconfig(**kwargs)

    # Coroutines: kopf calls plain functions in threads, and the controller belongs to the event loop.
    @kopf.on.event(GROUP, VERSION, "finetunejobs", registry=handlers)
    async def job(event: kopf.RawEvent, **_: Any) -> None:
        controller.on_job(event["type"], event["object"])

    @kopf.on.event("batch", "v1", "jobs", registry=handlers)
    async def child(event: kopf.RawEvent, **_: Any) -> None:
        controller.on_child(event["type"], event["object"])

    @kopf.on.event("v1", "pods", registry=handlers)
    async def pod(event: kopf.RawEvent, **_: Any) -> None:
        controller.on_pod(event["type"], event["object"])

    return handlers


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
    # The server filters, not the client: other people's pods are many.
    selector = "=".join(MANAGED_BY)
    settings.watching.label_selectors["batch", "v1", "jobs"] = selector
    settings.watching.label_selectors["v1", "pods"] = selector
    # An initial LIST of 10,000 objects at once is a peak in memory here and at the server.
    settings.watching.chunk_size = 500
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = SILENCE_SECONDS
    settings.networking.error_backoffs = BACKOFFS
    settings.networking.request_timeout = ANSWER_SECONDS
    # The process is to be gone before the kubelet's patience of 30 seconds ends.
    settings.process.ultimate_exiting_timeout = 10
