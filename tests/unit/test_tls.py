"""The operator's certificate: made once, kept, renewed by the same authority, and never in place of somebody else's."""

import asyncio
import datetime
import shutil
import ssl
from pathlib import Path

import pytest
from cryptography import x509

from finetune_operator.tls import CA_LIFETIME, LIFETIME, RENEW_BEFORE, TlsError, TlsFiles, ensure

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
HOSTS = ("progress.finetune-system.svc", "localhost", "127.0.0.1")


def certificate(files: TlsFiles) -> x509.Certificate:
    return x509.load_pem_x509_certificate(files.certificate.read_bytes())


async def shake_hands(files: TlsFiles, host: str) -> None:
    """A client that trusts the folder's CA alone connects to a server with its certificate."""
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0, ssl=files.context())
    async with server:
        port = server.sockets[0].getsockname()[1]
        trust = ssl.create_default_context(cafile=files.ca)
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust, server_hostname=host)
        writer.close()


async def test_a_fresh_folder_gets_a_certificate_that_clients_accept(tmp_path: Path) -> None:
    files = ensure(tmp_path / "new" / "tls", HOSTS, NOW)
    for host in HOSTS:
        await shake_hands(files, host)
    with pytest.raises(ssl.SSLCertVerificationError):
        await shake_hands(files, "elsewhere.example")
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (files.key, tmp_path / "new/tls/ca.key")}
    assert modes == {"tls.key": "0o600", "ca.key": "0o600"}
    left = sorted(path.name for path in (tmp_path / "new/tls").iterdir())
    assert left == [".lock", "ca.crt", "ca.key", "tls.crt", "tls.key"]


def test_it_is_kept_over_a_restart(tmp_path: Path) -> None:
    first = ensure(tmp_path, HOSTS, NOW).version()
    assert ensure(tmp_path, tuple(reversed(HOSTS)), NOW + DAY).version() == first


async def test_it_is_renewed_before_it_ends_by_the_same_authority(tmp_path: Path) -> None:
    files = ensure(tmp_path, HOSTS, NOW - LIFETIME + RENEW_BEFORE)
    before = files.version()
    assert ensure(tmp_path, HOSTS, NOW - DAY).version() == before
    ensure(tmp_path, HOSTS, NOW)
    after = files.version()
    assert after[0] != before[0]
    assert after[1] == before[1]
    await shake_hands(files, "localhost")


def test_the_authority_is_replaced_before_it_cannot_sign_any_more(tmp_path: Path) -> None:
    before = ensure(tmp_path, HOSTS, NOW - CA_LIFETIME + LIFETIME - DAY).version()
    after = ensure(tmp_path, HOSTS, NOW).version()
    assert before[1] != after[1]


def test_other_hosts_get_another_certificate(tmp_path: Path) -> None:
    before = certificate(ensure(tmp_path, HOSTS, NOW))
    after = certificate(ensure(tmp_path, ("localhost",), NOW))
    assert before.serial_number != after.serial_number
    names = after.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]


@pytest.mark.parametrize("name", ["tls.crt", "tls.key", "ca.crt"])
@pytest.mark.parametrize("content", [None, b"", b"garbage"])
async def test_a_folder_that_a_crash_left_behind_is_healed(tmp_path: Path, name: str, content: bytes | None) -> None:
    files = ensure(tmp_path, HOSTS, NOW)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    ensure(tmp_path, HOSTS, NOW)
    await shake_hands(files, "localhost")


async def test_a_crash_between_key_and_certificate_is_healed(tmp_path: Path) -> None:
    files = ensure(tmp_path / "a", HOSTS, NOW)
    other = ensure(tmp_path / "b", HOSTS, NOW)
    shutil.copy(other.key, files.key)
    ensure(tmp_path / "a", HOSTS, NOW)
    await shake_hands(files, "localhost")


def test_somebody_elses_certificate_is_used_as_it_is(tmp_path: Path) -> None:
    made = ensure(tmp_path / "made", HOSTS, NOW - 2 * LIFETIME)
    given = tmp_path / "given"
    given.mkdir()
    for path in (made.certificate, made.key, made.ca):
        shutil.copy(path, given)
    before = {path.name: path.read_bytes() for path in given.iterdir()}
    files = ensure(given, ("other.example",), NOW)
    assert {path.name: path.read_bytes() for path in given.iterdir()} == before
    assert files.certificate == given / "tls.crt"


@pytest.mark.parametrize("missing", ["tls.crt", "tls.key", "ca.crt"])
def test_an_incomplete_folder_of_somebody_else_is_refused(tmp_path: Path, missing: str) -> None:
    made = ensure(tmp_path / "made", HOSTS, NOW)
    given = tmp_path / "given"
    given.mkdir()
    for path in (made.certificate, made.key, made.ca):
        if path.name != missing:
            shutil.copy(path, given)
    with pytest.raises(TlsError, match=f"{missing}: not found; .* needs tls.crt, tls.key and ca.crt"):
        ensure(given, HOSTS, NOW)


def test_a_folder_of_garbage_is_refused(tmp_path: Path) -> None:
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (tmp_path / name).write_text("garbage")
    with pytest.raises(TlsError, match="not usable"):
        ensure(tmp_path, HOSTS, NOW)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TlsError, match="cannot keep a certificate here"):
        ensure(tmp_path / "file" / "tls", HOSTS, NOW)
    with pytest.raises(TlsError, match="at least one host"):
        ensure(tmp_path / "tls", (), NOW)
