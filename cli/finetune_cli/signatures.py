"""The platform's signature of an artifact, checked with its public key."""

import base64
import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from pydantic import ValidationError

from finetune_api.manifest import MANIFEST_KEY
from finetune_api.signature import SIGNATURE_KEY, SignedStatement
from finetune_cli.errors import CliError


def check(signed: SignedStatement, key: Path) -> None:
    """Raises CliError where this key has not signed this statement."""
    public = _public_key(key)
    name = hashlib.sha256(public.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]
    if signed.signature.key_id != name:
        raise CliError(f"it is signed by the key {signed.signature.key_id}, and {key} is the key {name}")
    try:
        public.verify(base64.b64decode(signed.signature.value), signed.statement.payload())
    except InvalidSignature:
        raise CliError(
            f"the signature is not one of {key} over what it is said to be of: somebody changed it"
        ) from None


def check_folder(directory: Path, key: Path) -> SignedStatement:
    """The same of a folder that was fetched with its signature, and of its manifest."""
    try:
        signed = SignedStatement.model_validate_json((directory / SIGNATURE_KEY).read_bytes())
        manifest = (directory / MANIFEST_KEY).read_bytes()
    except OSError as error:
        raise CliError(f"{directory} was not fetched with a signature: {error.strerror}: {error.filename}") from error
    except ValidationError as error:
        raise CliError(f"{directory / SIGNATURE_KEY} is no signature of an artifact") from error
    check(signed, key)
    if hashlib.sha256(manifest).hexdigest() != signed.statement.manifest_sha256:
        raise CliError(f"the signature is of another {MANIFEST_KEY}: its SHA-256 differs")
    return signed


def _public_key(path: Path) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CliError(f"{path} cannot be read as a public key: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise CliError(f"{path} holds a key of another kind than Ed25519")
    return key
