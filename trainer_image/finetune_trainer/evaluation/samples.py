"""What the model answered before training and after it: a few for people to read."""

from pydantic import BaseModel, ConfigDict

from finetune_api.figures import HeldOut

SAMPLES = 10
SAMPLE_TOKENS = 64
"""Where nothing but samples is asked for."""


class Sample(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    split: HeldOut
    dataset: str
    prompt: str
    """As the model sees it, without special tokens."""
    reference: str
    before: str | None
    """None where it is not known: an earlier attempt measured it, and what it wrote down is gone."""
    after: str


class Answered(BaseModel):
    """The answers of one moment, as they are kept in the scratch prefix: by split, one for each question."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    answers: dict[HeldOut, list[list[int]]] = {}
    """Tokens."""
