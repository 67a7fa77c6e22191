"""An S3 server of its own, by moto: on loopback, everything in memory, authentication and policies on."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config

from finetune_sandbox import process

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

REGION = "us-east-1"
ADMIN = "admin"
_START_SECONDS = 30.0
_POLL_SECONDS = 0.02
# Requests that moto lets pass before it asks for a signature: the three that make the administrator.
_OPEN_REQUESTS = 3
_LISTENING = re.compile(rb"Running on (http://127\.0\.0\.1:\d+)")


class S3Error(RuntimeError):
    """The server did not start; the message ends with its last log lines."""


@dataclass(frozen=True)
class Credentials:
    access_key_id: str
    secret_access_key: str


def user_policy(prefixes: Sequence[str], read_only: bool) -> dict[str, Any]:
    """An IAM policy that allows `bucket` or `bucket/prefix`, each with all below it, and nothing else."""
    actions = ["s3:GetObject", "s3:GetObjectVersion", "s3:GetObjectAttributes"]
    if not read_only:
        actions += ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    buckets = sorted({prefix.split("/", 1)[0] for prefix in prefixes})
    objects = [f"arn:aws:s3:::{prefix.rstrip('/')}/*" for prefix in prefixes]
    on_bucket = ["s3:ListBucket", "s3:GetBucketLocation", "s3:GetBucketVersioning", "s3:ListBucketMultipartUploads"]
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": on_bucket, "Resource": [f"arn:aws:s3:::{name}" for name in buckets]},
            {"Effect": "Allow", "Action": actions, "Resource": objects},
        ],
    }


class S3:
    """A running server. `endpoint` is its URL, `admin` may do anything. The methods that talk to it block."""

    def __init__(self, endpoint: str, admin: Credentials, server: process.Process | None) -> None:
        self.endpoint = endpoint
        self.admin = admin
        self.region = REGION
        self._server = server

    @classmethod
    async def start(cls, directory: Path) -> S3:
        """Starts the server, its log in `directory`. It ends with this process. Raises S3Error."""
        log = _fresh_log(directory)
        env = process.interpreter_environment() | {
            "INITIAL_NO_AUTH_ACTION_COUNT": str(_OPEN_REQUESTS),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(directory),
        }
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        server = process.start(command, env=env, cwd=directory, output=log)
        try:
            endpoint = await _wait_listening(server, log)
            admin = await asyncio.to_thread(_make_admin, endpoint)
        except BaseException:
            server.kill()
            await server.wait()
            raise
        return cls(endpoint, admin, server)

    async def stop(self) -> None:
        if self._server:
            self._server.kill()
            await self._server.wait()

    def client(self, credentials: Credentials | None = None) -> S3Client:
        client: S3Client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=(credentials or self.admin).access_key_id,
            aws_secret_access_key=(credentials or self.admin).secret_access_key,
            config=Config(s3={"addressing_style": "path"}),
        )
        return client

    def create_bucket(self, name: str) -> None:
        """A bucket that is there already stays as it is."""
        self.client().create_bucket(Bucket=name)

    def create_user(self, name: str, prefixes: Sequence[str], *, read_only: bool = False) -> Credentials:
        """A user who may read (and write) below `bucket` or `bucket/prefix`, list those buckets, and nothing else."""
        iam = _iam(self.endpoint, self.admin)
        return _make_user(iam, name, user_policy(prefixes, read_only))


def _iam(endpoint: str, credentials: Credentials) -> Any:
    return boto3.client(
        "iam",
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id=credentials.access_key_id,
        aws_secret_access_key=credentials.secret_access_key,
    )


def _make_user(iam: Any, name: str, policy: dict[str, Any]) -> Credentials:
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return Credentials(key["AccessKeyId"], key["SecretAccessKey"])


def _make_admin(endpoint: str) -> Credentials:
    everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
    return _make_user(_iam(endpoint, Credentials("nobody", "nobody")), ADMIN, everything)


def _fresh_log(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "s3.log"
    log.unlink(missing_ok=True)
    log.touch(mode=0o600)
    return log


async def _wait_listening(server: process.Process, log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    ended = asyncio.ensure_future(server.wait())
    while True:
        text = await asyncio.to_thread(log.read_bytes)
        if found := _LISTENING.search(text):
            ended.cancel()
            return found[1].decode()
        if ended.done() or time.monotonic() > deadline:
            ended.cancel()
            tail = "\n".join(text.decode(errors="replace").splitlines()[-20:])
            raise S3Error(f"the S3 server did not start; the end of {log}:\n{tail}")
        await asyncio.wait({ended}, timeout=_POLL_SECONDS)
