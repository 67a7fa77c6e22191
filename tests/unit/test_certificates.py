"""The certificates' Secret: made once, left alone while it is good, renewed in time, and trusted before it is shown."""

import base64
import copy
import dataclasses
import datetime
import re
import ssl
from typing import Any

import pytest
from cryptography import x509

from finetune_operator import tls
from finetune_operator.certificates import Kept, bundle, keep, main, renewed
from finetune_operator.cluster import ApiError
from finetune_operator.webhook_paths import parse

NOW = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
HOSTS = ("ft-webhook.system.svc", "ft-progress.system.svc")
DAY = datetime.timedelta(days=1)


class Stored:
    """What is stored, and the order of writes."""

    def __init__(self, webhook: bool = True, certificate: bool = True) -> None:
        self.secrets: dict[str, dict[str, Any]] = {}
        self.kept = Kept("system", "tls" if certificate else None, HOSTS, "paths", "ft")
        client = {"service": {"name": "ft", "namespace": "system"}}
        webhooks = [{"name": name, "clientConfig": copy.deepcopy(client)} for name in ("jobs", "profiles")]
        self.webhook = {"kind": "ValidatingWebhookConfiguration", "metadata": {"name": "ft"}, "webhooks": webhooks}
        self.has_webhook = webhook
        self.writes: list[str] = []

    async def get(self, kind: str, namespace: str | None, name: str) -> dict[str, Any] | None:
        found = self.secrets.get(name) if kind == "Secret" else self.webhook if self.has_webhook else None
        return copy.deepcopy(found)

    async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        assert manifest["metadata"]["name"] not in self.secrets
        return await self.replace(manifest)

    async def replace(self, manifest: dict[str, Any]) -> dict[str, Any]:
        if manifest["kind"] == "Secret":
            self.writes.append(manifest["metadata"]["name"])
            self.secrets[manifest["metadata"]["name"]] = manifest
        else:
            self.writes.append("webhook")
            self.webhook = manifest
        return manifest

    async def keep(self, now: datetime.datetime, hosts: tuple[str, ...] = HOSTS) -> list[str]:
        self.writes.clear()
        return await keep(self, dataclasses.replace(self.kept, hosts=hosts), now)

    @property
    def secret(self) -> dict[str, Any] | None:
        return self.secrets.get("tls")

    def paths(self) -> list[str]:
        return [e.path for e in parse(base64.b64decode(self.secrets["paths"]["data"]["paths.json"]))]

    def used(self) -> set[str]:
        return {webhook["clientConfig"]["service"].get("path") for webhook in self.webhook["webhooks"]}  # type: ignore[index]

    def file(self, name: str) -> bytes:
        assert self.secret
        return base64.b64decode(self.secret["data"][name])

    def trusted(self) -> list[x509.Certificate]:
        texts = {webhook["clientConfig"]["caBundle"] for webhook in self.webhook["webhooks"]}  # type: ignore[index]
        (text,) = texts
        return x509.load_pem_x509_certificates(base64.b64decode(text))


async def test_it_is_made_once_and_trusted_first() -> None:
    stored = Stored()
    await stored.keep(NOW)
    assert stored.writes == ["paths", "webhook", "tls"]
    assert stored.secret
    assert stored.secret["type"] == "kubernetes.io/tls"
    certificate = x509.load_pem_x509_certificate(stored.file("tls.crt"))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert tuple(names.get_values_for_type(x509.DNSName)) == HOSTS
    (authority,) = stored.trusted()
    certificate.verify_directly_issued_by(authority)
    assert await stored.keep(NOW + datetime.timedelta(minutes=5)) == []
    assert stored.writes == []


async def test_it_is_renewed_by_the_same_authority() -> None:
    stored = Stored()
    await stored.keep(NOW)
    first, authority = stored.file("tls.crt"), stored.file("ca.crt")
    assert "Secret system/tls" in await stored.keep(NOW + tls.LIFETIME - tls.RENEW_BEFORE + DAY)
    assert stored.file("tls.crt") != first
    assert stored.file("ca.crt") == authority
    assert "Secret system/tls" in await stored.keep(NOW + tls.LIFETIME - tls.RENEW_BEFORE + DAY, hosts=("other.svc",))


