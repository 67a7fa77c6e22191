"""Sequential fine-tuning: spec.stages."""

from typing import Annotated, ClassVar

from pydantic import Field

from finetune_api.dataset import Datasets, Ratio
from finetune_api.method import AnswerTokens, Method, ModelRef, Temperature
from finetune_api.model import ApiModel, Label, Rule
from finetune_api.training import StageTraining
from finetune_api.tuning import Tuning

Words = Annotated[int, Field(ge=1, le=10_000)]


class Generate(ApiModel):
    """Rows that a model writes in the manner of the stage's datasets (Self-Instruct, Wang et al. 2023)."""

    teacher: ModelRef | None = None
    """Absent: the model as the stage before left it."""
    count: Annotated[int, Field(ge=1, le=1_000_000)]
    """Rows that are wanted; fewer where the filters leave no more."""
    shots: Annotated[int, Field(ge=1, le=64)] = 4
    """Rows that each request shows as examples."""
    temperature: Temperature = 0.7
    max_new_tokens: AnswerTokens = 256
    max_similarity: Ratio = 0.7
    """ROUGE-L from which on an instruction is too much like one that exists."""
    min_words: Words = 1
    max_words: Words = 500
    min_score: Annotated[float, Field(le=0, ge=-100)] | None = None
    """The least mean log-probability per token that the model gives its own answer."""


class Stage(ApiModel):
    """One step of sequential fine-tuning; what it leaves out comes from spec."""

    rules: ClassVar = (
        Rule(
            "!has(self.generate) || !(has(self.method) || has(self.tuning) || has(self.training))",
            "a stage that generates trains nothing: leave out method, tuning and training",
            lambda self: self.generate is None or not (self.method or self.tuning or self.training),
            field="generate",
        ),
    )
    name: Label
    method: Method | None = None
    tuning: Tuning | None = None
    datasets: Datasets | None = None
    training: StageTraining | None = None
    generate: Generate | None = None
