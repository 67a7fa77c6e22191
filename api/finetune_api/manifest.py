"""What makes a set of objects in S3 one thing: every key with size and SHA-256, written last.

A reader trusts only what a manifest names. Used for published adapters and, without `run`, for checkpoints.
"""

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.model import ApiModel, Figures, Sha256, ShortText

MANIFEST_KEY = "manifest.json"


class FileEntry(ApiModel):
    key: Annotated[str, Field(min_length=1, max_length=1024)]
    """Relative to the manifest's own prefix."""
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class RunInfo(ApiModel):
    """Where an artifact comes from."""

    namespace: ShortText
    job: ShortText
    job_uid: ShortText
    attempt: int
    attempt_uid: ShortText
    spec_sha256: Sha256
    base_model_uri: str
    base_model_sha256: Sha256
    """Over the sorted (key, sha256 or ETag) of its files."""
    datasets_sha256: dict[str, Sha256]
    image: str | None = None
    metrics: Figures = {}


class Manifest(ApiModel):
    version: Literal["v1"] = "v1"
    kind: Literal["Adapter", "Model", "Rows", "Checkpoint"]
    step: Annotated[int, Field(ge=0)]
    created_time: str
    """RFC 3339, UTC."""
    files: list[FileEntry]
    run: RunInfo | None = None
    world_size: int | None = None
    """Checkpoints: the number of ranks that wrote it."""
    spec_sha256: Sha256 | None = None
    """Checkpoints and results of stages: the spec that they continue; another spec's is never taken up."""
