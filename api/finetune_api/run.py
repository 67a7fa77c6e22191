"""What a pod is told (RunConfig), and what `prepare` leaves for the gang (PreparedData) and the operator (summary)."""

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.formats import Kind
from finetune_api.job import FineTuneJobSpec
from finetune_api.manifest import FileEntry
from finetune_api.model import ApiModel, S3Uri, Sha256, ShortText
from finetune_api.sizing import ModelShape, Sizing
from finetune_api.texts import Endpoint

Split = Literal["train", "validation", "test", "retention"]
Count = Annotated[int, Field(ge=0)]


class StorageConfig(ApiModel):
    """How the object store is reached; credentials come from the environment, never from here."""

    endpoint: Endpoint | None = None
    region: ShortText | None = None
    kms_key_id: Annotated[str, Field(max_length=2048)] | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    checksums: Literal["when_supported", "when_required"] = "when_required"
    """boto3's request and response checksums; some S3-compatible stores refuse the newer default."""


class PinnedObject(ApiModel):
    """An object as it was when `prepare` read it: whoever reads it later must get the same bytes."""

    uri: S3Uri
    size: Count
    etag: ShortText
    version_id: ShortText | None = None


class Shard(ApiModel):
    """One parquet file of examples: `input_ids` and `labels`, list<int32> of equal length; -100 is not learned.

    Further columns by `PreparedData.kind`: Pairs have the chosen answer there and `rejected_input_ids` and
    `rejected_labels` beside it; Unpaired `desirable` (bool); Classes `label` (string, one of `PreparedData.classes`);
    Prompts `reference` (string or null). Of Classes and Prompts no label is learned; a prompt ends where the answer
    begins. Held-out shards of a dataset with columns.slice have `slice` (string or null). Retention data are always
    Tokens.
    """

    key: ShortText
    """Relative to the prefix of the index."""
    split: Split
    dataset: ShortText
    rows: Count
    tokens: Count
    rejected_tokens: Count = 0
    trained_tokens: Count
    """Tokens that carry loss, without the rejected answers'."""
    size: Count
    sha256: Sha256

    @property
    def decoded_bytes(self) -> int:
        """On a pod's disk: an id and a label of four bytes for each token."""
        return 8 * (self.tokens + self.rejected_tokens)


class Outline(ApiModel):
    """A parquet file with what is known of each training row without its tokens, in the order of the shards.

    `length` and `trained` (tokens that carry loss): int32; of Pairs also `rejected_length` and `rejected_trained`; and
    the columns of the shards that hold no tokens.
    """

    key: ShortText
    size: Count
    sha256: Sha256
    cache_bytes: Count
    """Of decoded tokens (8 bytes each), what a pod's disk holds at a time."""


class PreparedData(ApiModel):
    """`data/index.json` in the scratch prefix, written last: a prefix without it holds nothing."""

    version: Literal["v1"] = "v1"
    job_uid: ShortText
    spec_sha256: Sha256
    inputs: list[PinnedObject]
    datasets_sha256: dict[str, Sha256]
    """Per dataset, over its pinned objects."""
    base_model: list[PinnedObject]
    base_model_sha256: Sha256
    adapter: list[PinnedObject] = []
    """Of the earlier adapter, where the job starts from one: its two files and its manifest."""
    reward_model: list[PinnedObject] = []
    """Of the reward model that the method names: a whole model's files, or an adapter's on the base model."""
    judge: list[PinnedObject] = []
    """The same of the reward model that the evaluation names."""
    reward_parameters: Count = 0
    """Of both."""
    teacher: list[PinnedObject] = []
    """Of the model that a stage which generates asks, where that is another one."""
    seeds: FileEntry | None = None
    """Of a stage that generates: the rows that it writes more of, by their key beside the index."""
    model: ModelShape
    kind: Kind = "Tokens"
    classes: list[ShortText] = []
    """Names of the classes, ordered: the place of a name is its number."""
    shards: list[Shard]
    dropped: dict[str, Count] = {}
    """Rows left out, by cause."""
    outline: Outline | None = None
    """Set where a pod's disk cannot hold all training data: the ranks fetch their shards when the time comes."""
    max_tokens: Count = 0
    """Length of the longest sequence."""
    stages: dict[str, Sha256] = {}
    """Of a job with stages, which has no shards of its own: SHA-256 of each stage's `data/<stage>/index.json`."""

    @property
    def train_bytes(self) -> int:
        """Of all training tokens, decoded."""
        return sum(shard.decoded_bytes for shard in self.shards if shard.split == "train")

    @property
    def decoded_bytes(self) -> int:
        """Of all tokens that lie on a pod's disk at a time, decoded."""
        held_out = sum(shard.decoded_bytes for shard in self.shards if shard.split != "train")
        return held_out + (min(self.train_bytes, self.outline.cache_bytes) if self.outline else self.train_bytes)


