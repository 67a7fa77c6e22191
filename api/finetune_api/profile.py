"""FineTuneProfile: what the platform team owns. Whatever decides a pod's form and place comes from here."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from finetune_api.model import ApiModel, Flag, Label, Quantity, Rule, ShortText, Subdomain
from finetune_api.run import StorageConfig

UriPrefix = Annotated[
    str, StringConstraints(pattern=r"^(s3|hf|pvc)://[A-Za-z0-9_./{}@-]*$", min_length=5, max_length=1024)
]
"""A prefix; `{namespace}` stands for the job's namespace."""


class Toleration(ApiModel):
    key: ShortText | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: ShortText | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = None


class Accelerator(ApiModel):
    """The GPU; absent in a profile: CPU processes over gloo."""

    resource_name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9_.-]+$", max_length=253)] = (
        "nvidia.com/gpu"
    )
    memory: Quantity
    """Of one GPU."""
    product: ShortText | None = None


class Resources(ApiModel):
    """Of one process (one GPU); a pod asks for as many times that as it has processes."""

    cpu: Quantity = "1"
    memory: Quantity = "4Gi"
    shm: Quantity = "1Gi"
    ephemeral_storage: Quantity | None = None


class PrepareResources(ApiModel):
    cpu: Quantity = "1"
    memory: Quantity = "4Gi"


class Limits(ApiModel):
    max_workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    max_gpus: Annotated[int | None, Field(alias="maxGPUs", ge=1, le=65536)] = None
    max_active_deadline_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None


class AllowedUris(ApiModel):
    """Prefixes of URIs; an empty list allows all."""

    base_model: Annotated[list[UriPrefix], Field(max_length=64)] = []
    datasets: Annotated[list[UriPrefix], Field(max_length=64)] = []
    output: Annotated[list[UriPrefix], Field(max_length=64)] = []


class EnvVar(ApiModel):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Z_][A-Z0-9_]*$", max_length=128)]
    value: Annotated[str, StringConstraints(max_length=4096)] = ""


class Budget(ApiModel):
    gpu_hours: Annotated[float, Field(gt=0)]
    period: Literal["Day", "Week", "Month"] = "Month"


class FineTuneProfileSpec(ApiModel):
    image: Annotated[str, StringConstraints(pattern=r"^[^\s]+$", min_length=1, max_length=1024)]
    """The trainer image, by digest in production."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    node_selector: Annotated[dict[str, ShortText], Field(max_length=32)] = {}
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = []
    runtime_class_name: Subdomain | None = None
    accelerator: Accelerator | None = None
    resources: Resources = Resources()
    prepare: PrepareResources = PrepareResources()
    data_cache: Quantity = "100Gi"
    """Disk of a pod that tokenised training data may take (8 bytes a token); of more, shards are streamed."""
    termination_grace_period_seconds: Annotated[int, Field(ge=1, le=3600)] = 120
    scheduling_grace_seconds: Annotated[int, Field(ge=1, le=86_400)] = 300
    """How long some pods of a gang may hold their nodes while others find none: then all are given back, to whoever
    can use them. Longer than a cluster's autoscaler takes to bring a node. Gangs in a queue are left to it."""
    limits: Limits = Limits()
    allowed_namespaces: Annotated[list[Label], Field(max_length=1024)] = []
    """Empty: all."""
    allowed_uris: AllowedUris = AllowedUris()
    service_accounts: Annotated[list[Subdomain], Field(max_length=64)] = []
    """ServiceAccounts that credentials.serviceAccountName may name."""
    storage: StorageConfig = StorageConfig()
    environment: Annotated[list[EnvVar], Field(max_length=64)] = []
    network_policy: Flag = False
    defaults: Annotated[
        dict[str, Any] | None, Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})
    ] = None
    """A partial FineTuneJobSpec that fills what a job leaves out."""
    locked: Annotated[list[ShortText], Field(max_length=64)] = []
    """Paths of spec that a job may not set against defaults, such as `training.maxLength`."""
    budget: Budget | None = None


class ProfileMeta(ApiModel):
    model_config = ApiModel.model_config | {"extra": "ignore"}
    name: Subdomain
    annotations: dict[str, str] = {}
    generation: int = 0
    resource_version: str = ""


class ProfileStatus(ApiModel):
    observed_generation: Annotated[int, Field(ge=0)] | None = None


class FineTuneProfile(ApiModel):
    rules: ClassVar[tuple[Rule, ...]] = ()
    api_version: Literal["finetune.dev/v1alpha1"] = "finetune.dev/v1alpha1"
    kind: Literal["FineTuneProfile"] = "FineTuneProfile"
    metadata: ProfileMeta
    spec: FineTuneProfileSpec
    status: ProfileStatus = ProfileStatus()


DEFAULT_ANNOTATION = "finetune.dev/default-profile"
"""`"true"` on the profile that a job without `spec.profile` gets."""
