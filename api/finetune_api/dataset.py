"""What is learned from, and by which rules it is cleaned: spec.datasets and what goes with it."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from finetune_api.model import ApiModel, DataUri, Label, Rule
from finetune_api.texts import TemplateText

Column = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Ratio = Annotated[float, Field(ge=0, le=1)]


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
    """Held-out figures are told for each of its values: the 20 most frequent ones, or 19 and the rest as `other`."""


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
    uri: DataUri
    """A file, or a prefix that ends in `/`: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .csv; or a stage's rows."""
    format: Format = "Auto"
    columns: Columns | None = None
    template: TemplateText | None = None
    """Sandboxed Jinja: the prompt of a row's columns, by their names or roles; absent: the model's chat template."""
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
