"""The platform's signature of what a job publishes: who makes it, what it is of, and who believes it."""

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from finetune_api.signature import Signature, SignedStatement, Statement
from finetune_cli import __main__ as entry
from finetune_cli import signatures
from finetune_cli.errors import CliError
from finetune_operator.manifests import Context
from finetune_operator.signing import BadKey, signer
from support.world import CONTEXT, RESULT, World, make_job, started

STATEMENT = Statement(
    namespace="team-a", job="bot", job_uid="u", uri="s3://adapters/team-a/bot/x/", manifest_sha256="a" * 64
)


def write_key(folder: Path, name: str, key: Any = None) -> tuple[Path, Path]:
    """A private and a public key, as openssl writes them."""
    key = key or Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_what_was_signed_is_believed_and_nothing_else(tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "platform")
    signature = signer(private)(STATEMENT.payload())
    signatures.check(SignedStatement(statement=STATEMENT, signature=signature), public)
    for change in ({"job": "other"}, {"namespace": "b"}, {"uri": "s3://evil/x/"}, {"manifest_sha256": "b" * 64}):
        changed = SignedStatement(statement=STATEMENT.model_copy(update=change), signature=signature)
        with pytest.raises(CliError, match="somebody changed it"):
            signatures.check(changed, public)


def test_another_key_is_told_from_ours(tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "platform")
    other, _ = write_key(tmp_path, "other")
    signed = SignedStatement(statement=STATEMENT, signature=signer(other)(STATEMENT.payload()))
    with pytest.raises(CliError, match="it is signed by the key"):
        signatures.check(signed, public)
    # Whoever calls their key by our key's name has still not signed with it.
    forged = Signature(key_id=signer(private)(b"").key_id, value=signed.signature.value)
    with pytest.raises(CliError, match="somebody changed it"):
        signatures.check(signed.model_copy(update={"signature": forged}), public)


@pytest.mark.parametrize("data", [b"", b"nonsense", None])
def test_a_key_that_cannot_be_used_is_said_at_the_start(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "key.pem"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(BadKey, match="cannot be read as a private key"):
        signer(path)
    private, public = write_key(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(BadKey, match="a key of another kind"):
        signer(private)
    with pytest.raises(CliError, match="a key of another kind"):
        signatures.check(
            SignedStatement(statement=STATEMENT, signature=Signature(key_id="0" * 16, value="A" * 86 + "==")), public
        )


async def completed(monkeypatch: pytest.MonkeyPatch, context: Context) -> World:
    monkeypatch.setattr("support.world.CONTEXT", context)
    world = await started(World(make_job().build()))
    world.complete("support-bot-0")
    await world.settle()
    return world


async def test_the_operator_signs_what_a_job_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "platform")
    context = Context(CONTEXT.progress_url, CONTEXT.ca, CONTEXT.version, signer(private))
    world = await completed(monkeypatch, context)
    result = world.status.result
    assert result
    assert result.signature
    metadata = world.job["metadata"]
    statement = Statement(
        namespace=metadata["namespace"],
        job=metadata["name"],
        job_uid=metadata["uid"],
        uri=RESULT.uri,
        manifest_sha256=RESULT.manifest_sha256,
    )
    signatures.check(SignedStatement(statement=statement, signature=result.signature), public)
    writes = world.writes
    await world.settle()
    assert world.writes == writes, "a signature is made once"


async def test_without_a_key_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    world = await completed(monkeypatch, CONTEXT)
    assert world.status.result
    assert world.status.result.signature is None


def fetched(folder: Path, private: Path) -> Path:
    """A folder as `finetune fetch` leaves it."""
    import hashlib

    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(b"{}")
    files = [{"key": "adapter_config.json", "size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}]
    times = {"createdTime": "2026-01-01T00:00:00Z", "step": 1}
    raw = json.dumps({"version": "v1", "kind": "Adapter", "files": files, **times}).encode()
    (folder / "manifest.json").write_bytes(raw)
    statement = STATEMENT.model_copy(update={"manifest_sha256": hashlib.sha256(raw).hexdigest()})
    signed = SignedStatement(statement=statement, signature=signer(private)(statement.payload()))
    (folder / "signature.json").write_text(signed.model_dump_json(by_alias=True))
    return folder


def verify(folder: Path, key: Path) -> int:
    return entry.run(entry.cli, "finetune", ["verify", str(folder), "--key", str(key)])


def test_a_folder_is_checked_without_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    private, public = write_key(tmp_path, "platform")
    folder = fetched(tmp_path / "adapter", private)
    assert verify(folder, public) == 0
    assert "1 files are as team-a/bot published them" in capsys.readouterr().out
    breaks = {
        "adapter_config.json differs from the manifest": lambda: (folder / "adapter_config.json").write_bytes(b"[]"),
        "holds extra.bin, which its manifest does not name": lambda: (folder / "extra.bin").write_bytes(b""),
        "the signature is of another manifest.json": lambda: (folder / "manifest.json").write_bytes(b"{}"),
        "is no signature of an artifact": lambda: (folder / "signature.json").write_bytes(b"{}"),
        "was not fetched with a signature": lambda: (folder / "signature.json").unlink(),
    }
    for words, change in breaks.items():
        change()
        assert verify(folder, public) != 0
        assert words in capsys.readouterr().err
        (folder / "adapter_config.json").write_bytes(b"{}")
