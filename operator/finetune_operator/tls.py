"""The certificate of what the operator serves: the one that lies in a folder, or one that is made there."""

import contextlib
import datetime
import fcntl
import ipaddress
import os
import secrets
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_LIFETIME = datetime.timedelta(days=3650)
LIFETIME = datetime.timedelta(days=90)
RENEW_BEFORE = datetime.timedelta(days=30)
# Clocks of nodes differ, and those of virtual machines jump back after a pause.
BACKDATED = datetime.timedelta(hours=1)


class TlsError(Exception):
    """The folder's files cannot be served: which file, what was found, what is needed."""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the server's certificate (chain), its private key, and the authority that clients are to trust."""

    certificate: Path
    key: Path
    ca: Path

    def context(self, client_ca: Path | None = None) -> ssl.SSLContext:
        """A context for a server, TLS 1.2 or newer; with `client_ca` only for clients with a certificate of it.

        Raises TlsError where `client_ca` cannot be used.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # A resumed session shows no certificate that could be checked, and every connection here has one request.
        context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
        context.num_tickets = 0
        context.load_cert_chain(self.certificate, self.key)
        if client_ca:
            try:
                context.load_verify_locations(cafile=client_ca)
            except OSError as error:
                raise TlsError(f"{client_ca}: not usable as the authority of client certificates: {error}") from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def version(self) -> tuple[bytes, bytes]:
        """What changes when the certificate or the authority does."""
        return self.certificate.read_bytes(), self.ca.read_bytes()


def ensure(folder: Path, hosts: Sequence[str], now: datetime.datetime) -> TlsFiles:
    """The folder's certificate. Call it again to have it renewed.

    A folder with tls.crt and tls.key but without ca.key is somebody else's (cert-manager, a mounted Secret): it is used
    as it is. Otherwise the folder gets an authority of its own, once, and a certificate for `hosts` (DNS names and IP
    addresses), which is made anew when it comes to its end or `hosts` are others. Raises TlsError.
    """
    files = TlsFiles(folder / "tls.crt", folder / "tls.key", folder / "ca.crt")
    if not (folder / "ca.key").exists() and (files.certificate.exists() or files.key.exists()):
        _check_given(files)
        return files
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder):
            authority = _authority(folder, now)
            if not _good(files, authority.certificate, hosts, now):
                _issue(files, authority, hosts, now)
    except OSError as error:
        raise TlsError(f"{folder}: cannot keep a certificate here: {error.strerror or error}") from error
    return files


def _check_given(files: TlsFiles) -> None:
    for path in (files.certificate, files.key, files.ca):
        if not path.is_file():
            raise TlsError(f"{path}: not found; a folder with a certificate needs tls.crt, tls.key and ca.crt")
    try:
        files.context()
        x509.load_pem_x509_certificates(files.ca.read_bytes())
    except (ssl.SSLError, OSError, ValueError) as error:
        raise TlsError(f"{files.certificate}: not usable with tls.key and ca.crt beside it: {error}") from error


@dataclass(frozen=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def _authority(folder: Path, now: datetime.datetime) -> _Authority:
    certificate_path, key_path = folder / "ca.crt", folder / "ca.key"
    with contextlib.suppress(FileNotFoundError, ValueError):
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        # A crash between the two files leaves a pair that does not match.
        if (
            isinstance(key, ec.EllipticCurvePrivateKey)
            and key.public_key() == certificate.public_key()
            and now < certificate.not_valid_after_utc - LIFETIME
        ):
            return _Authority(certificate, key)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("finetune-operator CA")
    certificate = (
        _builder(name, name, key.public_key(), now, CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(key_path, _private(key), 0o600)
    _write(certificate_path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return _Authority(certificate, key)


def _good(files: TlsFiles, authority: x509.Certificate, hosts: Sequence[str], now: datetime.datetime) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        key = serialization.load_pem_private_key(files.key.read_bytes(), password=None)
        certificate.verify_directly_issued_by(authority)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (FileNotFoundError, ValueError, TypeError, x509.ExtensionNotFound, InvalidSignature):
        return False
    return (
        key.public_key() == certificate.public_key()
        and set(names) == set(_alternative_names(hosts))
        and now < certificate.not_valid_after_utc - RENEW_BEFORE
    )


def _issue(files: TlsFiles, authority: _Authority, hosts: Sequence[str], now: datetime.datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(_name("finetune-operator"), authority.certificate.subject, key.public_key(), now, LIFETIME)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_alternative_names(hosts)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    _write(files.key, _private(key), 0o600)
    _write(files.certificate, certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    lifetime: datetime.timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + lifetime)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    if not names:
        raise TlsError("the certificate needs at least one host name or address that clients reach the server by")
    return names


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    """The whole content or the old one, also after a crash; never readable by more than `mode` says."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two operators that start in one folder must not make two authorities."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
