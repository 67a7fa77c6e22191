"""The API server as the commands see it: plain dicts, and every failure as one sentence.

The connection itself (kubeconfig, certificates, tokens, watches that survive) is the sandbox package's thin client.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar, cast

import aiohttp
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config
from kubernetes.aio.config.kube_config import KubeConfigMerger
from yaml import YAMLError

from finetune_api import API_VERSION
from finetune_cli.errors import CliError, Exit
from finetune_sandbox.client import ApiError, Client, Object, Resource

T = TypeVar("T")

JOBS = Resource(f"/apis/{API_VERSION}", "finetunejobs", "FineTuneJob")
PROFILES = Resource(f"/apis/{API_VERSION}", "finetuneprofiles", "FineTuneProfile", namespaced=False)
FIELD_MANAGER = "finetune"
APPLY_PATCH = "application/apply-patch+yaml"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Target:
    """Which cluster: what the command line says of it."""

    kubeconfig: str | None = None
    context: str | None = None
    namespace: str | None = None

    @property
    def file(self) -> str:
        return self.kubeconfig or os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())

    @property
    def exists(self) -> bool:
        """Whether there is a kubeconfig: $KUBECONFIG may name several."""
        return any(Path(part).expanduser().exists() for part in self.file.split(os.pathsep) if part)

    @property
    def in_cluster(self) -> bool:
        return not self.exists and not self.kubeconfig and (SERVICE_ACCOUNT / "token").exists()


class Cluster(Client):
    """A connection, with the namespace that commands work in."""

    namespace: str = "default"

    async def __aenter__(self) -> Self:
        return self

    async def apply(self, resource: Resource, manifest: Object) -> Object:
        """Server-side apply: creates the object, or changes what the manifest says of it."""
        name, namespace = manifest["metadata"]["name"], manifest["metadata"].get("namespace")
        return await self.request(
            "PATCH",
            resource.path(namespace, name),
            params={"fieldManager": FIELD_MANAGER, "force": "true"},
            body=manifest,
            content_type=APPLY_PATCH,
        )

    async def resource_of(self, manifest: Object) -> Resource:
        """Where the manifest's kind lives, as the server itself says."""
        version, kind = manifest["apiVersion"], manifest["kind"]
        base = f"/apis/{version}" if "/" in version else f"/api/{version}"
        try:
            known = (await self.request("GET", base)).get("resources") or []
        except ApiError as error:
            if error.status != 404:
                raise
            known = []
        for entry in known:
            if entry["kind"] == kind and "/" not in entry["name"]:
                return Resource(base, entry["name"], kind, entry["namespaced"])
        hint = ": `finetune crds | kubectl apply -f -` installs it" if version == API_VERSION else ""
        raise CliError(f"the cluster at {self.host} does not know the kind {kind} of {version}{hint}")

    async def job(self, name: str) -> Object:
        return await self.get(JOBS, self.namespace, name)

    async def text_lines(self, path: str, params: dict[str, str]) -> AsyncGenerator[bytes, None]:
        """The lines of a streamed text, such as a log. Raises ApiError."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        headers = await self._headers()
        async with self._session.get(self.host + path, params=params, headers=headers, timeout=timeout) as response:
            if response.status >= 400:
                try:
                    answer = await response.json(content_type=None)
                except ValueError:
                    answer = {}
                raise ApiError(response.status, answer if isinstance(answer, dict) else {})
            rest = b""
            async for chunk in response.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield line
            if rest:
                yield rest


def run(target: Target, work: Callable[[Cluster], Awaitable[T]], timeout: float | None = None) -> T:
    """Connects, does the work, and puts what goes wrong into words. Raises CliError."""

    async def connected() -> T:
        async with await connect(target) as cluster:
            try:
                return await asyncio.wait_for(work(cluster), timeout)
            except TimeoutError as error:
                if timeout is None:
                    raise CliError(f"the cluster at {cluster.host} does not answer", Exit.UNREACHABLE) from error
                raise CliError(f"not there after {timeout:g} s", Exit.TIMEOUT) from error
            except aiohttp.ClientError as error:
                why = f"the cluster at {cluster.host} cannot be reached: {_cause(error)}"
                raise CliError(why, Exit.UNREACHABLE) from error

    with _in_words():
        return asyncio.run(connected())


async def connect(target: Target) -> Cluster:
    """A connection that has been tried. Raises CliError with Exit.UNREACHABLE."""
    configuration: Configuration = type.__call__(Configuration)
    if target.in_cluster:
        load_incluster_config(client_configuration=configuration)
        cluster = Cluster(configuration, "in-cluster")
        cluster.namespace = target.namespace or _own_namespace()
        return cluster
    # The client falls back to localhost where there is no file at all: say so instead.
    if not target.exists:
        raise CliError(f"no cluster: there is no kubeconfig at {target.file}", Exit.UNREACHABLE)
    try:
        cluster = cast(Cluster, await Cluster.from_kubeconfig(target.file, target.context))
        cluster.namespace = target.namespace or _namespace(target)
    except (ConfigException, OSError, ValueError, KeyError, TypeError, AttributeError, YAMLError) as error:
        raise CliError(f"{target.file} names no usable cluster: {_first_line(error)}", Exit.UNREACHABLE) from error
    try:
        await cluster.request("GET", "/version", timeout=CONNECT_SECONDS)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        await cluster.close()
        why = f"the cluster at {cluster.host} cannot be reached: {_cause(error)}"
        raise CliError(why, Exit.UNREACHABLE) from error
    except ApiError as error:
        if error.status != 403:  # who may not ask for the version may still have rights
            await cluster.close()
            raise
    return cluster


def _own_namespace() -> str:
    return (SERVICE_ACCOUNT / "namespace").read_text().strip()


def _namespace(target: Target) -> str:
    """The namespace of the context, else `default`."""
    config = KubeConfigMerger(target.file).config
    current = target.context or config.safe_get("current-context")
    context = next((c["context"] for c in config.safe_get("contexts") or [] if c["name"] == current), None)
    namespace = context.safe_get("namespace") if context else None
    return str(namespace) if namespace else "default"


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        raise CliError(sentence(error), Exit.UNREACHABLE if error.status in (401, 503) else Exit.FAILED) from error
    except ExceptionGroup as group:
        known = [e for e in group.exceptions if isinstance(e, CliError | ApiError)]
        if not known:
            raise
        raise (known[0] if isinstance(known[0], CliError) else CliError(sentence(known[0]))) from group


def sentence(error: ApiError) -> str:
    """What the server said."""
    if error.status == 401:
        return "the cluster does not know these credentials (401): log in again or choose another --context"
    return error.message or f"the cluster answered {error.status} {error.reason}".strip()


def _cause(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_SECONDS:g} s"
    reason = getattr(error, "os_error", None) or error
    return str(getattr(reason, "strerror", None) or _first_line(reason))


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
