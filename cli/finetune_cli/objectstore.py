"""S3, as far as a person at a laptop needs it: read, list, upload; every failure as one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from finetune_cli.errors import CliError, Exit

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


@dataclass(frozen=True)
class Location:
    """`s3://bucket/key`; a prefix ends in `/`."""

    bucket: str
    key: str = ""

    @classmethod
    def parse(cls, uri: str) -> Location:
        found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?", uri)
        if not found:
            raise CliError(f"{uri!r} is no S3 URI: write s3://bucket/key or s3://bucket/prefix/", Exit.USAGE)
        return cls(found[1], found[2] or "")

    def __truediv__(self, key: str) -> Location:
        """A key below a prefix."""
        slash = "" if not self.key or self.key.endswith("/") else "/"
        return Location(self.bucket, f"{self.key}{slash}{key}")

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True)
class Access:
    """How the store is reached; None: as the environment and ~/.aws say."""

    endpoint: str | None = None
    region: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None
    addressing_style: str = "auto"

    @classmethod
    def of(cls, storage: Mapping[str, Any], secret: Mapping[str, str]) -> Access:
        """From a profile's `storage` and the (decoded) data of a credentials Secret."""
        return cls(
            endpoint=storage.get("endpoint"),
            region=storage.get("region"),
            access_key_id=secret.get("AWS_ACCESS_KEY_ID"),
            secret_access_key=secret.get("AWS_SECRET_ACCESS_KEY"),
            session_token=secret.get("AWS_SESSION_TOKEN"),
            addressing_style=storage.get("addressingStyle", "auto"),
        )


class Store:
    """A client of one object store. Every method raises CliError."""

    def __init__(self, access: Access) -> None:
        import boto3
        from botocore.config import Config

        style: Any = {"addressing_style": access.addressing_style}
        with _in_words(access.endpoint or "S3"):
            self._client: S3Client = boto3.client(
                "s3",
                endpoint_url=access.endpoint,
                region_name=access.region,
                aws_access_key_id=access.access_key_id,
                aws_secret_access_key=access.secret_access_key,
                aws_session_token=access.session_token,
                config=Config(
                    s3=style,
                    connect_timeout=10,
                    read_timeout=60,
                    retries={"max_attempts": 3, "mode": "standard"},
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )

    def read(self, location: Location, limit: int) -> bytes | None:
        """A small object; None where it does not exist."""
        with _in_words(location):
            try:
                answer = self._client.get_object(Bucket=location.bucket, Key=location.key)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") == "NoSuchKey":
                    return None
                raise
            if answer["ContentLength"] > limit:
                raise CliError(f"{location} has {answer['ContentLength']} bytes; at most {limit} are expected")
            return answer["Body"].read()

    def part(self, location: Location, start: int, length: int) -> bytes:
        """Some bytes of an object."""
        with _in_words(location):
            wanted = f"bytes={start}-{start + length - 1}"
            return self._client.get_object(Bucket=location.bucket, Key=location.key, Range=wanted)["Body"].read()

    def chunks(self, location: Location, size: int) -> Iterator[bytes]:
        """An object's body, piece by piece."""
        with _in_words(location):
            yield from self._client.get_object(Bucket=location.bucket, Key=location.key)["Body"].iter_chunks(size)

    def keys(self, prefix: Location) -> Iterator[str]:
        """Keys below a prefix, relative to it."""
        for entry in self.objects(prefix / ""):
            yield entry["Key"].removeprefix((prefix / "").key)

    def objects(self, prefix: Location) -> Iterator[dict[str, Any]]:
        """Whatever starts with the prefix: entries with Key, Size and LastModified."""
        with _in_words(prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=prefix.bucket, Prefix=prefix.key):
                yield from (dict(entry) for entry in page.get("Contents", ()))

    def buckets(self) -> list[str]:
        with _in_words("the bucket list"):
            return [bucket["Name"] for bucket in self._client.list_buckets()["Buckets"]]

    def make_bucket(self, name: str) -> None:
        with _in_words(f"bucket {name}"):
            self._client.create_bucket(Bucket=name)

    def upload(self, file: Path, location: Location) -> None:
        with _in_words(location):
            self._client.upload_file(str(file), location.bucket, location.key)


@contextmanager
def _in_words(what: object) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        body = error.response.get("Error", {})
        code, message = body.get("Code", ""), body.get("Message", "")
        raise CliError(f"{what}: the object store refused: {message or code} ({code})") from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise CliError(f"{what}: no credentials for the object store; {hint}", Exit.USAGE) from error
    except (BotoCoreError, Boto3Error, ValueError) as error:
        raise CliError(f"{what}: the object store cannot be reached: {error}", Exit.UNREACHABLE) from error
