"""Names of any kind in every method of the client: no request leaves the collection of its resource."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
from aiohttp import web
from kubernetes.aio.client.configuration import Configuration

from finetune_operator.cluster import ApiError, KubeCluster
from finetune_operator.paths import KINDS

ODD = [
    *("", ".", "..", "/", "//", "a/b", "../x", "..%2fx", "%2e%2e", "%2E%2E%2F", "%", "%00", "%zz", "..\\x", "\\"),
    *("../../../../api/v1/secrets", "..%2f..%2f..%2f..%2fapi%2fv1%2fsecrets", "x/../../secrets", "x/status"),
    *(
        "?",
        "a?watch=true",
        "a#b",
        "#",
        "a;b",
        "a&b=c",
        "a=b",
        "a,b",
        "a b",
        " ",
        "\t",
        "a\nHost: b",
        "a\r\n\r\nGET /",
        "\0",
    ),
    *(
        "ü",
        "名前",
        "\u202e",
        "\u2028",
        "．．／",
        "\ud800",
        "😀",
        "a" * 254,
        "a" * 100_000,
        "-",
        "_",
        "*",
        "$(x)",
        "{x}",
        ":",
        "@",
    ),
    *("j,app=x", "j in (a)", "!j", "j!=k", "j)", "x.y", "UPPER", "~", "'", '"', "<", "|", "^", "`", "a+b", "http://b/"),
]
GROUP = "kueue.x-k8s.io"


class Recorder:
    """An API server that has one answer for everything; each path as it came, byte for byte."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.version = f"{GROUP}/v1beta1"

    async def answer(self, request: web.BaseRequest) -> web.Response:
        path, _, query = request.raw_path.partition("?")
        if path != f"/apis/{GROUP}":
            self.seen.append((path, query))
        meta = {"name": "found", "namespace": "found", "uid": "u"}
        return web.json_response({"items": [], "metadata": meta, "preferredVersion": {"groupVersion": self.version}})


@pytest.fixture
async def recorded() -> AsyncIterator[tuple[Recorder, KubeCluster]]:
    recorder = Recorder()
    runner = web.ServerRunner(web.Server(recorder.answer, max_line_size=300_000))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    client = KubeCluster(Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}"), attempts=1)
    yield recorder, client
    await client.close()
    await runner.cleanup()


def manifest(kind: str, name: str) -> dict[str, Any]:
    return {"kind": kind, "apiVersion": "v1", "metadata": {"name": name, "namespace": name}}


async def everything(items: Any) -> list[Any]:
    return [item async for item in items]


Call = Callable[[KubeCluster, str], Awaitable[Any]]
Allowed = tuple[str, ...]
"""Kinds whose collection the request may be for."""
CALLS: dict[str, list[tuple[Allowed, Call]]] = {
    "get": [((kind,), lambda c, n, k=kind: c.get(k, n if KINDS[k].namespaced else None, n)) for kind in KINDS],
    "get_whole": [(("Job",), lambda c, n: c.get_whole("Job", n, n))],
    "list_children": [((kind,), lambda c, n, k=kind: c.list_children(k, n, n)) for kind in ("Job", "Pod", "ConfigMap")],
    "list_labelled": [(("Pod",), lambda c, n: c.list_labelled("Pod", n, f"finetune.dev/network-test={n}"))],
    "list_profiles": [(("FineTuneProfile",), lambda c, n: c.list_profiles())],
    "list_all": [((kind,), lambda c, n, k=kind: everything(c.list_all(k, (n,)))) for kind in ("FineTuneJob", "Pod")],
    "list_names": [(("FineTuneJob",), lambda c, n: c.list_names((n,)))],
    "list_pages": [(("Job",), lambda c, n: everything(c.list_pages("Job", n)))],
    "watch": [(("Job",), lambda c, n: everything(c.watch("Job", n, n, 5.0)))],
    "create": [((kind,), lambda c, n, k=kind: c.create(manifest(k, n))) for kind in KINDS if KINDS[kind].namespaced],
    "replace": [((kind,), lambda c, n, k=kind: c.replace(manifest(k, n))) for kind in ("Lease", "Secret")],
    "delete": [((kind,), lambda c, n, k=kind: c.delete(k, n, n, n, n)) for kind in KINDS],
    "patch_status": [(("FineTuneJob",), lambda c, n: c.patch_status(n, n, n, {}, n))],
    "patch_profile_status": [(("FineTuneProfile",), lambda c, n: c.patch_profile_status(n, {}))],
    "patch_trainer_status": [(("FineTuneJob",), lambda c, n: c.patch_trainer_status(n, n, n, {}, n))],
    "list_workloads": [(("Workload",), lambda c, n: c.list_workloads(n, n))],
    "post_event": [(("Event",), lambda c, n: c.post_event({**manifest("Event", n), "lastTimestamp": ""}))],
    "token_review": [(("TokenReview",), lambda c, n: c.token_review(n, (n,)))],
    "authenticate": [(("TokenReview",), lambda c, n: c.authenticate(n))],
    "may": [(("SubjectAccessReview",), lambda c, n: c.may({"username": n}, {"name": n}))],
    "may_get": [(("SubjectAccessReview",), lambda c, n: c.may_get({"username": n}, n))],
    "get_pod": [(("Pod",), lambda c, n: c.get_pod(n, n))],
    "get_job": [(("FineTuneJob",), lambda c, n: c.get_job(n, n))],
}
PLAIN = {"close", "call", "ask", "stream"}
"""Take paths that others have built."""


