"""`GET /healthz`, for the kubelet: whether the operator gets on. It bears strangers as the other servers do."""

from collections.abc import Callable

from aiohttp import web

from finetune_operator.metrics import Metrics
from finetune_operator.serving import HttpServer, Listening

PATH = "/healthz"
MAX_CONNECTIONS, CONNECTION_SECONDS = 64, 5.0


class ProbeServer:
    """`start` and `stop` it."""

    def __init__(self, problem: Callable[[], str | None], host: str, port: int, metrics: Metrics) -> None:
        """`problem` says why a probe should fail; None while all is well."""
        self._problem = problem
        listening = Listening(None, (), host, port, MAX_CONNECTIONS, CONNECTION_SECONDS)
        self._server = HttpServer("probes", self._answer, listening, metrics)

    async def start(self) -> None:
        """Listens. Raises OSError."""
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop()

    @property
    def port(self) -> int:
        return self._server.port

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path != PATH or request.method not in ("GET", "HEAD"):
            return web.Response(status=404, text=f"the only request is GET {PATH}\n")
        problem = self._problem()
        return web.Response(status=500 if problem else 200, text=f"{problem or 'ok'}\n")
