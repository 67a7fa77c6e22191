"""FineTuneJob: what a user writes. `api.md` fixes the names; bounds and rules here become the CRD's schema and CEL."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from finetune_api.dataset import DataPolicy, Datasets, Holdout, Mixing
from finetune_api.evaluation import Evaluation
from finetune_api.jobstatus import FineTuneJobStatus
from finetune_api.method import Method
from finetune_api.model import ApiModel, Flag, ModelUri, Rule, S3Uri, ShortText, Subdomain
from finetune_api.stage import Stage
from finetune_api.texts import Endpoint
from finetune_api.training import Training
from finetune_api.tuning import Tuning

Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]


class BaseModelRef(ApiModel):
    uri: ModelUri
    dtype: Literal["Auto", "BFloat16", "Float16", "Float32"] = "Auto"
    adapter_uri: S3Uri | None = None
    """An earlier adapter to start from."""


class Distribution(ApiModel):
    rules: ClassVar = (
        Rule(
            "!has(self.minWorkers) || self.minWorkers <= (has(self.workers) ? self.workers : 1)",
            "minWorkers must not be larger than workers",
            lambda self: self.min_workers is None or self.min_workers <= self.workers,
            field="minWorkers",
        ),
    )
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Pods of the gang."""
    min_workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """With how few it starts where runPolicy.preRunningDeadlineSeconds have not brought room for all: with as many as
    found a node, on the same global batch. Absent: it fails then."""
    gpus_per_worker: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes of each pod, one per GPU; CPU processes where the profile has no accelerators."""
    strategy: Literal["Auto", "DDP", "ZeRO1", "ZeRO2", "ZeRO3"] = "Auto"
    offload: Literal["None", "Auto", "Optimizer", "OptimizerAndParameters"] = "None"
    """What goes to the host's memory, which slows training down. Auto: only what must, where nothing fits without."""


class CheckpointInterval(ApiModel):
    union: ClassVar = {"Steps": "steps", "Seconds": "seconds"}
    rules: ClassVar = (
        Rule(
            # The server checks a default against the rules before it fills it in: `type` may be absent there.
            "!has(self.type) || self.type == 'Auto' || (self.type == 'Steps' ? has(self.steps) : has(self.seconds))",
            "steps is required where type is Steps, seconds where it is Seconds",
            lambda self: self.type == "Auto" or (self.steps if self.type == "Steps" else self.seconds) is not None,
        ),
    )
    type: Literal["Auto", "Steps", "Seconds"] = "Auto"
    steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    seconds: Annotated[int, Field(ge=1, le=604_800)] | None = None


class Checkpoint(ApiModel):
    uri: S3Uri | None = None
    """Where scratch data goes; absent: output.uri."""
    interval: CheckpointInterval = CheckpointInterval()
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    when_complete: Literal["Delete", "Retain"] = "Delete"
    """What becomes of checkpoints, tokenised data and stages' results once the output is published."""


class Output(ApiModel):
    uri: S3Uri
    merged: Flag = False
    """Publish the merged model too."""


class LocalRef(ApiModel):
    name: Subdomain


class Credentials(ApiModel):
    """Whose rights the pods use at the object store: a Secret's keys or a ServiceAccount, in the job's namespace."""

    rules: ClassVar = (
        Rule(
            "has(self.secretRef) != has(self.serviceAccountName)",
            "exactly one of secretRef and serviceAccountName must be given",
            lambda self: (self.secret_ref is None) != (self.service_account_name is None),
        ),
    )
    secret_ref: LocalRef | None = None
    """Keys AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, optional, AWS_SESSION_TOKEN."""
    service_account_name: Subdomain | None = None


QueueName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=63)]
"""It becomes the value of a label, which is shorter than a name may be."""


class Queue(ApiModel):
    name: QueueName | None = None
    """A Kueue LocalQueue."""
    priority_class_name: QueueName | None = None


class MLflow(ApiModel):
    uri: Endpoint
    experiment: ShortText | None = None
    secret_ref: LocalRef | None = None


class WandB(ApiModel):
    project: ShortText
    entity: ShortText | None = None
    secret_ref: LocalRef


class Tracking(ApiModel):
    mlflow: MLflow | None = None
    wandb: WandB | None = None
    tensorboard: Flag = False


class RunPolicy(ApiModel):
    suspend: Flag = False
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 4
    active_deadline_seconds: Positive | None = None
    """Of running time; starts anew after a suspend."""
    pre_running_deadline_seconds: Positive | None = None
    """In the queue or unscheduled."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    managed_by: Literal["finetune.dev/operator", "kueue.x-k8s.io/multikueue"] = "finetune.dev/operator"


class FineTuneJobSpec(ApiModel):
    # The fields that may change while a job exists; CEL refuses every other change, field by field.
    mutable: ClassVar[dict[str, tuple[str, ...]]] = {
        "runPolicy": ("suspend", "ttlSecondsAfterFinished", "activeDeadlineSeconds"),
        "queue": ("priorityClassName",),
    }
    profile: Subdomain | None = None
    """A FineTuneProfile; absent: the one annotated as default."""
    base_model: BaseModelRef
    method: Method = Method()
    tuning: Tuning = Tuning()
    datasets: Datasets
    mixing: Mixing | None = None
    validation: Holdout | None = None
    test: Holdout | None = None
    data_policy: DataPolicy = DataPolicy()
    training: Training = Training()
    stages: Annotated[
        list[Stage],
        Field(
            max_length=16,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = []
    evaluation: Evaluation = Evaluation()
    distribution: Distribution = Distribution()
    checkpoint: Checkpoint = Checkpoint()
    output: Output
    credentials: Credentials | None = None
    queue: Queue | None = None
    tracking: Tracking | None = None
    run_policy: RunPolicy = RunPolicy()


JOB_NAME = r"^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$"
"""Names of children are `<name>-<attempt>-<worker>`: a label of at most 63 characters that starts with a letter."""


class JobMeta(ApiModel):
    """What we read of a FineTuneJob's metadata."""

    model_config = ApiModel.model_config | {"extra": "ignore"}
    name: Annotated[str, StringConstraints(pattern=JOB_NAME)]
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class FineTuneJob(ApiModel):
    api_version: Literal["finetune.dev/v1alpha1"] = "finetune.dev/v1alpha1"
    kind: Literal["FineTuneJob"] = "FineTuneJob"
    metadata: JobMeta
    spec: FineTuneJobSpec
    status: FineTuneJobStatus = FineTuneJobStatus()


def parse(manifest: dict[str, Any]) -> FineTuneJob:
    """A manifest as a FineTuneJob. Raises pydantic.ValidationError; `model.problems_of` tells it to a person."""
    return FineTuneJob.model_validate(manifest)
