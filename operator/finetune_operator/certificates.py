"""`python -m finetune_operator.certificates`: keeps what the operator's servers are known by, in Secrets.

That is their certificate and the webhook's unguessable paths. The chart runs it as a Job of its own when it is
installed and upgraded, and then by the hour. It alone may touch those Secrets and the webhook's configuration: the
operator has no right on either.
"""

import argparse
import asyncio
import base64
import copy
import datetime
import logging
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from finetune_operator import tls, webhook_paths
from finetune_operator.cluster import ApiError, KubeCluster, load_configuration
from finetune_operator.logformat import PlainFormatter

logger = logging.getLogger("finetune_operator.certificates")
Object = dict[str, Any]
PATHS_FILE = "paths.json"
FILES = ("tls.crt", "tls.key", "ca.crt", "ca.key")
TRIES = 5
MAX_AUTHORITIES = 4


class Secrets(Protocol):
    """What of a cluster is needed; methods raise ApiError."""

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None: ...

    async def create(self, manifest: Object) -> Object: ...

    async def replace(self, manifest: Object) -> Object: ...


def renewed(data: dict[str, bytes], hosts: Sequence[str], now: datetime.datetime) -> dict[str, bytes]:
    """The Secret's files as they should be: the same ones while the certificate is good. Raises tls.TlsError."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in FILES:
            if file in data:
                (folder / file).write_bytes(data[file])
        tls.ensure(folder, hosts, now)
        return data | {file: (folder / file).read_bytes() for file in FILES if (folder / file).exists()}


def bundle(current: bytes, known: bytes, now: datetime.datetime) -> bytes:
    """The authorities that an API server is to trust: the current one, and those before it while servers may still use
    what they signed."""
    found = x509.load_pem_x509_certificates(current)
    try:
        before = x509.load_pem_x509_certificates(known) if known.strip() else []
    except ValueError:
        before = []
    found += [one for one in before if one not in found and now < one.not_valid_after_utc]
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in found[:MAX_AUTHORITIES])


@dataclass(frozen=True)
class Kept:
    """The names of what is kept; None: that is somebody else's, or does not exist."""

    namespace: str
    certificate: str | None
    """The Secret of the certificate, which is for `hosts`."""
    hosts: Sequence[str]
    paths: str | None
    """The Secret of the webhook's paths."""
    webhook: str | None
    """The ValidatingWebhookConfiguration."""


async def keep(cluster: Secrets, kept: Kept, now: datetime.datetime) -> list[str]:
    """What was changed. Raises ApiError, tls.TlsError; ApiError's status is 409 where somebody else wrote meanwhile.

    The webhook trusts a new authority before any server can show a certificate of it, and servers answer to a new path
    before the webhook has it.
    """
    configuration = await _configuration(cluster, kept.webhook) if kept.webhook else None
    authority = b""
    changed: list[str] = []
    if kept.certificate:
        found = await cluster.get("Secret", kept.namespace, kept.certificate)
        certificate = renewed(_data(found), kept.hosts, now)
        authority = certificate["ca.crt"]
    path = await _keep_paths(cluster, kept, configuration, now, changed) if kept.paths and configuration else None
    if configuration and _configure(configuration, authority, path, now):
        await cluster.replace(configuration)
        changed.append(f"ValidatingWebhookConfiguration {kept.webhook}")
    if kept.certificate and await _store(cluster, kept.namespace, kept.certificate, found, certificate):
        changed.append(f"Secret {kept.namespace}/{kept.certificate}")
    return changed


async def _configuration(cluster: Secrets, name: str) -> Object:
    configuration = await cluster.get("ValidatingWebhookConfiguration", None, name)
    if configuration is None:
        raise ApiError(404, "NotFound", f"ValidatingWebhookConfiguration {name} does not exist")
    return configuration


