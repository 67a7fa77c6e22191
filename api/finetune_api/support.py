"""What is modelled and not yet built: refused with a sentence, by `finetune lint` and by the operator alike."""

from collections.abc import Iterator

from finetune_api import combinations, dataset_rules, rollout_rules, stage_rules
from finetune_api.job import FineTuneJobSpec
from finetune_api.model import Path, Problem
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.stages import STAGE_URI, EffectiveStage, effective


def unsupported(spec: FineTuneJobSpec) -> list[Problem]:
    """Fields of a valid spec that this version does not act on, each as a problem."""
    return list(dict.fromkeys(_unsupported(spec)))


def _refuse(path: Path, found: object, allowed: str) -> Problem:
    return Problem(path, f"found {found!r}; this version supports {allowed}")


def _unsupported(spec: FineTuneJobSpec) -> Iterator[Problem]:
    def refuse(*path: str | int, found: object, allowed: str) -> Problem:
        return _refuse(("spec", *path), found, allowed)

    for stage in effective(spec):
        yield from _unsupported_stage(stage)
        yield from dataset_rules.problems(stage)
        yield from combinations.problems(stage)
    if not spec.base_model.uri.startswith("s3://"):
        yield refuse("baseModel", "uri", found=spec.base_model.uri, allowed="s3:// only")
    if spec.test:
        yield refuse("test", found="a test split", allowed="validation only")
    yield from stage_rules.problems(effective(spec))
    yield from rollout_rules.problems(effective(spec))
    if extra := [m for m in spec.evaluation.metrics if m not in ("Loss", "Perplexity")]:
        yield refuse("evaluation", "metrics", found=extra, allowed="Loss and Perplexity")
    if spec.evaluation.retention:
        yield refuse("evaluation", "retention", found="retention", allowed="no retention data")
    if spec.evaluation.gates:
        yield refuse("evaluation", "gates", found=[g.metric for g in spec.evaluation.gates], allowed="no gates")
    if spec.tracking and spec.tracking != type(spec.tracking)():
        yield refuse("tracking", found="tracking", allowed="metrics in the status and in metrics.jsonl")


def _unsupported_stage(stage: EffectiveStage) -> Iterator[Problem]:
    spec = stage.spec
    if stage.generate:
        yield _refuse(("spec", "stages", stage.number, "generate"), "a stage that generates", "stages that train")
    held_out = spec.validation.datasets if spec.validation and spec.validation.datasets else []
    for path, datasets in ((stage.path("datasets"), spec.datasets), (("spec", "validation", "datasets"), held_out)):
        for index, dataset in enumerate(datasets):
            # What an earlier stage writes may be trained on, not held out.
            if dataset.uri.startswith(STAGE_URI) and datasets is held_out:
                yield _refuse((*path, index, "uri"), dataset.uri, "s3:// only")


def unsupported_profile(spec: FineTuneProfileSpec) -> list[Problem]:
    """The same for a profile: a limit that is not enforced must not be believed."""
    checks = (
        ("allowedUris", spec.allowed_uris != type(spec.allowed_uris)(), "no URI prefixes"),
        ("locked", bool(spec.locked), "no locked fields"),
        ("budget", spec.budget is not None, "no budget"),
        ("defaults", spec.defaults is not None, "no defaults"),
        ("networkPolicy", spec.network_policy, "policies that are applied beside it"),
    )
    return [
        Problem(("spec", name), f"is not enforced yet; this version supports {allowed}")
        for name, present, allowed in checks
        if present
    ]