async def test_a_new_authority_is_trusted_beside_the_old_one() -> None:
    stored = Stored()
    await stored.keep(NOW)
    (old,) = stored.trusted()
    later = NOW + tls.CA_LIFETIME - tls.LIFETIME + DAY
    await stored.keep(later)
    assert stored.writes == ["paths", "webhook", "tls"]
    new, kept = stored.trusted()
    assert kept == old != new
    await stored.keep(later + tls.LIFETIME)
    assert stored.trusted() == [new]


async def test_what_a_helm_upgrade_takes_out_of_the_webhook_is_put_back() -> None:
    stored = Stored()
    await stored.keep(NOW)
    webhooks: Any = stored.webhook["webhooks"]
    del webhooks[1]["clientConfig"]["caBundle"]
    for webhook in webhooks:
        del webhook["clientConfig"]["service"]["path"]
    assert await stored.keep(NOW) == ["ValidatingWebhookConfiguration ft"]
    assert len(stored.trusted()) == 1
    assert stored.used() == set(stored.paths())


async def test_a_webhook_that_is_not_there_yet_is_waited_for() -> None:
    stored = Stored(webhook=False)
    with pytest.raises(ApiError) as caught:
        await stored.keep(NOW)
    assert caught.value.status == 404
    assert stored.writes == []


async def test_somebody_elses_certificate_is_left_alone() -> None:
    stored = Stored()
    await stored.keep(NOW)
    assert stored.secret
    del stored.secret["data"]["ca.key"]
    before = dict(stored.secret["data"])
    assert "Secret system/tls" not in await stored.keep(NOW + tls.LIFETIME)
    assert stored.secret["data"] == before


async def test_the_webhooks_path_is_known_to_pods_before_the_api_server_uses_it() -> None:
    stored = Stored()
    await stored.keep(NOW)
    (first,) = stored.paths()
    assert stored.used() == {first}
    assert re.fullmatch("/validate/[a-z0-9]{64}", first), "as API servers want it, and nobody guesses it"
    assert stored.secrets["paths"]["type"] == "Opaque"
    await stored.keep(NOW + DAY)
    assert stored.writes == ["paths"]
    assert stored.used() == {first}
    _, second = stored.paths()
    await stored.keep(NOW + 2 * DAY)
    assert stored.used() == {second}
    await stored.keep(NOW + 3 * DAY)
    assert first not in stored.paths()


async def test_where_the_certificate_is_somebody_elses_the_path_is_kept_all_the_same() -> None:
    stored = Stored(certificate=False)
    await stored.keep(NOW)
    assert stored.writes == ["paths", "webhook"]
    assert stored.used() == set(stored.paths())
    assert all("caBundle" not in webhook["clientConfig"] for webhook in stored.webhook["webhooks"])  # type: ignore[index]


def test_what_cannot_be_used_is_said() -> None:
    with pytest.raises(tls.TlsError, match=r"ca\.crt: not found"):
        renewed({"tls.crt": b"x", "tls.key": b"y"}, HOSTS, NOW)


def test_a_bundle_is_never_without_end() -> None:
    known = b""
    for _ in range(8):
        current = renewed({}, HOSTS, NOW)["ca.crt"]
        known = bundle(current, known, NOW)
    assert len(x509.load_pem_x509_certificates(known)) == 4
    assert bundle(current, b"no PEM", NOW) == current
    ssl.create_default_context(cadata=known.decode())


@pytest.mark.parametrize(
    "given",
    [["--certificate", "tls"], ["--paths", "paths"], [], ["--certificate", "tls", "--host", "a", "--paths", "p"]],
)
def test_arguments_are_checked(given: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--namespace", "system", *given])
