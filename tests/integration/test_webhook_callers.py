"""The webhook answers the API server alone: nobody else learns anything from it, or makes it ask anything."""

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from finetune_operator.admission import BODIES, MAX_BODY, AdmissionOptions, AdmissionServer
from finetune_operator.metrics import Metrics
from finetune_operator.webhook_callers import Callers, Unrecognisable
from finetune_operator.webhook_paths import PREFIX, Entry, render
from support.admitting import PATH, paths_file
from support.client_certificates import ClientAuthority
from support.manifests import job_manifest
from support.world import make_profile

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
OTHER_PATH = PREFIX + "q" * 43


@dataclass
class Asked:
    """A cluster that keeps what it was asked, and knows one profile."""

    asked: list[Any] = field(default_factory=list)
    broken: bool = False

    async def may(self, user: Mapping[str, Any], attributes: dict[str, Any]) -> bool:
        self.asked.append(attributes)
        return True

    async def choice(self, wanted: str | None) -> Sequence[Mapping[str, Any]]:
        self.asked.append(wanted)
        if self.broken:
            raise OverflowError("int too large to convert to float")
        return [make_profile("small", default=True)]


@dataclass
class Webhook:
    server: AdmissionServer
    cluster: Asked
    metrics: Metrics
    folder: Path

    async def connect(self, certificate: Path | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        trust = ssl.create_default_context(cafile=str(self.folder / "tls" / "ca.crt"))
        if certificate:
            trust.load_cert_chain(certificate)
        return await asyncio.open_connection("127.0.0.1", self.server.port, ssl=trust)

    async def send(self, data: bytes, certificate: Path | None = None) -> bytes:
        """All that comes back until the server hangs up, or has answered a kept connection's request."""
        reader, writer = await self.connect(certificate)
        writer.write(data)
        try:
            return await answer_of(reader)
        finally:
            writer.close()

    async def review(self, body: Any, path: str = PATH, certificate: Path | None = None) -> tuple[int, str]:
        answer = await self.send(post(json.dumps(body).encode(), path), certificate)
        head, _, text = answer.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), text.decode()


