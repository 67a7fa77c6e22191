"""The validating webhook: what takes a look-up to refuse, at the moment that somebody creates or changes an object.

`POST /validate` with an AdmissionReview. Who asks is not authenticated, as is usual of webhooks; an answer tells no
more than whether a job would be admitted. Any replica answers.
"""

import asyncio
import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aiohttp import web

from finetune_operator.cluster import ApiError
from finetune_operator.metrics import Metrics
from finetune_operator.review import Malformed, Request, Use, Verdict, answer, judge_job, judge_profile, uses
from finetune_operator.serving import Listening, TlsServer, TooLarge, body_of

logger = logging.getLogger(__name__)

PATH = "/validate"
MAX_BODY = 7 * 1024 * 1024
"""An object has at most 1.5 MiB in etcd, and 3 MiB as a request; a review has the old one and the new one."""


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
    max_connections: int = 256
    connection_seconds: float = 15.0
    review_seconds: float = 8.0
    """For one review; less than the webhook's timeoutSeconds, so that it is this server that says why."""
    reviews_at_once: int = 32
    """Beyond that they wait: each asks the API server something."""


class AdmissionServer:
    """`start` and `stop` it."""

    def __init__(
        self, cluster: ReviewCluster, profiles: ProfileSource, options: AdmissionOptions, metrics: Metrics
    ) -> None:
        self._cluster, self._profiles, self._options, self._metrics = cluster, profiles, options, metrics
        self._room = asyncio.Semaphore(options.reviews_at_once)
        self._server = TlsServer("admission webhook", self._answer, options)

    async def start(self) -> None:
        """Listens. Raises tls.TlsError, OSError."""
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop()

    @property
    def port(self) -> int:
        return self._server.port

    async def _answer(self, http: web.BaseRequest) -> web.StreamResponse:
        response = await self._review(http)
        # A connection's time is bounded, so that none may be kept that is cut off in the middle of a later review.
        response.force_close()
        return response

    async def _review(self, http: web.BaseRequest) -> web.Response:
        if http.path != PATH:
            return web.Response(status=404, text=f"the only path is {PATH}\n")
        if http.method != "POST":
            return web.Response(status=405, headers={"Allow": "POST"}, text="use POST\n")
        try:
            async with asyncio.timeout(self._options.review_seconds):
                request = Request.read(json.loads(await body_of(http, MAX_BODY)))
                async with self._room:
                    verdict = await self._judge(request)
        except TooLarge:
            return web.Response(status=413, text=f"a review has at most {MAX_BODY} bytes\n")
        except (Malformed, ValueError, RecursionError) as error:
            return web.Response(status=400, text=f"{error}\n")
        except (ApiError, TimeoutError) as error:
            # The API server then does as the webhook's failurePolicy says.
            logger.warning("a review could not be made: %s", str(error) or "it took too long")
            self._metrics.review("failed")
            return web.Response(status=503, text="what the review needs cannot be looked up; try again later\n")
        self._metrics.review("denied" if verdict.problems else "allowed")
        if verdict.problems:
            extra = {"namespace": request.namespace, "job": request.name}
            logger.info("refused to %s: %s", request.user.get("username"), verdict.problems[0], extra=extra)
        return web.json_response(answer(request, verdict))

    async def _judge(self, request: Request) -> Verdict:
        """Raises ApiError."""
        if request.leaves:
            return Verdict()
        if request.kind == "FineTuneProfile":
            return judge_profile(request)
        wanted = request.spec.get("profile")
        profiles = await self._profiles.choice(wanted if isinstance(wanted, str) else None)
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
