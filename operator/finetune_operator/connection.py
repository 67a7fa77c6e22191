"""HTTP to the API server: credentials, patience, answers of bounded size. Only here a client library is known."""

import asyncio
import logging
import os
import random
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Literal, TypeVar
from urllib.parse import urlencode
from urllib.request import getproxies

import aiohttp
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config.config_exception import ConfigException
from kubernetes.aio.config.incluster_config import load_incluster_config
from kubernetes.aio.config.kube_config import load_kube_config
from yarl import URL

from finetune_operator import clock
from finetune_operator.errors import ApiError, TooLarge
from finetune_operator.essentials import Change, Data, Object, change_reader, whole
from finetune_operator.paths import plural_of

T = TypeVar("T")
Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
FIELD_MANAGER = "finetune-operator"
MIB = 2**20
DEEPEST = 20_000
"""Objects in objects; an API server takes no more than 10,000."""
logger = logging.getLogger(__name__)
LARGEST = 32 * MIB
"""Bytes of one answer, or of one line of a watch. An object that fills etcd's 1.5 MiB is up to 9 MiB of JSON, because
characters such as `<` are written as six."""
LARGE = MIB
"""Answers of more bytes are read two at a time, so that those of many requests are not in memory together."""
RETRIED = (429, 502, 503, 504)
"""Codes that say `later`: nothing was done, or doing it twice does no harm, since names and UIDs are fixed."""


async def load_configuration() -> Configuration:
    """Who we are: `$KUBECONFIG` where it is set, else the pod's ServiceAccount, else ~/.kube/config.

    Raises ApiError.
    """
    configuration = Configuration()
    try:
        if in_cluster():
            load_incluster_config(client_configuration=configuration)
        else:
            file = os.environ.get("KUBECONFIG") or None
            await load_kube_config(file, client_configuration=configuration, persist_config=False)
    except ConfigException as error:
        raise ApiError(0, "NoCredentials", str(error)) from error
    return configuration


def in_cluster() -> bool:
    return not os.environ.get("KUBECONFIG") and "KUBERNETES_SERVICE_HOST" in os.environ


