"""The operator's key for what jobs publish: read once, when it starts."""

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from finetune_api.signature import Signature

Sign = Callable[[bytes], Signature]
"""The same bytes give the same signature."""


class BadKey(Exception):
    """The file holds no key that can be used; the text says why."""


def signer(path: Path) -> Sign:
    """Of a PEM file with an Ed25519 private key (PKCS #8, without a password). Raises BadKey."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise BadKey(f"{path} cannot be read as a private key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BadKey(f"{path} holds a key of another kind; `openssl genpkey -algorithm ed25519` makes one")
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    name = hashlib.sha256(public).hexdigest()[:16]

    def sign(payload: bytes) -> Signature:
        return Signature(key_id=name, value=base64.b64encode(key.sign(payload)).decode())

    return sign
