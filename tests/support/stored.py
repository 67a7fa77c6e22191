"""What a store holds, and stores that wait for nothing: for tests of what goes wrong between them."""

import contextlib
import hashlib
from pathlib import Path

import pytest

from finetune_api.run import StorageConfig
from finetune_trainer import retries
from finetune_trainer.storage import Store
from support.s3 import S3

PART = 5 * 2**20
"""The least that S3 takes as a part of an upload."""


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts are as good as none."""
    for name in ("FIRST_PAUSE", "FIRST_PAUSE_THROTTLED"):
        monkeypatch.setattr(retries, name, 0.001)


def impatient(endpoint: str, attempts: int = 6, timeout: float = 1.0) -> Store:
    config = StorageConfig(endpoint=endpoint, region="us-east-1", addressing_style="path")
    return Store(config, attempts=attempts, timeout=timeout, part=PART)


def contents(s3: S3, prefix: str, bucket: str = "bucket") -> dict[str, str]:
    """SHA-256 by key below the prefix."""
    return {
        key.removeprefix(prefix): hashlib.sha256(s3.get(f"s3://{bucket}/{key}")).hexdigest()
        for key in s3.keys(bucket, prefix)
    }


def unfinished(s3: S3, prefix: str = "", bucket: str = "bucket") -> list[str]:
    """Keys of uploads that nobody finished."""
    answer = s3.client().list_multipart_uploads(Bucket=bucket, Prefix=prefix)
    return [item["Key"] for item in answer.get("Uploads", ()) if item["Key"].startswith(prefix)]


def clean(s3: S3, prefix: str, bucket: str = "bucket") -> None:
    client = s3.client()
    for key in s3.keys(bucket, prefix):
        client.delete_object(Bucket=bucket, Key=key)
    for item in client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()):
        with contextlib.suppress(client.exceptions.NoSuchUpload):
            client.abort_multipart_upload(Bucket=bucket, Key=item["Key"], UploadId=item["UploadId"])


def artifact(folder: Path) -> Path:
    """Three files, of which one goes up in parts."""
    (folder / "sub").mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "sub" / "weights").write_bytes(bytes(range(256)) * 20)
    (folder / "adapter_model.safetensors").write_bytes(hashlib.sha256(b"x").digest() * (PART // 32 + 4000))
    return folder
