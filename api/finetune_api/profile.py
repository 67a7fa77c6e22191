"""FineTuneProfile: what the platform team owns. Whatever decides a pod's form and place comes from here."""

import datetime
import ipaddress
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from finetune_api.bounds import MOST
from finetune_api.model import NO_TRAVERSAL, ApiModel, Flag, Label, Quantity, Rule, ShortText, Subdomain, no_traversal
from finetune_api.run import StorageConfig

UriPrefix = Annotated[
    str,
    StringConstraints(
        pattern=r"^(s3|hf|pvc)://([A-Za-z0-9_./=+@:,-]|[{]namespace[}])*$", min_length=5, max_length=1024
    ),
    Field(json_schema_extra=NO_TRAVERSAL),
    AfterValidator(no_traversal),
]
"""Whole segments of a path: `s3://data/team-a` reaches `s3://data/team-a/x` and not `s3://data/team-ab`. `{namespace}`
stands for the job's namespace."""


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
    tflops: Annotated[float, Field(gt=0, le=100_000)] | None = None
    """What one GPU does in training, which is a third to a half of what its data sheet says: by it GPU-hours are
    estimated before a job starts. Absent: only by the pace of a job that has run."""


class Resources(ApiModel):
    """Of one process (one GPU); a pod asks for as many times that as it has processes."""

    cpu: Quantity = "1"
    memory: Quantity = "4Gi"
    shm: Quantity = "1Gi"
    ephemeral_storage: Quantity | None = None


class PrepareResources(ApiModel):
    """Resources and deadlines of the pod that checks and converts a job's data."""

    cpu: Quantity = "1"
    memory: Quantity = "4Gi"
    pre_running_deadline_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """How long the pod may wait to run; absent: as long as the job's own runPolicy.preRunningDeadlineSeconds says."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] = 21_600
    """How long it may run, its retries included: then the job fails with DeadlineExceeded."""


class Limits(ApiModel):
    max_workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    max_gpus: Annotated[int | None, Field(alias="maxGPUs", ge=1, le=65536)] = None
    max_active_deadline_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None


class AllowedUris(ApiModel):
    """Prefixes of URIs; an empty list allows all."""

    base_model: Annotated[list[UriPrefix], Field(max_length=64)] = []
    """Of models; an adapter, a reward model or a teacher may also be where output allows jobs to publish."""
    datasets: Annotated[list[UriPrefix], Field(max_length=64)] = []
    output: Annotated[list[UriPrefix], Field(max_length=64)] = []
    """Of output.uri and checkpoint.uri."""


class EnvVar(ApiModel):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Z_][A-Z0-9_]*$", max_length=128)]
    value: Annotated[str, StringConstraints(max_length=4096)] = ""


def _network(text: str) -> str:
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"it must be a network such as 10.0.0.0/8; {error}") from None
    return text


Cidr = Annotated[str, StringConstraints(pattern=r"^[0-9a-f.:]+/[0-9]{1,3}$", max_length=64), AfterValidator(_network)]


class Egress(ApiModel):
    """Where pods may go besides each other, DNS and the progress server."""

    rules: ClassVar = (
        Rule(
            "has(self.cidr) != has(self.podNamespace)",
            "exactly one of cidr and podNamespace must be given",
            lambda self: (self.cidr is None) != (self.pod_namespace is None),
        ),
        Rule(
            "has(self.cidr) || !has(self.except) || size(self.except) == 0",
            "except is allowed only beside cidr",
            lambda self: self.cidr is not None or not self.excluded,
            field="except",
        ),
        Rule(
            "has(self.podNamespace) || !has(self.podLabels) || size(self.podLabels) == 0",
            "podLabels is allowed only beside podNamespace",
            lambda self: self.pod_namespace is not None or not self.pod_labels,
            field="podLabels",
        ),
    )
    cidr: Cidr | None = None
    """Addresses outside of the cluster."""
    excluded: Annotated[list[Cidr], Field(alias="except", max_length=32)] = []
    """Parts of cidr that are not meant."""
    pod_namespace: Label | None = None
    """Pods of a namespace, such as a store or a proxy in the cluster."""
    pod_labels: Annotated[dict[str, ShortText], Field(max_length=16)] = {}
    """Those of them that carry these; none: all of the namespace."""
    ports: Annotated[list[Annotated[int, Field(ge=1, le=65535)]], Field(max_length=32)] = []
    """Of the pods themselves, not of a Service before them; none: all."""
    protocol: Literal["TCP", "UDP"] = "TCP"

    @model_validator(mode="after")
    def _inside(self) -> Self:
        for part in self.excluded:
            whole, inner = ipaddress.ip_network(self.cidr or part), ipaddress.ip_network(part)
            if whole.version != inner.version or inner == whole or not inner.subnet_of(whole):  # type: ignore[arg-type]
                raise ValueError(f"except: found {part}; it must be a smaller part of cidr, {self.cidr}")
        return self


class Budget(ApiModel):
    """GPU-hours of each namespace, from a gang's start to its end; of CPU processes where there is no accelerator."""

    gpu_hours: Annotated[float, Field(gt=0, le=MOST)]
    period: Literal["Day", "Week", "Month"] = "Month"
    """Of the calendar, in UTC; weeks begin on Monday."""


