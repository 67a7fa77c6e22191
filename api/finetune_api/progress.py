"""Progress on the wire: Kubeflow Trainer's format, and our additions to it, all optional.

A stock transformers >= 5.4 Trainer posts `{"trainerStatus": {...}}` by itself; metric values are strings, here too.
"""

import datetime
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from finetune_api.model import ApiModel, S3Uri, ShortText

Count = Annotated[int, Field(ge=0, le=2**53)]
"""What every JSON parser keeps exactly."""
Phase = Literal["Loading", "Training", "Evaluating", "Saving", "Publishing"]


class Metric(ApiModel):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    value: Annotated[str, Field(max_length=64)]


class CheckpointStatus(ApiModel):
    uri: S3Uri
    step: Count
    time: datetime.datetime


class TrainerStatus(ApiModel):
    """status.trainerStatus. What a foreign trainer sends beyond it is ignored, as Kubeflow's server does."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True, use_attribute_docstrings=True
    )
    progress_percentage: Annotated[int, Field(ge=0, le=100)] | None = None
    estimated_remaining_seconds: Count | None = None
    metrics: Annotated[list[Metric], Field(max_length=64)] = []
    last_updated_time: datetime.datetime | None = None
    # Ours.
    phase: Phase | None = None
    stage: ShortText | None = None
    step: Count | None = None
    total_steps: Count | None = None
    attempt: Count | None = None
    """Set by the server from the pod that reported."""
    checkpoint: CheckpointStatus | None = None
    warning: ShortText | None = None
    """What goes wrong without ending the run, as over-fitting does; empty: nothing any more."""


class ProgressReport(ApiModel):
    """The body of a POST to …/finetunejobs/{name}/status."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True, use_attribute_docstrings=True
    )
    trainer_status: TrainerStatus


def audience(job_uid: str) -> str:
    """The audience of the token with which pods of this job report, and no other's."""
    return f"finetune.dev/progress/{job_uid}"
