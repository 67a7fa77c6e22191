"""Datasets that a stage's method does not learn from, and options of theirs that it cannot follow."""

from collections.abc import Iterator

from finetune_api.dataset import Dataset
from finetune_api.formats import ACCEPTED, formats_of, kind_of
from finetune_api.job import FineTuneJobSpec
from finetune_api.model import Path, Problem
from finetune_api.stages import EffectiveStage


def problems(stage: EffectiveStage) -> Iterator[Problem]:
    spec, trained = stage.spec, stage.path("datasets")
    held_out = [
        (("spec", name, "datasets"), holdout.datasets)
        for name, holdout in (("validation", spec.validation), ("test", spec.test))
        if holdout and holdout.datasets
    ]
    # The seeds of a stage that generates are rows that answer something.
    method = "SFT" if stage.generate else spec.method.type
    kind = kind_of(method, spec.datasets)
    for path, datasets in ((trained, spec.datasets), *held_out):
        for number, dataset in enumerate(datasets):
            place = (*path, number)
            allowed = formats_of(method, kind) if dataset.format in ACCEPTED[method] else ACCEPTED[method]
            if dataset.format != "Auto" and dataset.format not in allowed:
                what = "beside Labelled data each dataset" if dataset.format in ACCEPTED[method] else f"method {method}"
                text = f"found {dataset.format}; {what} needs {' or '.join(allowed)}"
                yield Problem((*place, "format"), text)
            yield from _options(spec, dataset, place, trained=path == trained)
    if spec.mixing and spec.mixing.type != "Weighted":
        for number, dataset in enumerate(spec.datasets):
            if dataset.weight is not None:
                text = f"found {dataset.weight:g}; mixing.type {spec.mixing.type} uses no weights"
                yield Problem((*trained, number, "weight"), text)


def _options(spec: FineTuneJobSpec, dataset: Dataset, place: Path, trained: bool) -> Iterator[Problem]:
    """What cannot be done with one dataset."""
    answered = ("Auto", "Messages", "PromptCompletion", "Instruction")
    supervised = spec.method.type == "SFT" and dataset.format in answered
    why = ""
    if dataset.shots and not trained:
        why = "data that are only held out have no training rows to draw from"
    elif dataset.shots and not supervised:
        why = f"shots need method SFT and the format {' or '.join(answered[1:])}"
    elif dataset.shots and spec.method.sft and spec.method.sft.loss != "Completion":
        why = f"with loss {spec.method.sft.loss} the shots would be learned, too"
    if why:
        yield Problem((*place, "shots"), f"found {dataset.shots}; {why}")
    if dataset.retrieval and not supervised:
        yield Problem((*place, "retrieval"), f"needs method SFT and the format {' or '.join(answered[1:])}")
