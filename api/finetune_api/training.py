"""How long and how fast is learned: spec.training, and what a stage may say differently."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from finetune_api.dataset import Ratio
from finetune_api.model import ApiModel, Rule

Schedule = Literal["Constant", "Linear", "Cosine"]
Epochs = Annotated[float, Field(gt=0, le=1000)]
Steps = Annotated[int, Field(ge=1, le=100_000_000)]
LearningRate = Annotated[float, Field(gt=0, le=10)]
WeightDecay = Annotated[float, Field(ge=0, le=1)]
GradNorm = Annotated[float, Field(gt=0, le=1000)]
GlobalBatch = Annotated[int, Field(ge=1, le=1_000_000)]
MicroBatch = Annotated[int, Field(ge=0, le=65536)]
Length = Annotated[int, Field(ge=8, le=4_194_304)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


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
    epochs: Epochs | None = None
    """Passes over the mix; absent with maxSteps absent: 1."""
    max_steps: Steps | None = None
    """Optimizer steps."""
    learning_rate: LearningRate = 2e-4
    schedule: Schedule = "Cosine"
    warmup_ratio: Ratio = 0.03
    weight_decay: WeightDecay = 0.0
    max_grad_norm: GradNorm = 1.0
    global_batch_size: GlobalBatch = 16
    """Examples (packed: rows) per optimizer step over all ranks."""
    micro_batch_size: MicroBatch = 0
    """Per rank and forward pass; 0 = chosen by sizing."""
    max_length: Length = 2048
    """Tokens of one example."""
    seed: Seed = 42
    early_stopping: EarlyStopping | None = None


class StageTraining(ApiModel):
    """What a stage says of its training; what it leaves out comes from spec.training."""

    rules: ClassVar = Training.rules
    epochs: Epochs | None = None
    max_steps: Steps | None = None
    learning_rate: LearningRate | None = None
    schedule: Schedule | None = None
    warmup_ratio: Ratio | None = None
    weight_decay: WeightDecay | None = None
    max_grad_norm: GradNorm | None = None
    global_batch_size: GlobalBatch | None = None
    micro_batch_size: MicroBatch | None = None
    max_length: Length | None = None
    seed: Seed | None = None
    early_stopping: EarlyStopping | None = None

    def over(self, training: Training) -> Training:
        """`training` with what is said here; a length in steps replaces one in epochs, and the other way round."""
        said: dict[str, Any] = {name: value for name, value in self if value is not None}
        if "epochs" in said or "max_steps" in said:
            said = {"epochs": None, "max_steps": None} | said
        return training.model_copy(update=said)
