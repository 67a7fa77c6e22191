"""Signed service-account tokens: JSON web tokens that this server alone makes and believes."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

ISSUER = "https://kubernetes.default.svc"


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class TokenSigner:
    """Signs and verifies JSON web tokens (ES256) with a key of its own."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())

    def sign(self, claims: dict[str, Any]) -> str:
        head = _encode(json.dumps({"alg": "ES256", "typ": "JWT"}).encode())
        body = f"{head}.{_encode(json.dumps(claims).encode())}"
        r, s = decode_dss_signature(self._key.sign(body.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{body}.{_encode(r.to_bytes(32) + s.to_bytes(32))}"

    def verify(self, token: str) -> dict[str, Any] | None:
        """The claims of a token that this signer made and that is valid now, else None."""
        try:
            body, _, signature = token.rpartition(".")
            raw = _decode(signature)
            pair = encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
            self._key.public_key().verify(pair, body.encode(), ec.ECDSA(hashes.SHA256()))
            claims: dict[str, Any] = json.loads(_decode(body.partition(".")[2]))
        except (InvalidSignature, ValueError):
            return None
        if len(raw) != 64 or not claims["nbf"] - 10 <= time.time() < claims["exp"]:
            return None
        return claims
