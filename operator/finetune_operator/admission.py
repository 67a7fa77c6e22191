"""The validating webhook: what takes a look-up to refuse, at the moment that somebody creates or changes an object.

`POST` with an AdmissionReview, by the API server alone: `webhook_callers` recognises it. Everybody else gets one and
the same answer, before anything of what they ask is read. Any replica answers.
"""

import asyncio
import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from finetune_operator.byte_budget import ByteBudget
from finetune_operator.cluster import ApiError
from finetune_operator.metrics import Metrics
from finetune_operator.review import (
    Malformed,
    Request,
    Use,
    Verdict,
    answer,
    judge_job,
    judge_profile,
    reads_as_job,
    uses,
)
from finetune_operator.serving import HttpServer, Listening, TooLarge, TooSlow, body_of
from finetune_operator.webhook_callers import Callers

logger = logging.getLogger(__name__)

MAX_BODY = 7 * 1024 * 1024
"""An object has at most 1.5 MiB in etcd, and 3 MiB as a request; a review has the old one and the new one."""
SMALL_BODY = 128 * 1024
"""Nearly all reviews have some kilobytes."""
BODIES, BODIES_RESERVED = 10 * 1024 * 1024, 2 * 1024 * 1024
"""Bytes of all bodies that are read or reviewed at a time, and those of them that large bodies leave to small ones.
In memory, what JSON becomes is several times as much."""


class ReviewCluster(Protocol):
    """What reviews ask of a cluster; raises ApiError."""

    async def may(self, user: Mapping[str, Any], attributes: dict[str, Any]) -> bool:
        """Whether a user may do what these resourceAttributes say."""


class ProfileSource(Protocol):
    async def choice(self, wanted: str | None) -> Sequence[Mapping[str, Any]]:
        """What `select_profile` chooses from. Raises ApiError."""


@dataclass(frozen=True)
class AdmissionOptions(Listening):
    """Times are in seconds."""

    host: str = "0.0.0.0"
    port: int = 9443
    max_connections: int = 640
    connection_seconds: float = 15.0
    paths_file: Path | None = None
    """See `webhook_callers`; one of this and `client_ca` is needed."""
    client_names: Sequence[str] = ()
    """Whom a client's certificate may be for; none: anybody whom `client_ca` knows."""
    review_seconds: float = 8.0
    """For one review; less than the webhook's timeoutSeconds, so that it is this server that says why."""
    reviews_at_once: int = 32
    """Beyond that they wait: each asks the API server something."""


class AdmissionServer:
    """`start` and `stop` it."""

    def __init__(
        self, cluster: ReviewCluster, profiles: ProfileSource, options: AdmissionOptions, metrics: Metrics
    ) -> None:
        """Raises Unrecognisable."""
        self._cluster, self._profiles, self._options, self._metrics = cluster, profiles, options, metrics
        certificates = options.client_ca is not None
        self._callers = Callers(options.paths_file, certificates=certificates, names=options.client_names)
        self._room = asyncio.Semaphore(options.reviews_at_once)
        self._bodies = ByteBudget(BODIES, reserved=BODIES_RESERVED, small=SMALL_BODY)
        self._server = HttpServer("webhook", self._answer, options, metrics)

    async def start(self) -> None:
        """Listens. Raises tls.TlsError, OSError."""
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop()

    @property
    def port(self) -> int:
        return self._server.port

    async def _answer(self, http: web.BaseRequest) -> web.StreamResponse:
        if not self._callers.knows(http):
            return web.Response(status=404, text="this server answers the API server alone\n")
        # An API server keeps its connection: a crowd that keeps new ones waiting is in nobody's way who has one.
        self._server.vouch(http, keep=True)
        if http.method != "POST":
            return web.Response(status=405, headers={"Allow": "POST"}, text="use POST\n")
        try:
            async with (
                asyncio.timeout(self._options.review_seconds),
                body_of(http, MAX_BODY, self._bodies) as body,
                self._room,
            ):
                return await self._review(body)
        except TooLarge:
            return web.Response(status=413, text=f"a review has at most {MAX_BODY} bytes\n")
        except TooSlow:
            return web.Response(status=408, text="the body did not come in time; send the review again\n")
        except (Malformed, web.RequestPayloadError) as error:
            return web.Response(status=400, text=f"{error}\n")
        except (ApiError, TimeoutError) as error:
            # The API server then does as the webhook's failurePolicy says.
            logger.warning("a review could not be made: %s", str(error) or "it took too long")
            self._metrics.review("failed")
            return web.Response(status=503, text="what the review needs cannot be looked up; try again later\n")

    async def _review(self, body: bytearray) -> web.Response:
        """Raises Malformed, ApiError."""
        try:
            request = Request.read(json.loads(body))
        except (ValueError, RecursionError) as error:
            raise Malformed(f"the body is no JSON that can be read: {type(error).__name__}") from error
        about = {"namespace": request.namespace, "job": request.name}
        try:
            verdict = await self._judge(request)
            reply = web.json_response(answer(request, verdict))
        except ApiError:
            raise
        except Exception:
            logger.exception("a review could not be made", extra=about)
            self._metrics.review("failed")
            self._metrics.request_failed("webhook")
            return web.Response(status=500, text="the review could not be made; the operator's log says why\n")
        self._metrics.review("denied" if verdict.problems else "allowed")
        if verdict.problems:
            logger.info("refused to %s: %s", request.user.get("username"), verdict.problems[0], extra=about)
        return reply

    async def _judge(self, request: Request) -> Verdict:
        """Raises ApiError."""
        if request.leaves:
            return Verdict()
        if request.kind == "FineTuneProfile":
            return judge_profile(request)
        # Nothing is looked up by a name that is none.
        readable = reads_as_job(request)
        profiles = await self._profiles.choice(request.spec.get("profile")) if readable else ()
        verdict = judge_job(request, profiles, datetime.datetime.now(datetime.UTC))
        if verdict.problems:
            return verdict
        asked = list(uses(request))
        allowed = await asyncio.gather(*(self._may_use(request, use) for use in asked))
        refused = [
            use.refusal(request.user, request.namespace) for use, ok in zip(asked, allowed, strict=True) if not ok
        ]
        return Verdict(tuple(refused), verdict.warnings, forbidden=bool(refused))

    async def _may_use(self, request: Request, use: Use) -> bool:
        for verb in use.verbs:
            attributes = {"namespace": request.namespace, "verb": verb, "resource": use.resource, "name": use.name}
            if await self._cluster.may(request.user, attributes | {"group": "", "version": "v1"}):
                return True
        return False
