"""Which formats of data each method learns from, and what one of its examples is made of."""

from collections.abc import Iterator, Sequence
from typing import Literal

from finetune_api.job import Dataset, FineTuneJobSpec
from finetune_api.model import Path, Problem

Kind = Literal["Tokens", "Pairs", "Unpaired", "Classes", "Prompts"]
"""What an example is: one sequence; a chosen and a rejected one; one with a verdict; one with a class; a prompt."""

SEQUENCES = ("Messages", "PromptCompletion", "Instruction", "Text")
ACCEPTED: dict[str, tuple[str, ...]] = {
    "SFT": (*SEQUENCES, "Labelled"),
    "DPO": ("Preference",),
    "KTO": ("Preference",),
    "ORPO": ("Preference",),
    "Reward": ("Preference",),
    "PPO": ("PromptOnly",),
    "GRPO": ("PromptOnly",),
}
"""By method. KTO takes both layouts of Preference: chosen and rejected, or a completion and whether it is good."""
_KINDS: dict[str, Kind] = {
    "DPO": "Pairs",
    "KTO": "Unpaired",
    "ORPO": "Pairs",
    "Reward": "Pairs",
    "PPO": "Prompts",
    "GRPO": "Prompts",
}


def kind_of(method: str, datasets: Sequence[Dataset]) -> Kind:
    """`SFT` on Labelled data learns classes; elsewhere the method decides."""
    if method == "SFT":
        return "Classes" if any(dataset.format == "Labelled" for dataset in datasets) else "Tokens"
    return _KINDS[method]


def formats_of(method: str, kind: Kind) -> tuple[str, ...]:
    """The formats that examples of this kind are read from; `Auto` chooses among them."""
    if method == "SFT":
        return ("Labelled",) if kind == "Classes" else SEQUENCES
    return ACCEPTED[method]


def problems(spec: FineTuneJobSpec) -> Iterator[Problem]:
    """Datasets whose format the method does not learn from."""
    held_out = [
        (("spec", name, "datasets"), holdout.datasets)
        for name, holdout in (("validation", spec.validation), ("test", spec.test))
        if holdout and holdout.datasets
    ]
    # A job of stages need not train on spec.datasets with spec.method.
    if not spec.stages:
        yield from _problems(spec.method.type, [(("spec", "datasets"), spec.datasets), *held_out])
    for index, stage in enumerate(spec.stages):
        if stage.datasets:
            method = (stage.method or spec.method).type
            yield from _problems(method, [(("spec", "stages", index, "datasets"), stage.datasets)])
    for path, datasets in ((("spec", "datasets"), spec.datasets), *held_out):
        for index, dataset in enumerate(datasets):
            for field, text in _options(spec, dataset, trained=path == ("spec", "datasets")):
                yield Problem((*path, index, field), text)
    if spec.mixing and spec.mixing.type != "Weighted":
        for index, dataset in enumerate(spec.datasets):
            if dataset.weight is not None:
                text = f"found {dataset.weight:g}; mixing.type {spec.mixing.type} uses no weights"
                yield Problem(("spec", "datasets", index, "weight"), text)


def _options(spec: FineTuneJobSpec, dataset: Dataset, trained: bool) -> Iterator[tuple[str, str]]:
    """What cannot be done with one dataset, with the field."""
    answered = ("Auto", "Messages", "PromptCompletion", "Instruction")
    supervised = spec.method.type == "SFT" and dataset.format in answered
    if dataset.shots and not trained:
        yield "shots", f"found {dataset.shots}; data that are only held out have no training rows to draw from"
    elif dataset.shots and not supervised:
        yield "shots", f"found {dataset.shots}; shots need method SFT and the format {' or '.join(answered[1:])}"
    elif dataset.shots and spec.method.sft and spec.method.sft.loss != "Completion":
        yield "shots", f"found {dataset.shots}; with loss {spec.method.sft.loss} the shots would be learned, too"
    if dataset.retrieval and not supervised:
        yield "retrieval", f"needs method SFT and the format {' or '.join(answered[1:])}"


def _problems(method: str, named: Sequence[tuple[Path, Sequence[Dataset]]]) -> Iterator[Problem]:
    # The first is what is trained on.
    kind = kind_of(method, named[0][1])
    for path, datasets in named:
        for index, dataset in enumerate(datasets):
            allowed = formats_of(method, kind) if dataset.format in ACCEPTED[method] else ACCEPTED[method]
            if dataset.format != "Auto" and dataset.format not in allowed:
                what = "beside Labelled data each dataset" if dataset.format in ACCEPTED[method] else f"method {method}"
                text = f"found {dataset.format}; {what} needs {' or '.join(allowed)}"
                yield Problem((*path, index, "format"), text)