async def answer_of(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(20):
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        assert length
        return head + await reader.readexactly(int(length[1]))


def post(body: bytes, path: str = PATH, method: str = "POST") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def review_of(job: dict[str, Any], **members: Any) -> dict[str, Any]:
    request = {
        "uid": "u",
        "kind": {"kind": "FineTuneJob"},
        "operation": "CREATE",
        "namespace": "team-a",
        "name": "j",
        "userInfo": {"username": "alice", "groups": ["system:authenticated"]},
        "object": job,
    }
    return {"apiVersion": "admission.k8s.io/v1", "request": request | members}


GOOD = review_of(job_manifest("j", "team-a", credentials={"secretRef": {"name": "keys"}}))


@asynccontextmanager
async def serving(folder: Path, **options: Any) -> AsyncIterator[Webhook]:
    cluster, metrics = Asked(), Metrics()
    tls = folder / "tls"
    options = {"paths_file": paths_file(tls)} | options
    given = AdmissionOptions(tls, ("127.0.0.1",), host="127.0.0.1", port=0, **options)
    server = AdmissionServer(cluster, cluster, given, metrics)
    await server.start()
    try:
        yield Webhook(server, cluster, metrics, folder)
    finally:
        await server.stop()


@pytest.fixture
async def webhook(tmp_path: Path) -> AsyncIterator[Webhook]:
    async with serving(tmp_path) as made:
        yield made


STRANGE = ["/", "/validate", "/validate/", PATH[:-1], PATH + "x", PATH + "/", PATH.upper(), OTHER_PATH, "/metrics"]


async def test_strangers_all_get_the_same_answer_and_make_it_ask_nothing(webhook: Webhook) -> None:
    answers = set()
    for path in STRANGE:
        for method, body in (("POST", json.dumps(GOOD).encode()), ("GET", b""), ("POST", b"no JSON"), ("TRACE", b"")):
            answers.add(re.sub(rb"Date: [^\r]*", b"", await webhook.send(post(body, path, method))))
    (answer,) = answers
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert webhook.cluster.asked == []
    status, text = await webhook.review(GOOD)
    assert (status, json.loads(text)["response"]["allowed"]) == (200, True)
    assert webhook.cluster.asked


async def test_a_strangers_body_is_not_waited_for(webhook: Webhook) -> None:
    head = f"POST /validate HTTP/1.1\r\nHost: a\r\nContent-Length: {MAX_BODY}\r\n\r\n".encode()
    assert (await webhook.send(head)).startswith(b"HTTP/1.1 404 ")


async def test_a_timeout_in_the_query_is_the_api_servers(webhook: Webhook) -> None:
    assert (await webhook.review(GOOD, f"{PATH}?timeout=10s"))[0] == 200


async def test_a_new_path_is_known_as_soon_as_its_file_shows_it(webhook: Webhook, tmp_path: Path) -> None:
    file, now = paths_file(tmp_path / "tls"), datetime.now(UTC)

    def replace(content: bytes) -> None:
        new = tmp_path / "new"
        new.write_bytes(content)
        new.replace(file)

    replace(render([Entry(PATH, now), Entry(OTHER_PATH, now)]))
    assert [(await webhook.review(GOOD, path))[0] for path in (PATH, OTHER_PATH)] == [200, 200]
    replace(render([Entry(OTHER_PATH, now)]))
    assert [(await webhook.review(GOOD, path))[0] for path in (PATH, OTHER_PATH)] == [404, 200]
    # What was known holds where the file is broken, or away.
    replace(b"[]")
    assert (await webhook.review(GOOD, OTHER_PATH))[0] == 200
    file.unlink()
    assert [(await webhook.review(GOOD, path))[0] for path in (PATH, OTHER_PATH)] == [404, 200]


async def test_the_api_server_keeps_its_connection_and_proves_itself_each_time(webhook: Webhook) -> None:
    reader, writer = await webhook.connect()
    body = json.dumps(GOOD).encode()
    for _ in range(3):
        writer.write(post(body))
        assert (await answer_of(reader)).startswith(b"HTTP/1.1 200 ")
    asked = len(webhook.cluster.asked)
    # A request behind another one is its own: what it cannot prove, it does not get.
    writer.write(post(body) + post(body, "/validate") + post(body))
    assert (await answer_of(reader)).startswith(b"HTTP/1.1 200 ")
    assert (await answer_of(reader)).startswith(b"HTTP/1.1 404 ")
    assert await reader.read() == b""
    assert len(webhook.cluster.asked) == asked + asked / 3
    writer.close()


async def test_a_client_certificate_is_demanded_where_there_is_an_authority_of_them(tmp_path: Path) -> None:
    ours, theirs = ClientAuthority.make(tmp_path, "ours"), ClientAuthority.make(tmp_path, "theirs")
    async with serving(
        tmp_path, client_ca=ours.certificate, client_names=("kube-apiserver",), paths_file=None
    ) as webhook:
        for certificate in (None, theirs.issue("kube-apiserver")):
            with pytest.raises((OSError, asyncio.IncompleteReadError)):
                await webhook.review(GOOD, "/validate", certificate)
        status, _ = await webhook.review(GOOD, "/validate", ours.issue("somebody"))
        assert (status, webhook.cluster.asked) == (404, [])
        status, _ = await webhook.review(GOOD, "/validate", ours.issue("kube-apiserver"))
        assert status == 200


async def test_with_both_a_caller_needs_both(tmp_path: Path) -> None:
    ours = ClientAuthority.make(tmp_path, "ours")
    async with serving(tmp_path, client_ca=ours.certificate) as webhook:
        certificate = ours.issue("anybody")
        assert (await webhook.review(GOOD, "/validate", certificate))[0] == 404
        assert (await webhook.review(GOOD, PATH, certificate))[0] == 200
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            await webhook.review(GOOD, PATH)


def test_what_tells_nobody_apart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unrecognisable, match="needs a file with its paths"):
        Callers(None)
    with pytest.raises(Unrecognisable, match=r"absent\.json: the webhook's paths cannot be read: .*No such file"):
        Callers(tmp_path / "absent.json")
    (tmp_path / "odd.json").write_text("[]")
    with pytest.raises(Unrecognisable, match=r"odd\.json: the webhook's paths cannot be read: it must have at least"):
        Callers(tmp_path / "odd.json")


