"""The server that trainers report to: Kubeflow Trainer's wire format over TLS, for pods of a job's current attempt.

`POST /apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs/{name}/status` with `{"trainerStatus": {…}}` and a
bearer token answers 200 and `{}`; a refusal is a metav1.Status. Any replica takes any report.
"""

import asyncio
import datetime
import logging
import math
import re
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from finetune_api import API_VERSION
from finetune_api.model import problems_of
from finetune_api.progress import ProgressReport, TrainerStatus
from finetune_operator.buckets import Buckets
from finetune_operator.byte_budget import ByteBudget
from finetune_operator.cluster import ApiError
from finetune_operator.metrics import Metrics
from finetune_operator.progress_auth import Authenticator, ProgressCluster, Refused, check_pod, current_attempt
from finetune_operator.progress_state import JobKey, ProgressBook
from finetune_operator.progress_writer import ProgressWriter
from finetune_operator.serving import HttpServer, Listening, TooLarge, TooSlow, bearer, body_of

logger = logging.getLogger(__name__)

MAX_BODY = 64 * 1024
SMALL_BODY = 4 * 1024
"""Nearly all reports are smaller."""
BODIES, BODIES_RESERVED = 2 * 1024 * 1024, 1024 * 1024
"""Bytes of all bodies that are read at a time, and those of them that large bodies leave to small ones."""
_PATH = re.compile(rf"/apis/{API_VERSION}/namespaces/([a-z0-9-]{{1,63}})/finetunejobs/([a-z0-9.-]{{1,253}})/status")


@dataclass(frozen=True)
class ProgressOptions(Listening):
    """Times are in seconds."""

    host: str = "0.0.0.0"
    port: int = 8443
    max_connections: int = 1280
    connection_seconds: float = 15.0
    rate_per_address: float = 300.0
    """A pod has an address of its own; on a laptop all share one."""
    burst_per_address: float = 1500.0
    write_interval: float = 5.0
    reports_per_second: float = 1.0
    """Of one job, in the long run; `burst` at once."""
    burst: float = 10.0
    strangers_per_second: float = 20.0
    """Requests of one address with a token that is not known yet: each costs a TokenReview."""
    stranger_burst: float = 100.0
    call_seconds: float = 4.0
    """For the API server's part of a request: a stock Trainer gives up after five."""


