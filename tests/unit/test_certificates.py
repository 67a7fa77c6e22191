"""The certificates' Secret: made once, left alone while it is good, renewed in time, and trusted before it is shown."""

import base64
import copy
import datetime
import ssl
from typing import Any

import pytest
from cryptography import x509

from finetune_operator import tls
from finetune_operator.certificates import bundle, keep, main, renewed
from finetune_operator.cluster import ApiError

NOW = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
HOSTS = ("ft-webhook.system.svc", "ft-progress.system.svc")
DAY = datetime.timedelta(days=1)


class Stored:
    """What is stored, and the order of writes."""

    def __init__(self, webhook: bool = True) -> None:
        self.secret: dict[str, Any] | None = None
        client = {"service": {"name": "ft", "namespace": "system"}}
        webhooks = [{"name": name, "clientConfig": dict(client)} for name in ("jobs", "profiles")]
        self.webhook = {"kind": "ValidatingWebhookConfiguration", "metadata": {"name": "ft"}, "webhooks": webhooks}
        self.has_webhook = webhook
        self.writes: list[str] = []

    async def get(self, kind: str, namespace: str | None, name: str) -> dict[str, Any] | None:
        found = self.secret if kind == "Secret" else self.webhook if self.has_webhook else None
        return copy.deepcopy(found)

    async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        assert self.secret is None
        return await self.replace(manifest)

    async def replace(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self.writes.append(manifest["kind"])
        if manifest["kind"] == "Secret":
            self.secret = manifest
        else:
            self.webhook = manifest
        return manifest

    async def keep(self, now: datetime.datetime, hosts: tuple[str, ...] = HOSTS) -> list[str]:
        self.writes.clear()
        return await keep(self, "system", "tls", hosts, "ft", now)

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
    assert stored.writes == ["ValidatingWebhookConfiguration", "Secret"]
    assert stored.secret
    assert stored.secret["type"] == "kubernetes.io/tls"
    certificate = x509.load_pem_x509_certificate(stored.file("tls.crt"))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert tuple(names.get_values_for_type(x509.DNSName)) == HOSTS
    (authority,) = stored.trusted()
    certificate.verify_directly_issued_by(authority)
    assert await stored.keep(NOW + DAY) == []
    assert stored.writes == []


async def test_it_is_renewed_by_the_same_authority() -> None:
    stored = Stored()
    await stored.keep(NOW)
    first, authority = stored.file("tls.crt"), stored.file("ca.crt")
    assert await stored.keep(NOW + tls.LIFETIME - tls.RENEW_BEFORE + DAY) == ["Secret system/tls"]
    assert stored.file("tls.crt") != first
    assert stored.file("ca.crt") == authority
    assert await stored.keep(NOW + tls.LIFETIME - tls.RENEW_BEFORE + DAY, hosts=("other.svc",)) == ["Secret system/tls"]


async def test_a_new_authority_is_trusted_beside_the_old_one() -> None:
    stored = Stored()
    await stored.keep(NOW)
    (old,) = stored.trusted()
    later = NOW + tls.CA_LIFETIME - tls.LIFETIME + DAY
    await stored.keep(later)
    assert stored.writes == ["ValidatingWebhookConfiguration", "Secret"]
    new, kept = stored.trusted()
    assert kept == old != new
    await stored.keep(later + tls.LIFETIME)
    assert stored.trusted() == [new]


async def test_what_a_helm_upgrade_takes_out_of_the_webhook_is_put_back() -> None:
    stored = Stored()
    await stored.keep(NOW)
    webhooks: Any = stored.webhook["webhooks"]
    del webhooks[1]["clientConfig"]["caBundle"]
    assert await stored.keep(NOW) == ["ValidatingWebhookConfiguration ft"]
    assert len(stored.trusted()) == 1


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
    assert await stored.keep(NOW + tls.LIFETIME) == []
    assert stored.secret["data"] == before


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


def test_arguments_are_checked() -> None:
    with pytest.raises(SystemExit):
        main(["--secret", "name", "--host", "a"])
