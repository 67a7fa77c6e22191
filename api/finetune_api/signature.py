"""What the platform signs of an artifact: that the operator saw this job publish this manifest, and by which key.

The key is the operator's: no pod of a job, and so no tenant, holds it. The signature is Ed25519 (RFC 8032) over
`Statement.payload()`; anybody who has the public key can check it, without the cluster.
"""

import json
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from finetune_api.model import ApiModel, S3Uri, Sha256, ShortText

PREFIX = b"finetune.dev/manifest-signature/v1\n"
"""So that a signature of ours is none of anything else that the key may have signed."""
SIGNATURE_KEY = "signature.json"
"""Beside manifest.json where an artifact was fetched; no part of what the manifest names."""


class Signature(ApiModel):
    key_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
    """The first 16 hexadecimal digits of the SHA-256 of the public key's 32 bytes."""
    value: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{86}==$")]
    """Base64 of 64 bytes."""


class Statement(ApiModel):
    """What is signed."""

    version: Literal["v1"] = "v1"
    namespace: ShortText
    job: ShortText
    job_uid: ShortText
    uri: S3Uri
    manifest_sha256: Annotated[Sha256, Field(alias="manifestSHA256")]

    def payload(self) -> bytes:
        return PREFIX + json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode()


class SignedStatement(ApiModel):
    """The file `signature.json`."""

    statement: Statement
    signature: Signature