async def _keep_paths(
    cluster: Secrets, kept: Kept, configuration: Object, now: datetime.datetime, changed: list[str]
) -> str:
    """The path that the webhook is to have: the operator's pods answer to it by now, or do not run yet."""
    assert kept.paths
    found = await cluster.get("Secret", kept.namespace, kept.paths)
    clients = [webhook["clientConfig"] for webhook in configuration.get("webhooks") or ()]
    configured = next((client.get("service", {}).get("path") for client in clients), None)
    try:
        known = webhook_paths.parse(_data(found).get(PATHS_FILE, b"[]"))
    except webhook_paths.BadPaths:
        known = []
    entries, path = webhook_paths.rotated(known, configured, now, _new_path)
    if await _store(cluster, kept.namespace, kept.paths, found, {PATHS_FILE: webhook_paths.render(entries)}):
        changed.append(f"Secret {kept.namespace}/{kept.paths}")
    return path


def _new_path() -> str:
    return webhook_paths.PREFIX + secrets.token_hex(32)


def _data(secret: Object | None) -> dict[str, bytes]:
    return {key: base64.b64decode(value) for key, value in ((secret or {}).get("data") or {}).items()}


async def _store(cluster: Secrets, namespace: str, name: str, found: Object | None, data: dict[str, bytes]) -> bool:
    """Whether something had to be written."""
    if data == _data(found):
        return False
    encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
    if found is None:
        meta = {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/part-of": "finetune-operator"}}
        kind = "kubernetes.io/tls" if "tls.crt" in data else "Opaque"
        await cluster.create({"apiVersion": "v1", "kind": "Secret", "metadata": meta, "type": kind, "data": encoded})
    else:
        await cluster.replace(found | {"apiVersion": "v1", "kind": "Secret", "data": encoded})
    return True


def _configure(configuration: Object, authority: bytes, path: str | None, now: datetime.datetime) -> bool:
    """Puts the authority and the path into the configuration. Returns whether that changes it."""
    before = copy.deepcopy(configuration)
    for webhook in configuration.get("webhooks") or ():
        client = webhook["clientConfig"]
        if authority:
            trusted = bundle(authority, base64.b64decode(client.get("caBundle") or ""), now)
            client["caBundle"] = base64.b64encode(trusted).decode()
        if path and "service" in client:
            client["service"]["path"] = path
    return configuration != before


async def run(kept: Kept) -> None:
    """Raises ApiError, tls.TlsError."""
    cluster = KubeCluster(await load_configuration())
    try:
        for attempt in range(1, TRIES + 1):
            try:
                changed = await keep(cluster, kept, datetime.datetime.now(datetime.UTC))
            except ApiError as error:
                # Another run of this program, or a webhook that the same release is still creating.
                if error.status not in (404, 409) or attempt == TRIES:
                    raise
                logger.info("tried again: %s", error)
                await asyncio.sleep(attempt)
            else:
                logger.info("changed: %s", ", ".join(changed) or "nothing")
                return
    finally:
        await cluster.close()


def arguments_of(given: Sequence[str] | None) -> Kept:
    parser = argparse.ArgumentParser(prog="python -m finetune_operator.certificates", description=__doc__)
    parser.add_argument("--namespace", required=True, help="the namespace of the Secrets")
    parser.add_argument("--certificate", metavar="SECRET", help="the Secret of the certificate")
    parser.add_argument("--host", action="append", default=[], help="a name that clients use; give all of them")
    parser.add_argument("--webhook", help="the ValidatingWebhookConfiguration")
    parser.add_argument("--paths", metavar="SECRET", help="the Secret of the webhook's paths")
    found = parser.parse_args(given)
    if found.certificate and not found.host:
        parser.error("--certificate: found no --host; give the names that the certificate is for")
    if found.paths and not found.webhook:
        parser.error("--paths: found no --webhook; name the configuration that is to have the path")
    if not found.certificate and not found.paths:
        parser.error("nothing to keep: give --certificate, --paths, or both")
    return Kept(found.namespace, found.certificate, found.host, found.paths, found.webhook)


def main(arguments: Sequence[str] | None = None) -> None:
    kept = arguments_of(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        asyncio.run(run(kept))
    except (ApiError, tls.TlsError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
