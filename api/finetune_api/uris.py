"""Every URI that a job names, with what it is for; and the prefixes that a profile allows."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from finetune_api.dataset import Dataset, Holdout
from finetune_api.evaluation import Retention
from finetune_api.job import FineTuneJobSpec
from finetune_api.method import Method
from finetune_api.model import Path
from finetune_api.stages import STAGE_URI

NAMESPACE = "{namespace}"
"""What stands for the job's namespace in a prefix."""


class Use(NamedTuple):
    path: Path
    uri: str
    purpose: Literal["BaseModel", "Model", "Dataset", "Output"]
    """Model: an adapter, a reward model or a teacher, which another job may have published."""


def uses(spec: FineTuneJobSpec) -> Iterator[Use]:
    """What is read or written, in the order of the spec; not the rows that stages hand to each other."""
    yield Use(("spec", "baseModel", "uri"), spec.base_model.uri, "BaseModel")
    if spec.base_model.adapter_uri:
        yield Use(("spec", "baseModel", "adapterUri"), spec.base_model.adapter_uri, "Model")
    yield from _of_method(("spec", "method"), spec.method)
    yield from _of_datasets(("spec", "datasets"), spec.datasets)
    held_out: tuple[tuple[Path, Holdout | Retention | None], ...] = (
        (("spec", "validation", "datasets"), spec.validation),
        (("spec", "test", "datasets"), spec.test),
        (("spec", "evaluation", "retention", "datasets"), spec.evaluation.retention),
    )
    for path, holdout in held_out:
        yield from _of_datasets(path, (holdout and holdout.datasets) or ())
    if spec.evaluation.reward_model:
        yield Use(("spec", "evaluation", "rewardModel", "uri"), spec.evaluation.reward_model.uri, "Model")
    for number, stage in enumerate(spec.stages):
        path = ("spec", "stages", number)
        if stage.method:
            yield from _of_method((*path, "method"), stage.method)
        yield from _of_datasets((*path, "datasets"), stage.datasets or ())
        if stage.generate and stage.generate.teacher:
            yield Use((*path, "generate", "teacher", "uri"), stage.generate.teacher.uri, "Model")
    if spec.checkpoint.uri:
        yield Use(("spec", "checkpoint", "uri"), spec.checkpoint.uri, "Output")
    yield Use(("spec", "output", "uri"), spec.output.uri, "Output")


def _of_method(path: Path, method: Method) -> Iterator[Use]:
    for name, settings in (("ppo", method.ppo), ("grpo", method.grpo)):
        if settings and settings.reward_model:
            yield Use((*path, name, "rewardModel", "uri"), settings.reward_model.uri, "Model")


def _of_datasets(path: Path, datasets: Sequence[Dataset]) -> Iterator[Use]:
    for index, dataset in enumerate(datasets):
        if not dataset.uri.startswith(STAGE_URI):
            yield Use((*path, index, "uri"), dataset.uri, "Dataset")


def allowed(use: Use, prefixes: Sequence[str]) -> bool:
    """Whether one of these prefixes, which hold no `{namespace}` any more, reaches it."""
    uri = use.uri
    if use.purpose != "Dataset" and uri.startswith("s3://"):
        # What is read or written is below it in any case; a dataset may be a single object.
        uri = uri.rstrip("/") + "/"
    return any(below(uri, prefix) for prefix in prefixes)


def below(uri: str, prefix: str) -> bool:
    """Whole segments alone, so that `s3://data/team-a` does not reach `s3://data/team-ab`."""
    if prefix.endswith("/"):
        return uri.startswith(prefix)
    ends = ("/", "@") if prefix.startswith("hf://") else ("/",)
    return uri == prefix or uri.startswith(tuple(prefix + end for end in ends))
