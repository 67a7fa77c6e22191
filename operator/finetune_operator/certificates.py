"""`python -m finetune_operator.certificates`: keeps the certificate of the operator's servers in a Secret.

The chart runs it as a Job of its own when it is installed and upgraded, and once a day. It alone may touch that Secret
and the webhook's caBundle: the operator has no right on either.
"""

import argparse
import asyncio
import base64
import datetime
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from finetune_operator import tls
from finetune_operator.cluster import ApiError, KubeCluster, load_configuration
from finetune_operator.logformat import PlainFormatter

logger = logging.getLogger("finetune_operator.certificates")
Object = dict[str, Any]
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


async def keep(
    cluster: Secrets, namespace: str, secret: str, hosts: Sequence[str], webhook: str | None, now: datetime.datetime
) -> list[str]:
    """What was changed. Raises ApiError, tls.TlsError; ApiError's status is 409 where somebody else wrote meanwhile.

    The webhook trusts a new authority before any server can show a certificate of it.
    """
    found = await cluster.get("Secret", namespace, secret)
    data = {key: base64.b64decode(value) for key, value in ((found or {}).get("data") or {}).items()}
    wanted = renewed(data, hosts, now)
    changed = []
    if webhook is not None and await _trust(cluster, webhook, wanted["ca.crt"], now):
        changed.append(f"ValidatingWebhookConfiguration {webhook}")
    if wanted != data:
        encoded = {key: base64.b64encode(value).decode() for key, value in wanted.items()}
        if found is None:
            meta = {
                "name": secret,
                "namespace": namespace,
                "labels": {"app.kubernetes.io/part-of": "finetune-operator"},
            }
            made = {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "type": "kubernetes.io/tls"}
            await cluster.create(made | {"data": encoded})
        else:
            await cluster.replace(found | {"apiVersion": "v1", "kind": "Secret", "data": encoded})
        changed.append(f"Secret {namespace}/{secret}")
    return changed


async def _trust(cluster: Secrets, name: str, ca: bytes, now: datetime.datetime) -> bool:
    configuration = await cluster.get("ValidatingWebhookConfiguration", None, name)
    if configuration is None:
        raise ApiError(404, "NotFound", f"ValidatingWebhookConfiguration {name} does not exist")
    changed = False
    for webhook in configuration.get("webhooks") or ():
        client = webhook["clientConfig"]
        text = base64.b64encode(bundle(ca, base64.b64decode(client.get("caBundle") or ""), now)).decode()
        changed |= client.get("caBundle") != text
        client["caBundle"] = text
    if changed:
        await cluster.replace(configuration)
    return changed


async def run(namespace: str, secret: str, hosts: Sequence[str], webhook: str | None) -> None:
    """Raises ApiError, tls.TlsError."""
    cluster = KubeCluster(await load_configuration())
    try:
        for attempt in range(1, TRIES + 1):
            try:
                now = datetime.datetime.now(datetime.UTC)
                changed = await keep(cluster, namespace, secret, hosts, webhook, now)
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m finetune_operator.certificates", description=__doc__)
    parser.add_argument("--secret", required=True, metavar="NAMESPACE/NAME")
    parser.add_argument("--host", required=True, action="append", help="a name that clients use; give all of them")
    parser.add_argument("--webhook", help="the ValidatingWebhookConfiguration that is to trust the authority")
    given = parser.parse_args(arguments)
    namespace, _, name = given.secret.partition("/")
    if not namespace or not name:
        parser.error(f"--secret: found {given.secret!r}; it must be NAMESPACE/NAME")
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        asyncio.run(run(namespace, name, given.host, given.webhook))
    except (ApiError, tls.TlsError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
