"""An HTTP proxy before an S3 server that does to a chosen request what stores and networks do to it now and then.

It knows requests by S3's own names for them (`PutObject`, `UploadPart` …), keeps a record of all that passed, and
breaks those that a rule chooses. Before it passes a body on it holds it to its SHA-256, as S3 does and moto does not.
"""

import contextlib
import hashlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

Fault = Literal[
    "slow down",
    "internal error",
    "unavailable",
    "reset",
    "reset after commit",
    "error after commit",
    "silence",
    "silence after commit",
    "cut",
    "trickle",
    "flipped on the way there",
    "expired",
    "no bucket",
    "no encryption",
    "no decryption",
    "no key",
    "silent on encryption",
]
PASSING: tuple[Fault, ...] = (
    "slow down",
    "internal error",
    "unavailable",
    "reset",
    "reset after commit",
    "error after commit",
    "silence",
    "silence after commit",
    "cut",
    "trickle",
    "flipped on the way there",
)
"""What another attempt gets over."""

_ERRORS: dict[str, tuple[int, str]] = {
    "slow down": (503, "SlowDown"),
    "internal error": (500, "InternalError"),
    "unavailable": (503, "ServiceUnavailable"),
    "error after commit": (500, "InternalError"),
    "expired": (400, "ExpiredToken"),
    "no bucket": (404, "NoSuchBucket"),
    "no encryption": (403, "AccessDenied"),
    "no decryption": (403, "AccessDenied"),
    "no key": (400, "KMS.NotFoundException"),
    "mismatch": (400, "XAmzContentSHA256Mismatch"),
}
_WORDS = {
    "no encryption": "User: x is not authorized to perform: kms:GenerateDataKey on resource: key-1",
    "no decryption": "User: x is not authorized to perform: kms:Decrypt on resource: key-1",
}
_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length", "server", "date"}


class Request(NamedTuple):
    operation: str
    bucket: str
    key: str
    number: int
    """Of its kind and key, from 0: a request that is sent again is the next one."""

    @property
    def name(self) -> str:
        return f"{self.operation} {self.key}#{self.number}"


Rule = Callable[[Request], Fault | None]


def operation_of(method: str, key: str, query: dict[str, list[str]]) -> str:
    if not key:
        if method == "GET" and "uploads" in query:
            return "ListMultipartUploads"
        return {"GET": "ListObjectsV2", "HEAD": "HeadBucket", "PUT": "CreateBucket", "POST": "DeleteObjects"}.get(
            method, method
        )
    if "uploads" in query:
        return "CreateMultipartUpload"
    if "uploadId" in query:
        known = {"PUT": "UploadPart", "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}
        return known.get(method, "ListParts")
    return {"GET": "GetObject", "HEAD": "HeadObject", "PUT": "PutObject", "DELETE": "DeleteObject"}.get(method, method)


def key_of(path: str) -> str:
    return unquote(urlsplit(path).path).lstrip("/").partition("/")[2]


@dataclass
class FaultyS3:
    """A running proxy. `rule` may be set at any time, and is asked about each request."""

    upstream: tuple[str, int]
    rule: Rule = lambda request: None
    overwrite: Callable[[str, str], None] | None = None
    """Makes room at a bucket's key, before each conditional write: so the store seems not to know `If-None-Match`."""
    after: int = 0
    """Bytes of a body that is cut, or trickles, which arrive at once."""
    requests: list[Request] = field(default_factory=list)
    broken: list[Request] = field(default_factory=list)
    endpoint: str = ""
    released: threading.Event = field(default_factory=threading.Event)
    """Ends all silence."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, rule: Rule = lambda request: None) -> None:
        """Begins a new record, under another rule."""
        with self.lock:
            self.requests, self.broken, self.rule = [], [], rule
            self.released.set()
            self.released = threading.Event()

    def choose(self, operation: str, bucket: str, key: str) -> Fault | None:
        with self.lock:
            same = sum(1 for known in self.requests if (known.operation, known.key) == (operation, key))
            request = Request(operation, bucket, key, same)
            self.requests.append(request)
            fault = self.rule(request)
            if fault:
                self.broken.append(request)
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyS3

    def log_message(self, *_: Any) -> None:
        """What passed is in the record."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._serve
        raise AttributeError(name)

    def _serve(self) -> None:
        url = urlsplit(self.path)
        bucket, key = unquote(url.path).lstrip("/").partition("/")[0], key_of(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.choose(
            operation_of(self.command, key, parse_qs(url.query, keep_blank_values=True)), bucket, key
        )
        if fault == "flipped on the way there" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        said = self.headers.get("x-amz-content-sha256", "")
        if len(said) == 64 and hashlib.sha256(body).hexdigest() != said:
            self._refuse("mismatch")
        elif fault in _ERRORS and fault != "error after commit":
            self._refuse(fault)
        elif fault == "reset":
            self._reset()
        elif fault == "silence":
            self._hush()
        else:
            self._pass_on(body, fault)

    def _pass_on(self, body: bytes, fault: Fault | None) -> None:
        if self.proxy.overwrite and self.headers.get("If-None-Match"):
            # The header itself is signed.
            bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
            self.proxy.overwrite(bucket, key)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        server = http.client.HTTPConnection(*self.proxy.upstream, timeout=60)
        try:
            server.request(self.command, self.path, body or None, headers)
            answer = server.getresponse()
            data = answer.read()
        finally:
            server.close()
        if fault == "reset after commit":
            return self._reset()
        if fault == "silence after commit":
            return self._hush()
        if fault == "error after commit":
            return self._refuse(fault)
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if fault == "silent on encryption" and "server-side-encryption" in name.lower():
                continue
            if name.lower() not in _HOP:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault in ("cut", "trickle") and data:
            self.wfile.write(data[: min(self.proxy.after, len(data) - 1)])
            self.wfile.flush()
            if fault == "cut":
                return self._reset()
            return self._hush(data[self.proxy.after :] if self.command == "GET" and key_of(self.path) else b"")
        self.wfile.write(data)
        return None

    def _refuse(self, kind: str) -> None:
        status, code = _ERRORS[kind]
        words = _WORDS.get(kind, "broken on purpose")
        data = f"<Error><Code>{code}</Code><Message>{words}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _hush(self, drops: bytes = b"") -> None:
        """Says nothing more, or a byte now and then, until the client hangs up."""
        self.close_connection = True
        released = self.proxy.released
        self.connection.settimeout(0.05)
        while not released.is_set():
            if drops:
                with contextlib.suppress(OSError):
                    self.connection.sendall(drops[:1])
                drops = drops[1:]
            try:
                if not self.connection.recv(65536):
                    return
            except TimeoutError:
                continue
            except OSError:
                return


@contextlib.contextmanager
def running_faulty_s3(upstream: str) -> Iterator[FaultyS3]:
    """`upstream`: the store's `http://host:port`."""
    host, _, port = upstream.removeprefix("http://").partition(":")
    proxy = FaultyS3((host, int(port)))
    handler = type("Handler", (_Handler,), {"proxy": proxy})

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hangs up is what tests are about."""

    with Server(("127.0.0.1", 0), handler) as server:
        proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.released.set()
            server.shutdown()
            thread.join(10)