class Concurrency(ApiModel):
    """How much may run before jobs that name no queue wait for their turn. Everything that runs under the profile
    counts, also what a queue has admitted. Where there is no accelerator, a CPU process counts as a GPU."""

    jobs_per_namespace: Annotated[int, Field(ge=1, le=65536)] | None = None
    gpus_per_namespace: Annotated[int, Field(ge=1, le=65536)] | None = None
    gpus: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Of all namespaces together. Next comes a job of the namespace that uses least, of equals of the one that was
    served longest ago; where it finds no room, nobody overtakes it."""


class FineTuneProfileSpec(ApiModel):
    rules: ClassVar = (
        Rule(
            "!has(self.egress) || size(self.egress) == 0 || (has(self.networkPolicy) && self.networkPolicy)",
            "egress is allowed only where networkPolicy is true",
            lambda self: not self.egress or self.network_policy,
            field="egress",
        ),
    )
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
    """Whether each attempt gets a NetworkPolicy: its pods reach each other, DNS, the progress server and what `egress`
    names. It takes a network plugin that enforces them."""
    egress: Annotated[list[Egress], Field(max_length=32)] = []
    """Empty: the place of storage.endpoint, and without one every address but link-local ones, at port 443."""
    defaults: Annotated[
        dict[str, Any] | None, Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})
    ] = None
    """A partial FineTuneJobSpec that fills what a job leaves out."""
    locked: Annotated[list[ShortText], Field(max_length=64)] = []
    """Paths of spec that a job may not set against defaults, such as `training.maxLength`."""
    budget: Budget | None = None
    concurrency: Concurrency = Concurrency()


class ProfileMeta(ApiModel):
    model_config = ApiModel.model_config | {"extra": "ignore"}
    name: Subdomain
    annotations: dict[str, str] = {}
    generation: int = 0
    resource_version: str = ""


class Usage(ApiModel):
    """What a namespace has spent of a budget."""

    since: datetime.datetime
    """Begin of the period."""
    until: datetime.datetime
    """Everything that ran until then is counted, also of jobs that are deleted since."""
    gpu_seconds: Annotated[int, Field(ge=0)] = 0
    expected_gpu_seconds: Annotated[int, Field(ge=0)] = 0
    """What the jobs that run then will spend still, by their own pace or by their estimate."""


class NetworkStatus(ApiModel):
    """What the test of the cluster's NetworkPolicies showed."""

    enforced: Literal["True", "False", "Unknown"]
    message: ShortText = ""
    tested_time: datetime.datetime | None = None
    generation: Annotated[int, Field(ge=0)] | None = None
    """Of the profile that was tested."""


class ProfileStatus(ApiModel):
    observed_generation: Annotated[int, Field(ge=0)] | None = None
    network: NetworkStatus | None = None
    """Where networkPolicy is true."""
    usage: Annotated[dict[str, Usage], Field(max_length=10_000)] = {}
    """By namespace, where there is a budget."""


class FineTuneProfile(ApiModel):
    rules: ClassVar[tuple[Rule, ...]] = ()
    api_version: Literal["finetune.dev/v1alpha1"] = "finetune.dev/v1alpha1"
    kind: Literal["FineTuneProfile"] = "FineTuneProfile"
    metadata: ProfileMeta
    spec: FineTuneProfileSpec
    status: ProfileStatus = ProfileStatus()


DEFAULT_ANNOTATION = "finetune.dev/default-profile"
"""`"true"` on the profile that a job without `spec.profile` gets."""
