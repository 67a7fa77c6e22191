"""A job as the stages that it runs, one after the other: each with the whole spec that holds for it."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from finetune_api.formats import kind_of
from finetune_api.job import FineTuneJobSpec
from finetune_api.method import Method
from finetune_api.model import Path
from finetune_api.stage import Generate, Stage

STAGE_URI = "stage://"
COMPARING = ("DPO", "KTO", "PPO", "GRPO")
"""Methods that compare with the model as it was before."""


class EffectiveStage(NamedTuple):
    number: int
    name: str
    """Empty for a job without stages, which is one stage."""
    spec: FineTuneJobSpec
    """What holds for this stage alone; it has no stages."""
    own: Stage | None
    """As it is written."""

    @property
    def generate(self) -> Generate | None:
        return self.own.generate if self.own else None

    @property
    def reads(self) -> list[str]:
        """The stages whose rows it learns from: its data are prepared between the stages."""
        return [d.uri.removeprefix(STAGE_URI) for d in self.spec.datasets if d.uri.startswith(STAGE_URI)]

    @property
    def has_head(self) -> bool:
        """Whether it trains a new head, so that the model does not answer any more."""
        return self.spec.method.type == "Reward" or kind_of(self.spec.method.type, self.spec.datasets) == "Classes"

    def path(self, field: str) -> Path:
        """Where the user wrote a field of the effective spec: in the stage or in spec."""
        said = self.own is not None and getattr(self.own, field, None) is not None
        return ("spec", "stages", self.number, field) if said else ("spec", field)

    def named(self, text: str) -> str:
        """A sentence about the effective spec, with its fields named where the user wrote them."""
        for field in ("method", "tuning", "datasets", "training"):
            if self.path(field)[1] == "stages":
                text = re.sub(rf"\bspec\.{field}\b", f"spec.stages[{self.number}].{field}", text)
        return text


def effective(spec: FineTuneJobSpec) -> list[EffectiveStage]:
    """The stages in their order; of a job without stages the one that spec itself is."""
    if not spec.stages:
        return [EffectiveStage(0, "", spec, None)]
    found = [EffectiveStage(index, stage.name, _spec(spec, stage), stage) for index, stage in enumerate(spec.stages)]
    return [_in_its_place(found, stage) for stage in found]


def _in_its_place(stages: Sequence[EffectiveStage], stage: EffectiveStage) -> EffectiveStage:
    """The job's earlier adapter is of the stages that start from the base model, its output of the last stage."""
    spec = stage.spec
    if origin(stages, stage.number).stage is not None:
        spec = spec.model_copy(update={"base_model": spec.base_model.model_copy(update={"adapter_uri": None})})
    if stage.number < len(stages) - 1:
        spec = spec.model_copy(update={"output": spec.output.model_copy(update={"merged": False})})
    return stage._replace(spec=spec)


def _spec(spec: FineTuneJobSpec, stage: Stage) -> FineTuneJobSpec:
    validation, test = spec.validation, spec.test
    if stage.datasets:
        # Held-out datasets belong to spec.datasets; a fraction is taken of any.
        validation = validation if validation and validation.fraction else None
        test = test if test and test.fraction else None
    return spec.model_copy(
        update={
            "stages": [],
            # What it writes more of are questions with answers.
            "method": Method() if stage.generate else stage.method or spec.method,
            "tuning": stage.tuning or spec.tuning,
            "datasets": stage.datasets or spec.datasets,
            "training": stage.training.over(spec.training) if stage.training else spec.training,
            "validation": validation,
            "test": test,
        }
    )


def reward_stage(stages: Sequence[EffectiveStage], number: int) -> int | None:
    """The newest Reward stage before a stage that learns from scored answers, where it names no reward model itself."""
    rollout = stages[number].spec.method.rollout
    if rollout is None or rollout.reward_model:
        return None
    return next(
        (s.number for s in reversed(stages[:number]) if s.spec.method.type == "Reward" and not s.generate), None
    )


class Origin(NamedTuple):
    """What a stage starts from."""

    stage: int | None
    """The stage whose result it is; None: the base model."""
    how: Literal["Base", "Carried", "Merged", "Whole"]
    """The base model; an adapter that goes on learning; an adapter worked into its model; a whole model."""


def origin(stages: Sequence[EffectiveStage], number: int) -> Origin:
    """The newest stage before it whose model still answers: reward models and classifiers are ends in themselves."""
    before = [s for s in stages[:number] if not s.has_head and s.generate is None]
    if not before:
        return Origin(None, "Base")
    last, this = before[-1], stages[number]
    if not last.spec.tuning.is_adapter:
        return Origin(last.number, "Whole")
    # PiSSA's factors are written down as a LoRA of twice the rank: not what its tuning says.
    changed = last.spec.tuning.lora is not None and last.spec.tuning.lora.initialization == "PiSSA"
    if last.spec.tuning == this.spec.tuning and not (this.has_head or changed):
        return Origin(last.number, "Carried")
    return Origin(last.number, "Merged")


def keeps_reference(stages: Sequence[EffectiveStage], number: int) -> bool:
    """Whether the first values of what is trained are kept beside it: its method compares with the model as it was, and
    that is not the model with the adapter switched off."""
    spec = stages[number].spec
    if spec.method.type not in COMPARING:
        return False
    if not spec.tuning.is_adapter:
        # A copy of the model is a high price for a distance that costs nothing.
        return spec.method.type != "GRPO" or bool(spec.method.grpo and spec.method.grpo.beta)
    pissa = spec.tuning.lora is not None and spec.tuning.lora.initialization == "PiSSA"
    return pissa or spec.base_model.adapter_uri is not None or origin(stages, number).how == "Carried"