class ProgressServer:
    """`start` it, then `url(namespace, name)` is where a job's trainer reports; `stop` writes what waits."""

    def __init__(
        self,
        cluster: ProgressCluster,
        options: ProgressOptions,
        metrics: Metrics,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`monotonic`, `clock`: seconds; the latter since the epoch."""
        self._cluster, self._options, self._metrics = cluster, options, metrics
        self._monotonic, self._clock = monotonic, clock
        self._authenticator = Authenticator(cluster, clock=clock)
        self._jobs = Buckets(options.reports_per_second, options.burst)
        self._strangers = Buckets(options.strangers_per_second, options.stranger_burst)
        self._writer = ProgressWriter(
            cluster,
            ProgressBook(options.write_interval),
            metrics,
            monotonic=monotonic,
            call_seconds=options.call_seconds * 2,
        )
        self._bodies = ByteBudget(BODIES, reserved=BODIES_RESERVED, small=SMALL_BODY)
        self._server = HttpServer("progress", self._answer, options, metrics, clock=clock)

    async def start(self) -> None:
        """Listens. Raises tls.TlsError, OSError."""
        await self._server.start()
        self._writing = asyncio.create_task(self._writer.run(), name="progress writer")

    async def stop(self) -> None:
        """Takes no more, and writes what waits."""
        await self._server.stop()
        self._writing.cancel()
        await asyncio.gather(self._writing, return_exceptions=True)
        await self._writer.drain()

    @property
    def port(self) -> int:
        return self._server.port

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        key = None
        try:
            key = _key(request)
            await self._take(key, request)
        except Exception as error:
            refusal = self._refusal(error, key)
            result, response = refusal.reason, _status(refusal)
        else:
            result, response = "accepted", web.json_response({})
        self._metrics.report(result)
        return response

    async def _take(self, key: JobKey, request: web.BaseRequest) -> None:
        """Checks a request from the cheap to the dear, the body last. Raises Refused."""
        token = _bearer(request)
        # Who holds a good token pays from the job's bucket; nobody else can empty it.
        known = self._authenticator.known(key, token) is not None
        familiar = known or self._authenticator.familiar(key, token)
        self._pay(self._jobs if familiar else self._strangers, key if familiar else request.remote)
        if known:
            self._server.vouch(request)
        async with asyncio.timeout(self._options.call_seconds):
            job = await self._cluster.get_job(*key)
            if job is None:
                self._writer.forget(key)
                self._jobs.forget(key)
                raise Refused(404, "NotFound", f'finetunejobs.finetune.dev "{key.name}" not found')
            identity = await self._authenticator.identify(key, job["metadata"]["uid"], token)
            attempt = current_attempt(job)
            pod = await self._cluster.get_pod(key.namespace, identity.pod_name)
            check_pod(pod, identity, attempt, key.name)
        if not familiar:
            # Many reports with one new token come to no more than those with a known one.
            self._pay(self._jobs, key)
        self._server.vouch(request)
        async with asyncio.timeout(self._options.call_seconds), body_of(request, MAX_BODY, self._bodies) as body:
            report = parse(bytes(body), self._clock())
        self._writer.accept(key, attempt.job_uid, attempt.number, report)

    def _pay(self, buckets: Buckets, payer: Hashable) -> None:
        """Raises Refused where the payer has nothing left."""
        if wait := buckets.take(payer, self._monotonic()):
            raise Refused(429, "TooManyRequests", f"too many reports; the next one in {wait:.1f} s", wait)

    def _refusal(self, error: Exception, key: JobKey | None) -> Refused:
        """What the trainer is told where its report was not taken."""
        about = {"namespace": key.namespace, "job": key.name} if key else {}
        if isinstance(error, Refused):
            return error
        if isinstance(error, ApiError | TimeoutError):
            said = str(error) or "the API server does not answer"
            logger.warning("a progress report cannot be checked: %s", said, extra=about)
            return Refused(503, "ServiceUnavailable", "the API server does not answer; report again later", 5)
        if isinstance(error, TooLarge):
            return Refused(413, "RequestEntityTooLarge", f"a report has at most {MAX_BODY} bytes")
        if isinstance(error, TooSlow):
            return Refused(408, "Timeout", "the body did not come in time; report again", 1)
        if isinstance(error, web.RequestPayloadError):
            return Refused(400, "BadRequest", f"the body cannot be read: {error}")
        logger.error("a progress report could not be handled", exc_info=error, extra=about)
        self._metrics.request_failed("progress")
        return Refused(500, "InternalError", "the report could not be handled; the operator's log says why")


def parse(body: bytes, now: float) -> TrainerStatus:
    """The report of a body, stamped with the server's own clock (`now`, since the epoch). Raises Refused (422)."""
    try:
        status = ProgressReport.model_validate_json(body).trainer_status
    except ValidationError as error:
        found = "; ".join(str(problem) for problem in problems_of(error)[:8])
        raise Refused(422, "Invalid", found[:1024]) from error
    checkpoint = status.checkpoint
    if checkpoint is not None and checkpoint.time.tzinfo is None:
        checkpoint = checkpoint.model_copy(update={"time": checkpoint.time.replace(tzinfo=datetime.UTC)})
    stamp = datetime.datetime.fromtimestamp(int(now), datetime.UTC)
    return status.model_copy(update={"last_updated_time": stamp, "checkpoint": checkpoint})


def _key(request: web.BaseRequest) -> JobKey:
    match = _PATH.fullmatch(request.path)
    if match is None:
        raise Refused(404, "NotFound", "the only path is that of a FineTuneJob's status")
    if request.method != "POST":
        raise Refused(405, "MethodNotAllowed", f"found {request.method}; progress is reported by POST")
    if request.content_type != "application/json" or "Content-Encoding" in request.headers:
        raise Refused(415, "UnsupportedMediaType", "the body must be application/json without a Content-Encoding")
    return JobKey(*match.groups())


def _bearer(request: web.BaseRequest) -> str:
    if (token := bearer(request.headers.get("Authorization", ""))) is None:
        raise Refused(401, "Unauthorized", "a bearer token is required: the one projected into the trainer's pod")
    return token


def _status(refusal: Refused) -> web.Response:
    """A metav1.Status."""
    body: dict[str, Any] = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": str(refusal),
        "reason": refusal.reason,
        "code": refusal.code,
    }
    response = web.json_response(body, status=refusal.code)
    if refusal.retry_after is not None:
        seconds = max(1, math.ceil(refusal.retry_after))
        body["details"] = {"retryAfterSeconds": seconds}
        response = web.json_response(body, status=refusal.code, headers={"Retry-After": str(seconds)})
    if refusal.code == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if refusal.code == 405:
        response.headers["Allow"] = "POST"
    return response
