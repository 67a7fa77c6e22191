"""FineTuneJob: what a user writes. `api.md` fixes the names; bounds and rules here become the CRD's schema and CEL."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from finetune_api.jobstatus import FineTuneJobStatus
from finetune_api.model import (
    ApiModel,
    Label,
    LongText,
    ModelUri,
    Rule,
    S3Uri,
    ShortText,
    Subdomain,
)
from finetune_api.tuning import Tuning

Column = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]


class BaseModelRef(ApiModel):
    uri: ModelUri
    dtype: Literal["Auto", "BFloat16", "Float16", "Float32"] = "Auto"
    adapter_uri: S3Uri | None = None
    """An earlier adapter to start from."""


class ModelRef(ApiModel):
    uri: ModelUri


class SFT(ApiModel):
    loss: Literal["Completion", "Assistant", "All"] = "Completion"
    """What is learned: completions and the last assistant turn, every assistant turn, or every token."""
    packing: bool = False
    """Put several examples in one row; none attends to another."""


class DPO(ApiModel):
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    loss: Literal["Sigmoid", "Hinge", "IPO"] = "Sigmoid"


class KTO(ApiModel):
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    desirable_weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    undesirable_weight: Annotated[float, Field(gt=0, le=100)] = 1.0


class ORPO(ApiModel):
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1


class Reward(ApiModel):
    center_rewards_coefficient: Annotated[float, Field(ge=0, le=10)] = 0.0


class PPO(ApiModel):
    reward_model: ModelRef | None = None
    kl_coefficient: Annotated[float, Field(ge=0, le=10)] = 0.05
    clip_range: Annotated[float, Field(gt=0, le=1)] = 0.2
    ppo_epochs: Annotated[int, Field(ge=1, le=100)] = 4
    max_new_tokens: Annotated[int, Field(ge=1, le=65536)] = 128
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0


class GRPO(ApiModel):
    reward_model: ModelRef | None = None
    generations: Annotated[int, Field(ge=2, le=128)] = 8
    beta: Annotated[float, Field(ge=0, le=10)] = 0.0
    max_new_tokens: Annotated[int, Field(ge=1, le=65536)] = 128


class Method(ApiModel):
    union: ClassVar = {
        "SFT": "sft",
        "DPO": "dpo",
        "KTO": "kto",
        "ORPO": "orpo",
        "Reward": "reward",
        "PPO": "ppo",
        "GRPO": "grpo",
    }
    type: Literal["SFT", "DPO", "KTO", "ORPO", "Reward", "PPO", "GRPO"] = "SFT"
    sft: SFT | None = None
    dpo: DPO | None = None
    kto: KTO | None = None
    orpo: ORPO | None = None
    reward: Reward | None = None
    ppo: PPO | None = None
    grpo: GRPO | None = None


class Columns(ApiModel):
    """Which column of the data plays which role; an absent one is looked for under its usual names."""

    prompt: Column | None = None
    completion: Column | None = None
    messages: Column | None = None
    text: Column | None = None
    instruction: Column | None = None
    input: Column | None = None
    output: Column | None = None
    system: Column | None = None
    chosen: Column | None = None
    rejected: Column | None = None
    label: Column | None = None
    context: Column | None = None
    slice: Column | None = None


Format = Literal["Auto", "Messages", "PromptCompletion", "Instruction", "Text", "Preference", "Labelled", "PromptOnly"]


class Retrieval(ApiModel):
    """Training rows whose passages (`columns.context`) do not hold the answer, so that the model learns to say so."""

    rules: ClassVar = (
        Rule(
            # The server checks a default against the rules before it fills it in.
            "(has(self.dropRatio) ? self.dropRatio : 0.0) + (has(self.swapRatio) ? self.swapRatio : 0.0) <= 1.0",
            "dropRatio and swapRatio must be at most 1 together",
            lambda self: self.drop_ratio + self.swap_ratio <= 1,
        ),
    )
    drop_ratio: Ratio = 0.0
    """Share of the training rows that lose their passages."""
    swap_ratio: Ratio = 0.0
    """Share of the training rows that get another row's passages."""
    absent_answer: Annotated[str, StringConstraints(min_length=1, max_length=1024)] = "The passages do not answer this."
    """What is to be answered in such rows."""


class Dataset(ApiModel):
    rules: ClassVar = (
        Rule(
            "!has(self.retrieval) || (has(self.columns) && has(self.columns.context))",
            "retrieval needs columns.context",
            lambda self: self.retrieval is None or bool(self.columns and self.columns.context),
            field="retrieval",
        ),
    )
    name: Label
    uri: S3Uri
    """A file, or a prefix that ends in `/`: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .csv."""
    format: Format = "Auto"
    columns: Columns | None = None
    template: LongText | None = None
    """Sandboxed Jinja that renders the prompt from the row's columns; absent: the model's chat template."""
    weight: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    """Share of this dataset in the mix, relative to the others'; absent everywhere: in proportion to size."""
    shots: Annotated[int, Field(ge=0, le=64)] = 0
    """Examples in front of each prompt, drawn with the job's seed from the dataset's own training rows."""
    retrieval: Retrieval | None = None