class Connection:
    """Requests to one API server. One per event loop; `close` it."""

    def __init__(
        self,
        configuration: Configuration,
        *,
        timeout: float = 30.0,
        attempts: int = 5,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        on_call: Callable[[str, str, int | str, float], None] = lambda verb, resource, code, seconds: None,
    ) -> None:
        """`timeout`: seconds for one request. `attempts`: tries of one call while the server says 429 or 5xx.
        `on_call(verb, resource, code or word, seconds)` hears of every request."""
        # Otherwise aiohttp looks for ~/.netrc and for proxies in the environment before each request, in a thread; and
        # the client library lets each connection buffer 4 MiB.
        configuration.client_session_kwargs = {"trust_env": bool(getproxies()), "read_bufsize": 2**17}
        # Watches of many namespaces must not keep requests from their turn; those are bounded by the workers.
        configuration.connection_pool_maxsize = 0
        self._client = ApiClient(configuration)
        self._client.user_agent = FIELD_MANAGER
        self._host: str = configuration.host
        self._seconds = timeout
        self._attempts = attempts
        self._sleep = sleep
        self._on_call = on_call
        self._large = asyncio.Semaphore(2)

    async def close(self) -> None:
        await self._client.close()

    async def call(
        self, method: Method, path: str, query: Mapping[str, str] | None = None, body: Object | None = None
    ) -> Object:
        """One request; its answer as it is. Raises ApiError."""
        return await self.ask(method, path, query, body, read=whole)

    async def ask(
        self,
        method: Method,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        *,
        read: Callable[[Data], T],
        most: int = LARGEST,
    ) -> T:
        """One request, again while the server says so: after Retry-After seconds where it names them. Raises ApiError:
        TooLarge where the answer has more than `most` bytes."""
        for attempt in range(1, self._attempts + 1):
            code: int | str = "unreachable"
            start = time.monotonic()
            try:
                async with self._sent(method, path, query, body, self._patience(self._seconds)) as response:
                    code = response.status
                    later = response.headers.get("Retry-After")
                    if code not in RETRIED or attempt == self._attempts:
                        return await self._answer(method, path, response, read, most)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                code = "unreachable"
                raise _unreachable(method, path, error) from error
            finally:
                self._on_call(method, plural_of(path), code, time.monotonic() - start)
            await self._sleep(_delay(later, attempt))
        raise AssertionError("unreachable")

    async def stream(self, path: str, query: Mapping[str, str], silence: float) -> AsyncGenerator[bytes]:
        """Lines of an answer that does not end, until the server ends it or says nothing for `silence` seconds. Raises
        ApiError. A line that has no end is left out, and one of more than LARGEST bytes."""
        timeout = aiohttp.ClientTimeout(total=None, connect=min(10.0, self._seconds), sock_read=silence)
        start = time.monotonic()
        code: int | str = "unreachable"
        try:
            async with self._sent("GET", path, query, None, timeout) as response:
                code = response.status
                self._on_call("WATCH", plural_of(path), code, time.monotonic() - start)
                if code != 200:
                    await self._answer("GET", path, response, whole, LARGEST)
                async for line in lines(response.content.iter_any()):
                    yield line
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if code == "unreachable":
                self._on_call("WATCH", plural_of(path), code, time.monotonic() - start)
                raise _unreachable("GET", path, error) from error

    def _patience(self, seconds: float) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=seconds, connect=min(10.0, seconds))

    @asynccontextmanager
    async def _sent(
        self,
        method: Method,
        path: str,
        query: Mapping[str, str] | None,
        body: Object | None,
        timeout: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        # Uncompressed: a few bytes on the wire could be a thousand times that here, before anybody counts them.
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": FIELD_MANAGER}
        if method == "PATCH":
            headers["Content-Type"] = "application/merge-patch+json"
        url = self._host + path + (f"?{urlencode(query, errors='replace')}" if query else "")
        # The client's own part: bearer tokens that are refreshed from their file, client certificates, proxies.
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        # As it is: names are quoted, and whoever normalises the path again could unquote them.
        asked = clock.local_now()
        sent = await self._client.call_api(method, URL(url, encoded=True), headers, body, _request_timeout=timeout)
        response: aiohttp.ClientResponse = sent.response
        clock.heard(response.headers.get("Date"), asked, clock.local_now())
        try:
            yield response
        finally:
            # What was read to its end goes back to the pool; of anything else nothing more is wanted.
            if response.content.at_eof():
                response.release()
            else:
                response.close()

    async def _answer(
        self, method: Method, path: str, response: aiohttp.ClientResponse, read: Callable[[Data], T], most: int
    ) -> T:
        what = f"{method} {path}"
        async with self._body(what, response, most) as data:
            if not 200 <= response.status < 300:
                raise _refusal(what, response.status, data)
            try:
                return parsed(read, data)
            except (ValueError, RecursionError) as error:
                raise ApiError(0, "Unreadable", f"{what}: the answer cannot be read: {str(error)[:300]}") from error

    @asynccontextmanager
    async def _body(self, what: str, response: aiohttp.ClientResponse, most: int) -> AsyncIterator[Data]:
        """The body, as long as it is needed."""
        data = bytearray()
        async with AsyncExitStack() as stack:
            waited = False
            async for chunk in response.content.iter_any():
                data += chunk
                if len(data) > most:
                    raise TooLarge(what, most)
                if len(data) > LARGE and not waited:
                    await stack.enter_async_context(self._large)
                    waited = True
            yield data


async def lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines in a stream that end in it."""
    line, skipped = bytearray(), False
    async for chunk in chunks:
        *ends, start = chunk.split(b"\n")
        for end in ends:
            line += end
            if line and not skipped:
                yield bytes(line)
            line, skipped = bytearray(), False
        line += start
        if skipped or len(line) > LARGEST:
            line, skipped = bytearray(), True


async def changes(kind: str, stream: AsyncIterator[bytes]) -> AsyncGenerator[Change]:
    """The events of a watch. One that cannot be read is left out; the next look at all objects makes up for it."""
    read = change_reader(kind)
    async for line in stream:
        try:
            yield parsed(read, line)
        except (ValueError, RecursionError) as error:
            logger.warning("an event of the watch of %s cannot be read: %.300s", kind, error)


def parsed(read: Callable[[Data], T], data: Data) -> T:
    """What the reader makes of it. Raises ValueError or RecursionError.

    An API server lets objects be nested ten times as deep as Python reads by itself, and one such object must not make
    a whole list unreadable.
    """
    try:
        return read(data)
    except RecursionError:
        usual = sys.getrecursionlimit()
        sys.setrecursionlimit(DEEPEST)
        try:
            return read(data)
        finally:
            sys.setrecursionlimit(usual)


def _refusal(what: str, status: int, data: Data) -> ApiError:
    try:
        told = parsed(whole, data)
    except (ValueError, RecursionError):
        told = {"message": bytes(data[:200]).decode(errors="replace")}
    return ApiError(status, str(told.get("reason") or status), f"{what}: {str(told.get('message', ''))[:4096]}")


def _unreachable(method: str, path: str, error: Exception) -> ApiError:
    return ApiError(0, "Unreachable", f"{method} {path}: {str(error) or type(error).__name__}")


def _delay(retry_after: str | None, attempt: int) -> float:
    """Seconds until the next try. Jitter keeps many operators and keys from coming back at once."""
    least = float(retry_after) if retry_after and retry_after.isdigit() else 0.25 * 2.0**attempt
    return min(least, 30.0) * random.uniform(1.0, 1.25)
