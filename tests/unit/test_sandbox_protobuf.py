"""The protobuf bodies that kubectl sends, byte by byte."""

from __future__ import annotations

import pytest

from finetune_sandbox.errors import ApiError
from finetune_sandbox.protobuf import MAGIC, decode


def part(number: int, body: bytes | str | int) -> bytes:
    if isinstance(body, int):
        return bytes([number << 3]) + varint(body)
    raw = body.encode() if isinstance(body, str) else body
    return bytes([number << 3 | 2]) + varint(len(raw)) + raw


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def envelope(kind: str, *parts: bytes) -> bytes:
    return MAGIC + part(1, part(1, "v1") + part(2, kind)) + part(2, b"".join(parts)) + part(3, "") + part(4, "")


def test_a_secret() -> None:
    meta = part(1, "s") + part(3, "") + part(8, b"") + part(11, part(1, "a") + part(2, "b"))
    body = envelope(
        "Secret", part(1, meta), part(2, part(1, "k") + part(2, b"\x00\xff")), part(3, "Opaque"), part(5, 1)
    )
    assert decode(body) == {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s", "labels": {"a": "b"}},
        "data": {"k": "AP8="},
        "type": "Opaque",
        "immutable": True,
    }


def test_a_token_request() -> None:
    spec = part(1, "one") + part(1, "two") + part(4, 1200)
    assert decode(envelope("TokenRequest", part(2, spec), part(3, b"")))["spec"] == {
        "audiences": ["one", "two"],
        "expirationSeconds": 1200,
    }


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{}", 400),
        (envelope("Secret")[:-9], 400),
        (envelope("Job", part(1, b"")), 415),
        (envelope("Secret", part(9, "x")), 415),
        (MAGIC + b"\x0d", 415),
    ],
)
def test_what_cannot_be_read_is_refused(body: bytes, code: int) -> None:
    with pytest.raises(ApiError) as caught:
        decode(body)
    assert caught.value.code == code
