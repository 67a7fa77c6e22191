"""Recognises the API server among those who reach the webhook: by a client certificate or by an unguessable path."""

import hmac
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from finetune_operator.webhook_paths import BadPaths, parse

logger = logging.getLogger(__name__)


class Unrecognisable(Exception):
    """Nothing tells the API server from a stranger, or the file that should cannot be used; the text says why."""


class Callers:
    """`knows(request)` is true for the API server alone."""

    def __init__(self, paths_file: Path | None, *, certificates: bool = False, names: Collection[str] = ()) -> None:
        """`paths_file`: see webhook_paths; `certificates`: the connection demands a client certificate, which must be
        for one of `names`, where there are any. Raises Unrecognisable."""
        if paths_file is None and not certificates:
            raise Unrecognisable("the webhook needs a file with its paths, or an authority of client certificates")
        self._file, self._names = paths_file, frozenset(names)
        self._certificates = certificates
        self._seen: tuple[int, int] | None = None
        self._paths: tuple[bytes, ...] = ()
        if paths_file:
            try:
                self._read(paths_file)
            except (OSError, BadPaths) as error:
                raise Unrecognisable(f"{paths_file}: the webhook's paths cannot be read: {error}") from error

    def knows(self, request: web.BaseRequest) -> bool:
        return self._by_certificate(request) and self._by_path(request.path)

    def _by_certificate(self, request: web.BaseRequest) -> bool:
        """The handshake has checked the certificate itself, but for whom it is."""
        if not self._certificates or not self._names:
            return True
        transport = request.transport
        shown: Mapping[str, Any] = (transport.get_extra_info("peercert") if transport else None) or {}
        return not self._names.isdisjoint(names_of(shown))

    def _by_path(self, path: str) -> bool:
        if self._file is None:
            return True
        try:
            self._read(self._file)
        except (OSError, BadPaths) as error:
            logger.warning("%s: the webhook's paths cannot be read, those before hold: %s", self._file, error)
        given = path.encode(errors="surrogateescape")
        # Each is compared, and in full: the time tells nothing.
        return sum(hmac.compare_digest(given, known) for known in self._paths) > 0

    def _read(self, file: Path) -> None:
        """Whoever keeps the file replaces it as a whole."""
        stat = file.stat()
        if self._seen != (version := (stat.st_ino, stat.st_mtime_ns)):
            # Not again for each request where it is broken.
            self._seen = version
            self._paths = tuple(entry.path.encode() for entry in parse(file.read_bytes()))


def names_of(certificate: Mapping[str, Any]) -> set[str]:
    """Whom a certificate is for, as ssl shows it: its common names and alternative names."""
    subject = {value for group in certificate.get("subject", ()) for key, value in group if key == "commonName"}
    return subject | {value for _, value in certificate.get("subjectAltName", ())}