ODD_NAMES = [
    "../../../../api/v1/secrets",
    "small/../../x",
    "small?watch=1",
    "small#x",
    "small%2F..",
    "SMALL",
    "small\n",
    "\0",
    "é",
    "a" * 254,
    "-",
    ".",
    "..",
    {"a": 1},
    ["small"],
    7,
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=[str(number) for number in range(len(ODD_NAMES))])
async def test_nothing_is_looked_up_by_a_name_that_is_none(webhook: Webhook, name: Any) -> None:
    job = job_manifest("j", "team-a")
    job["spec"]["profile"] = name
    # Also in an update of a job that is as it was: nothing that it makes wrong is refused.
    bodies = [review_of(job), review_of(job, operation="UPDATE", oldObject=job)]
    secret = job_manifest("j", "team-a", credentials={"secretRef": {"name": name}})
    bodies += [review_of(secret), review_of(secret, operation="UPDATE", oldObject=job)]
    bodies += [review_of(job_manifest("j", "team-a"), namespace=name)]
    for body in bodies:
        status, text = await webhook.review(body)
        assert status in (200, 400), text
    assert all(isinstance(asked, dict) or asked in (None, "small") for asked in webhook.cluster.asked)
    assert name not in [asked.get("name") for asked in webhook.cluster.asked if isinstance(asked, dict)]
    assert name not in [asked.get("namespace") for asked in webhook.cluster.asked if isinstance(asked, dict)]


@pytest.mark.parametrize(
    "user",
    [None, {}, [], {"username": 7}, {"username": "a", "groups": "x"}, {"username": "a", "extra": {"k": "v"}}],
)
async def test_nothing_is_asked_about_a_user_who_is_none(webhook: Webhook, user: Any) -> None:
    status, text = await webhook.review(GOOD | {"request": GOOD["request"] | {"userInfo": user}})
    assert status == 400
    assert "userInfo" in text
    assert webhook.cluster.asked == []


async def test_large_bodies_that_do_not_end_keep_no_small_review_waiting(webhook: Webhook) -> None:
    """By somebody who knows the path: their bytes are claimed before they are read, and are no more than the budget."""
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: {MAX_BODY}\r\n\r\n".encode()
    stalled = []
    for _ in range(40):
        reader, writer = await webhook.connect()
        writer.write(head + b"x" * 100_000)
        stalled.append((reader, writer))
    for _ in range(20):
        # As long as a stalled body may take, and less than a review: nobody waits for them.
        async with asyncio.timeout(5):
            assert (await webhook.review(GOOD))[0] == 200
        assert webhook.server._bodies.used <= BODIES
    # Whoever does not send what was announced is told so.
    statuses = set()
    for reader, writer in stalled[:3]:
        with contextlib.suppress(asyncio.IncompleteReadError):
            statuses.add((await answer_of(reader)).split(b" ", 2)[1])
        writer.close()
    for _, writer in stalled[3:]:
        writer.transport.abort()
    assert statuses <= {b"408", b"503"}


async def test_a_mistake_of_ours_is_told_with_the_jobs_name_and_ends_nothing(
    webhook: Webhook, caplog: pytest.LogCaptureFixture
) -> None:
    webhook.cluster.broken = True
    status, text = await webhook.review(GOOD)
    assert (status, "OverflowError" in text) == (500, False)
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert (record.namespace, record.job) == ("team-a", "j")  # type: ignore[attr-defined]
    webhook.cluster.broken = False
    assert (await webhook.review(GOOD))[0] == 200
    told = generate_latest(webhook.metrics.registry)
    assert b'failed_requests_total{server="webhook"} 1.0' in told
    assert b'admission_reviews_total{result="failed"} 1.0' in told
