"""What is measured, on what, and what it must reach: spec.evaluation."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from finetune_api.dataset import Datasets
from finetune_api.method import AnswerTokens, ModelRef
from finetune_api.model import ApiModel

MetricName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
EvaluationMetric = Literal[
    "Loss",
    "Perplexity",
    "TokenAccuracy",
    "Accuracy",
    "Precision",
    "Recall",
    "F1",
    "ExactMatch",
    "Rouge",
    "Bleu",
    "Chrf",
    "Meteor",
    "WinRate",
]


class Retention(ApiModel):
    """Data of what the base model could do: its loss may rise by at most this share."""

    datasets: Datasets
    max_regression: Annotated[float, Field(ge=0, le=100)] = 0.05


class Gate(ApiModel):
    """What a figure of the result must reach; where it does not, the adapter is kept and the job fails."""

    metric: MetricName
    """`rougeL`, `testLoss`, `evalLossBefore`, `evalLoss.<dataset>`, `evalLoss.<dataset>.<slice>`, `<stage>/rougeL`."""
    operator: Literal["AtLeast", "AtMost"]
    value: float


class Generation(ApiModel):
    """How answers are written for the metrics that compare answers: greedily, from the validation and test data."""

    max_new_tokens: AnswerTokens = 128
    max_examples: Annotated[int, Field(ge=1, le=100_000)] = 200
    """Of each dataset and split, chosen by content hash."""


class Evaluation(ApiModel):
    metrics: Annotated[list[EvaluationMetric], Field(max_length=13)] = ["Loss", "Perplexity"]
    """Before and after training. What the method measures is measured in any case; those that compare answers (from
    ExactMatch on, and F1) let the model write some. Bleu and Chrf are from 0 to 100, all others from 0 to 1; Meteor
    matches words and stems, not synonyms."""
    every_steps: Annotated[int, Field(ge=0, le=100_000_000)] = 0
    """Optimizer steps between evaluations on the validation data while training; 0: ten times in all with
    earlyStopping, else only before and after."""
    generation: Generation = Generation()
    reward_model: ModelRef | None = None
    """What WinRate asks which of two answers is better."""
    retention: Retention | None = None
    gates: Annotated[list[Gate], Field(max_length=32)] = []