class StageSummary(ApiModel):
    """What the operator sizes a stage by."""

    train_tokens: Count
    max_tokens: Count
    """0 where its data are made by an earlier stage."""
    reward_parameters: Count = 0
    target_features: Count
    """Of `ModelShape`, by the stage's own tuning."""
    target_outputs: Count


class PreparedSummary(ApiModel):
    """What the operator learns of the data: it travels in prepare's termination message, so it is small."""

    index_uri: Annotated[S3Uri, Field(alias="indexURI")]
    index_sha256: Annotated[Sha256, Field(alias="indexSHA256")]
    report_uri: Annotated[S3Uri, Field(alias="reportURI")]
    model: ModelShape
    train_examples: Count
    validation_examples: Count
    test_examples: Count
    train_tokens: Count
    dropped: Count
    max_tokens: Count
    reward_parameters: Count = 0
    """Of the reward model that the method names."""
    stages: list[StageSummary] = []
    """One for each of spec.stages; the counts above are those of all of them."""
    conditional_writes: bool = True
    """Whether the store honours `If-None-Match`, as `prepare` has tried."""
    message: Annotated[str, Field(max_length=512)] = ""
    """What was found in the data, the most frequent first, each with its first case; empty where nothing was."""


class Devices(ApiModel):
    """What one pod of the gang has."""

    kind: Literal["CPU", "CUDA"]
    workers: Annotated[int, Field(ge=1)]
    processes_per_worker: Annotated[int, Field(ge=1)]

    @property
    def world_size(self) -> int:
        return self.workers * self.processes_per_worker


class RunConfig(ApiModel):
    """The one file that tells a pod everything: ConfigMap key `run.json`."""

    version: Literal["v1"] = "v1"
    namespace: ShortText
    job: ShortText
    job_uid: ShortText
    attempt: Count | None = None
    """None for `prepare`."""
    image: Annotated[str, Field(max_length=1024)] | None = None
    spec: FineTuneJobSpec
    """The effective spec, the profile's defaults applied."""
    spec_sha256: Sha256
    devices: Devices
    storage: StorageConfig = StorageConfig()
    data_cache_bytes: Annotated[int, Field(ge=1)] = 100 * 2**30
    """Of decoded training data, what a pod's disk holds at a time; where there is more, shards are streamed."""
    scratch_uri: S3Uri
    """`<checkpoint.uri or output.uri>/.scratch/<job uid>/`."""
    output_uri: S3Uri
    """`<output.uri>/<job>/`; an attempt publishes below its own UID."""
    prepared: PreparedSummary | None = None
    """None for `prepare`."""
    sizing: Sizing | None = None
    """Of the stage that needs most."""
    stage_sizings: list[Sizing] = []
    """One for each of spec.stages."""
    grace_seconds: Annotated[int, Field(ge=1)] = 120
    """terminationGracePeriodSeconds of the pod."""
