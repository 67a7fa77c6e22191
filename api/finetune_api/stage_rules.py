"""Stages that cannot follow each other, and why: refused before anything runs."""

from collections.abc import Iterator, Sequence

from finetune_api.model import Problem
from finetune_api.stages import STAGE_URI, EffectiveStage, origin

UNMERGEABLE = ("PromptTuning", "PrefixTuning")


def problems(stages: Sequence[EffectiveStage]) -> Iterator[Problem]:
    for stage in stages:
        yield from _rows(stages, stage)
        before, how = origin(stages, stage.number)
        if before is not None and how == "Merged" and stages[before].spec.tuning.type in UNMERGEABLE:
            earlier, tuning = stages[before].name, stages[before].spec.tuning.type
            text = (
                f"{stage.name} cannot start from {earlier}: {tuning} adds tokens, which cannot be merged; it can only "
                "be carried on, with the same tuning and SFT or ORPO"
            )
            yield Problem((*stage.path("tuning"), "type"), text)
    if stages[-1].generate:
        text = f"{stages[-1].name} generates: the last stage must train, since its model is what is published"
        yield Problem(("spec", "stages", stages[-1].number, "generate"), text)


def _rows(stages: Sequence[EffectiveStage], stage: EffectiveStage) -> Iterator[Problem]:
    """Datasets that an earlier stage writes."""
    writing = {earlier.name for earlier in stages[: stage.number] if earlier.generate}
    for number, dataset in enumerate(stage.spec.datasets):
        name = dataset.uri.removeprefix(STAGE_URI)
        if name == dataset.uri or name in writing:
            continue
        known = (
            f"earlier stages that generate: {', '.join(sorted(writing))}" if writing else "no earlier stage generates"
        )
        yield Problem((*stage.path("datasets"), number, "uri"), f"found {dataset.uri}; {known}")