def test_no_method_is_left_out() -> None:
    public = {name for name, _ in inspect.getmembers(KubeCluster, inspect.isfunction) if not name.startswith("_")}
    assert public - PLAIN == set(CALLS)


@pytest.mark.parametrize("method", CALLS)
async def test_no_name_leads_a_request_elsewhere(recorded: tuple[Recorder, KubeCluster], method: str) -> None:
    recorder, client = recorded
    for kinds, call in CALLS[method]:
        for name in ["ok", *ODD]:
            recorder.seen.clear()
            try:
                await call(client, name)
                assert recorder.seen
            except ApiError:
                if name == "ok":
                    raise
            for path, query in recorder.seen:
                assert belongs(path, kinds, name), f"{method}({name!r:.80}) asked for {path:.200}"
                assert all(key in KNOWN for key in parse_qs(query, keep_blank_values=True)), query[:200]
                for chosen in parse_qs(query).get("labelSelector", []):
                    assert chosen.count("=") == 1, chosen[:200]
                    assert not set(chosen) & set(",!() "), chosen[:200]


KNOWN = {"labelSelector", "limit", "continue", "fieldManager", "watch", "allowWatchBookmarks", "resourceVersion"}


def belongs(path: str, kinds: Allowed, name: str) -> bool:
    """Whether a server that unquotes before it routes takes the path for an object of these kinds, or their list."""
    parts = unquote(path, errors="strict").split("/")
    if any(part in ("", ".", "..") for part in parts[1:]) or "\\" in path or "%2f" in path.lower():
        return False
    for kind in kinds:
        api, plural, namespaced = KINDS.get(kind) or (f"/apis/{GROUP}/v1beta1", "workloads", True)
        prefixes = [[*api.split("/"), plural]]
        if namespaced:
            prefixes.append([*api.split("/"), "namespaces", name, plural])
        for prefix in prefixes:
            rest = parts[len(prefix) :]
            if parts[: len(prefix)] == prefix and rest in ([], [name], [name, "status"]):
                return True
    return False


@pytest.mark.parametrize(
    "version", ["", "v1", "../../api/v1", f"{GROUP}/..", f"{GROUP}/v1/x", "other/v1", f"{GROUP}/v1?a"]
)
async def test_an_odd_version_of_kueue_is_not_asked_for(recorded: tuple[Recorder, KubeCluster], version: str) -> None:
    recorder, client = recorded
    recorder.version = version
    with pytest.raises(ApiError, match="is no version of"):
        await client.list_workloads("ns", "uid")
    assert recorder.seen == []


@pytest.mark.parametrize("name", ["a b", "ü", "x.y", "UPPER", "a+b", "a?b#c", "😀"])
async def test_what_can_be_quoted_arrives_as_it_was(recorded: tuple[Recorder, KubeCluster], name: str) -> None:
    recorder, client = recorded
    await client.get("ConfigMap", name, name)
    assert unquote(recorder.seen[0][0]) == f"/api/v1/namespaces/{name}/configmaps/{name}"
