"""FineTuneJob.status: conditions carry the facts, `state` is derived from them for people to read."""

import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_api.model import ApiModel, Flag, LongText, ShortText
from finetune_api.progress import CheckpointStatus, TrainerStatus
from finetune_api.signature import Signature
from finetune_api.sizing import Sizing

State = Literal[
    "Pending",
    "Queued",
    "Suspended",
    "Preparing",
    "Starting",
    "Running",
    "Evaluating",
    "Publishing",
    "Retrying",
    "Complete",
    "Failed",
]
ConditionType = Literal["Accepted", "Suspended", "Running", "Complete", "Failed", "Reconciling", "Stalled"]
Count = Annotated[int, Field(ge=0)]


class Condition(ApiModel):
    """metav1.Condition."""

    type: Annotated[str, Field(max_length=316)]
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(min_length=1, max_length=1024)]
    message: Annotated[str, Field(max_length=32768)] = ""
    last_transition_time: datetime.datetime
    observed_generation: Count = 0


class Terms(ApiModel):
    """Limits of the profile that hold for an attempt until it ends, however the profile changes meanwhile."""

    scheduling_grace_seconds: Count
    max_active_deadline_seconds: Count | None = None


class PrepareStatus(ApiModel):
    """The Job that checks and converts the data, recorded before it is made."""

    job: ShortText
    """Name of the batch/v1 Job."""
    uid: ShortText | None = None
    """UID of the Job; None: it is about to be made. A Job with another UID is not this one."""
    profile: ShortText
    """The FineTuneProfile that it was made under."""
    profile_generation: Count | None = None
    creation_time: datetime.datetime | None = None
    """When it was asked for."""
    defaults: Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})] = {}
    """The profile's defaults at that time, which hold for the job until it ends."""


class Attempt(ApiModel):
    """One run of the gang, recorded before its Job is made; `prepare` is not one."""

    number: Count
    job: ShortText
    """Name of its batch/v1 Job."""
    uid: ShortText | None = None
    """UID of its Job: the last segment of the output prefix. None: it is about to be made. A Job with another UID is
    not this one."""
    profile: ShortText | None = None
    """The FineTuneProfile that it was made under."""
    profile_generation: Count | None = None
    """That profile's metadata.generation: what was changed later does not hold for it."""
    terms: Terms | None = None
    queue: ShortText | None = None
    """The queue that admits its Job; None: the operator starts it by itself."""
    avoids_nodes: Flag | None = None
    """True: its pods must stay away from nodes on which earlier attempts failed."""
    workers: Count | None = None
    """Pods of its gang."""
    gpus: Count | None = None
    """GPUs (CPU processes where the profile has none) of all of them."""
    placed: Count | None = None
    """Of them, how many had found a node, where not all did and the attempt was given back."""
    creation_time: datetime.datetime | None = None
    """When it was asked for."""
    start_time: datetime.datetime | None = None
    completion_time: datetime.datetime | None = None
    outcome: Literal["Succeeded", "Preempted", "Retryable", "Permanent"] | None = None
    """None while it runs."""
    reason: ShortText | None = None
    message: LongText | None = None
    exit_code: int | None = None
    rank: int | None = None
    node: ShortText | None = None
    resumed_from_step: Count | None = None


class DataStatus(ApiModel):
    train_examples: Count = 0
    validation_examples: Count = 0
    test_examples: Count = 0
    train_tokens: Count = 0
    dropped: Count = 0
    message: Annotated[str | None, Field(max_length=512)] = None
    """What was found in the data, the most frequent first, each with its first case."""
    report_uri: Annotated[LongText | None, Field(alias="reportURI")] = None


class ResultStatus(ApiModel):
    uri: LongText
    manifest_sha256: Annotated[ShortText, Field(alias="manifestSHA256")]
    size_bytes: Count
    metrics: Annotated[dict[str, float], Field(max_length=128)] = {}
    signature: Signature | None = None
    """The platform's, of uri and manifestSHA256, where the operator has a key."""


class FineTuneJobStatus(ApiModel):
    observed_generation: Count | None = None
    state: State | None = None
    message: LongText | None = None
    """What a person should know now: the message of the condition that decides the state."""
    conditions: Annotated[
        list[Condition],
        Field(
            max_length=16,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        ),
    ] = []
    start_time: datetime.datetime | None = None
    completion_time: datetime.datetime | None = None
    prepare: PrepareStatus | None = None
    attempts: Annotated[list[Attempt], Field(max_length=256)] = []
    """The newest 256."""
    attempt_count: Count | None = None
    """How many times the gang was started."""
    gpus: Count | None = None
    """GPUs (CPU processes where the profile has none) that the gang asks for."""
    trainer_status: TrainerStatus | None = None
    checkpoint: CheckpointStatus | None = None
    data: DataStatus | None = None
    sizing: Sizing | None = None
    result: ResultStatus | None = None

    def condition(self, kind: ConditionType) -> Condition | None:
        return next((c for c in self.conditions if c.type == kind), None)
