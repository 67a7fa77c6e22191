"""An S3 server with authentication on, in a process of its own, and a proxy that breaks what passes through it."""

import contextlib
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import boto3
from botocore.config import Config

_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""
_ALLOWED = [{"Effect": "Allow", "Action": ["s3:*", "iam:*"], "Resource": "*"}]
_DENIED = [{"Effect": "Deny", "Action": "s3:*", "Resource": ["arn:aws:s3:::forbidden", "arn:aws:s3:::forbidden/*"]}]


@dataclass
class S3:
    """A running server and the keys of a user who may do anything, but not in the bucket `forbidden`."""

    endpoint: str
    access_key: str = ""
    secret_key: str = ""
    clients: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)

    @property
    def environment(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    def client(self, service: str = "s3") -> Any:
        """One for each service, until the keys change."""
        known = (service, self.access_key)
        if known not in self.clients:
            self.clients[known] = self._connect(service)
        return self.clients[known]

    def _connect(self, service: str) -> Any:
        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key or "none",
            aws_secret_access_key=self.secret_key or "none",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 2}),
        )

    def put(self, uri: str, data: bytes) -> None:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        self.client().put_object(Bucket=bucket, Key=key, Body=data)

    def get(self, uri: str) -> bytes:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        return bytes(self.client().get_object(Bucket=bucket, Key=key)["Body"].read())

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]


@contextlib.contextmanager
def running_s3() -> Iterator[S3]:
    """The server ends with its standard input, so also when the test run is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # Large enough for the set-up; the counter is then set to zero.
        env=os.environ | {"INITIAL_NO_AUTH_ACTION_COUNT": "1000"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        host, port = process.stdout.readline().split()
        server = S3(f"http://{host}:{port}")
        iam = server.client("iam")
        iam.create_user(UserName="tenant")
        policy = json.dumps({"Version": "2012-10-17", "Statement": _ALLOWED + _DENIED})
        iam.put_user_policy(UserName="tenant", PolicyName="s3", PolicyDocument=policy)
        key = iam.create_access_key(UserName="tenant")["AccessKey"]
        for bucket in ("bucket", "forbidden"):
            server.client().create_bucket(Bucket=bucket)
        server.client().put_object(Bucket="forbidden", Key="x", Body=b"secret")
        reset = urllib.request.Request(
            f"{server.endpoint}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(reset, timeout=10).close()
        server.access_key, server.secret_key = key["AccessKeyId"], key["SecretAccessKey"]
        yield server
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(10)


@dataclass
class Proxy:
    """Passes TCP on; cuts the answer of each of the next `cuts` connections after `after` bytes."""

    upstream: tuple[str, int]
    cuts: int = 0
    after: int = 0
    connections: int = 0
    endpoint: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take_cut(self) -> bool:
        with self.lock:
            self.connections += 1
            self.cuts -= 1
            return self.cuts >= 0


@contextlib.contextmanager
def running_proxy(upstream: str) -> Iterator[Proxy]:
    host, _, port = upstream.removeprefix("http://").partition(":")
    proxy = Proxy((host, int(port)))

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            cut = proxy.take_cut()
            with socket.create_connection(proxy.upstream, timeout=10) as server:
                sender = threading.Thread(target=_pump, args=(self.request, server, None), daemon=True)
                sender.start()
                _pump(server, self.request, proxy.after if cut else None)
                for end in (server, self.request):
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)
                sender.join(10)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join(10)


def _pump(source: socket.socket, target: socket.socket, limit: int | None) -> None:
    sent = 0
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if limit is not None:
                data = data[: limit - sent]
            target.sendall(data)
            sent += len(data)
            if limit is not None and sent >= limit:
                return
        target.shutdown(socket.SHUT_WR)


def unused_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