Datasets = Annotated[
    list[Dataset],
    Field(
        min_length=1,
        max_length=32,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    ),
]


class Mixing(ApiModel):
    """How much each dataset gives to an epoch; absent: Weighted where some dataset has a weight, else Proportional."""

    rules: ClassVar = (
        Rule(
            "(self.type == 'Temperature') == has(self.temperature)",
            "temperature is required where type is Temperature, and allowed only there",
            lambda self: (self.type == "Temperature") == (self.temperature is not None),
        ),
    )
    type: Literal["Proportional", "Weighted", "Temperature"]
    """By size; by weight; by size to the power of 1 / temperature."""
    temperature: Annotated[float, Field(ge=1, le=100)] | None = None
    """1 is Proportional; the higher, the more alike the shares are."""


class Holdout(ApiModel):
    """Data that is never trained on: a fraction of every dataset, chosen by content hash, or datasets of its own."""

    rules: ClassVar = (
        Rule(
            "has(self.fraction) != has(self.datasets)",
            "exactly one of fraction and datasets must be given",
            lambda self: (self.fraction is None) != (self.datasets is None),
        ),
    )
    fraction: Annotated[float, Field(gt=0, le=0.5)] | None = None
    datasets: Datasets | None = None


Policy = Literal["Fail", "Drop", "Warn"]


class DataPolicy(ApiModel):
    duplicates: Policy = "Drop"
    """Training rows whose content is that of an earlier one, or nearly so."""
    leakage: Policy = "Fail"
    """Training rows whose content is in validation or test data too, or nearly so."""
    similarity: Annotated[float, Field(ge=0.7, le=1)] = 0.9
    """Share of common five-word runs (Jaccard) from which on two rows are nearly the same; 1: only equal rows are."""
    invalid: Policy = "Fail"
    too_long: Literal["Fail", "Drop", "Warn", "Truncate"] = "Drop"


class EarlyStopping(ApiModel):
    metric: Annotated[str, StringConstraints(min_length=1, max_length=64)] = "eval_loss"
    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    min_delta: Annotated[float, Field(ge=0, le=1000)] = 0.0


class Training(ApiModel):
    rules: ClassVar = (
        Rule(
            "!(has(self.epochs) && has(self.maxSteps))",
            "epochs and maxSteps cannot both be given",
            lambda self: self.epochs is None or self.max_steps is None,
        ),
    )
    epochs: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Passes over the mix; absent with maxSteps absent: 1."""
    max_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Optimizer steps."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-4
    schedule: Literal["Constant", "Linear", "Cosine"] = "Cosine"
    warmup_ratio: Ratio = 0.03
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] = 1.0
    global_batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    """Examples (packed: rows) per optimizer step over all ranks."""
    micro_batch_size: Annotated[int, Field(ge=0, le=65536)] = 0
    """Per rank and forward pass; 0 = chosen by sizing."""
    max_length: Annotated[int, Field(ge=8, le=4_194_304)] = 2048
    """Tokens of one example."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    early_stopping: EarlyStopping | None = None


class Stage(ApiModel):
    """One step of sequential fine-tuning; what it leaves out comes from spec."""

    name: Label
    method: Method | None = None
    tuning: Tuning | None = None
    datasets: Datasets | None = None
    training: Training | None = None


class Retention(ApiModel):
    datasets: Datasets
    max_regression: Annotated[float, Field(ge=0, le=100)] = 0.05


class Gate(ApiModel):
    metric: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    operator: Literal["AtLeast", "AtMost"]
    value: float


EvaluationMetric = Literal[
    "Loss", "Perplexity", "Accuracy", "Precision", "Recall", "F1", "ExactMatch", "Rouge", "Bleu", "Meteor"
]


class Evaluation(ApiModel):
    metrics: Annotated[list[EvaluationMetric], Field(max_length=10)] = ["Loss", "Perplexity"]
    retention: Retention | None = None
    gates: Annotated[list[Gate], Field(max_length=32)] = []


class Distribution(ApiModel):
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Pods of the gang."""
    gpus_per_worker: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes of each pod, one per GPU; CPU processes where the profile has no accelerators."""
    strategy: Literal["Auto", "DDP", "ZeRO1", "ZeRO2", "ZeRO3"] = "Auto"
    offload: Literal["None", "Optimizer", "OptimizerAndParameters"] = "None"


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


class Output(ApiModel):
    uri: S3Uri
    merged: bool = False
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
    uri: Annotated[str, StringConstraints(pattern=r"^https?://[^\s]+$", max_length=1024)]
    experiment: ShortText | None = None
    secret_ref: LocalRef | None = None


class WandB(ApiModel):
    project: ShortText
    entity: ShortText | None = None
    secret_ref: LocalRef


class Tracking(ApiModel):
    mlflow: MLflow | None = None
    wandb: WandB | None = None
    tensorboard: bool = False


class RunPolicy(ApiModel):
    suspend: bool = False
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
