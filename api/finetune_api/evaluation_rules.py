"""What cannot be measured, and gates on figures that will not exist: refused before a GPU is asked for."""

from collections.abc import Iterator, Sequence

from finetune_api.dataset import Dataset, Holdout
from finetune_api.evaluation import Gate
from finetune_api.figures import ANSWERS, CLASSES, TRAINING, Figure, HeldOut, parse
from finetune_api.formats import SEQUENCES, kind_of
from finetune_api.job import FineTuneJobSpec
from finetune_api.method import SFT
from finetune_api.model import Path, Problem
from finetune_api.stages import EffectiveStage

TOKENS = ("evalLoss", "perplexity", "tokenAccuracy")
_PREFERENCES = ("evalLoss", "rewardMargin", "preferenceAccuracy", "chosenReward", "rejectedReward")
_REWARDS = ("meanReward", "answerTokens", "kl")
_FIELD = ("spec", "evaluation")


def problems(spec: FineTuneJobSpec, stages: Sequence[EffectiveStage]) -> Iterator[Problem]:
    """`stages`: the effective ones of `spec`."""
    trained = [stage for stage in stages if stage.generate is None]
    yield from _metrics(spec, trained)
    yield from _reward_model(spec)
    yield from _retention(spec, trained)
    for number, gate in enumerate(spec.evaluation.gates):
        if why := _gate(spec, stages, gate):
            yield Problem((*_FIELD, "gates", number, "metric"), f"found {gate.metric!r}; {why}")


def _metrics(spec: FineTuneJobSpec, stages: Sequence[EffectiveStage]) -> Iterator[Problem]:
    for number, metric in enumerate(spec.evaluation.metrics):
        place = (*_FIELD, "metrics", number)
        if metric in ("Loss", "Perplexity"):
            continue
        if not any(_held_out(stage) for stage in stages) and not spec.evaluation.retention:
            yield Problem(place, f"found {metric}; nothing is held out: give validation or test data")
        elif metric == "TokenAccuracy":
            if not any(_kind(stage) == "Tokens" for stage in stages):
                yield Problem(place, "found TokenAccuracy; it is measured with method SFT on texts alone")
        elif metric in CLASSES and any(_kind(stage) == "Classes" for stage in stages):
            continue
        elif metric not in ANSWERS:
            yield Problem(place, f"found {metric}; it needs Labelled data (method SFT)")
        elif not any(_answers(stage) for stage in stages):
            yield Problem(place, f"found {metric}; it compares answers, and no stage's data ask for any")


def _reward_model(spec: FineTuneJobSpec) -> Iterator[Problem]:
    model, wanted = spec.evaluation.reward_model, "WinRate" in spec.evaluation.metrics
    if wanted and model is None:
        yield Problem((*_FIELD, "rewardModel"), "is required where metrics has WinRate")
    if model and not model.uri.startswith("s3://"):
        yield Problem((*_FIELD, "rewardModel", "uri"), f"found {model.uri!r}; this version supports s3:// only")
    if model and not wanted:
        yield Problem((*_FIELD, "rewardModel"), f"found {model.uri}; it is asked only where metrics has WinRate")


def _retention(spec: FineTuneJobSpec, stages: Sequence[EffectiveStage]) -> Iterator[Problem]:
    retention = spec.evaluation.retention
    if retention is None:
        return
    place: Path = (*_FIELD, "retention")
    if all(stage.has_head for stage in stages):
        yield Problem(place, "the loss of answers cannot be measured: the model gets a new head and answers no more")
    for number, dataset in enumerate(retention.datasets):
        if dataset.format not in ("Auto", *SEQUENCES):
            text = f"found {dataset.format}; retention needs {' or '.join(SEQUENCES)}"
            yield Problem((*place, "datasets", number, "format"), text)
        for option, given in (("shots", dataset.shots), ("retrieval", dataset.retrieval)):
            if given:
                yield Problem((*place, "datasets", number, option), "is for data that are trained on")


def _gate(spec: FineTuneJobSpec, stages: Sequence[EffectiveStage], gate: Gate) -> str:
    """Why its figure cannot exist; empty where it may."""
    figure = parse(gate.metric)
    named = {stage.name: stage for stage in stages if stage.name}
    for name in (figure.stage, figure.after):
        if name and name not in named:
            told = f"its stages are {', '.join(named)}" if named else "the job has no stages"
            return f"there is no stage {name!r}: {told}"
    stage = named[figure.stage] if figure.stage else stages[-1]
    if figure.after:
        return "" if figure.base == "evalLoss" else "of an earlier stage's data evalLoss alone is measured"
    if figure.base in (*TRAINING, "trainRows", "bestStep"):
        return ""
    wanted = spec.evaluation.metrics
    known = sorted(_known(stage, figure.split) | {name for m in wanted if m in ANSWERS for name in _told(stage, m)})
    if figure.base not in known:
        metric = next((m for m, names in (ANSWERS | CLASSES).items() if figure.base in names), None)
        if metric and metric not in wanted and _answers(stage):
            return f"evaluation.metrics has no {metric}"
        return f"its figures are {', '.join(known)}"
    return _place(spec, stage, figure)


def _place(spec: FineTuneJobSpec, stage: EffectiveStage, figure: Figure) -> str:
    """Why the figure is not measured where the gate looks for it."""
    datasets = _datasets(stage, figure.split)
    if datasets is None:
        field = "spec.evaluation.retention" if figure.split == "retention" else f"spec.{figure.split}"
        return f"it needs {field}"
    if not figure.dataset:
        return ""
    dataset = next((d for d in datasets if d.name == figure.dataset), None)
    if dataset is None:
        return f"there is no dataset {figure.dataset!r}: there are {', '.join(d.name for d in datasets)}"
    if figure.slice and not (dataset.columns and dataset.columns.slice):
        return f"dataset {dataset.name} has no columns.slice"
    return ""


def _datasets(stage: EffectiveStage, split: HeldOut) -> list[Dataset] | None:
    """What is held out of what; None where nothing is."""
    spec = stage.spec
    if split == "retention":
        return list(spec.evaluation.retention.datasets) if spec.evaluation.retention else None
    holdout: Holdout | None = spec.validation if split == "validation" else spec.test
    return (list(holdout.datasets) if holdout.datasets else list(spec.datasets)) if holdout else None


def _held_out(stage: EffectiveStage) -> bool:
    return stage.spec.validation is not None or stage.spec.test is not None


def _kind(stage: EffectiveStage) -> str:
    return kind_of(stage.spec.method.type, stage.spec.datasets)


def _known(stage: EffectiveStage, split: HeldOut) -> set[str]:
    """What the stage's method measures by itself."""
    kind = _kind(stage)
    if split == "retention" or kind == "Tokens":
        return set() if stage.has_head else set(TOKENS)
    if kind == "Classes":
        return {"evalLoss", *(name for names in CLASSES.values() for name in names)}
    return set(_REWARDS if kind == "Prompts" else _PREFERENCES)


def _told(stage: EffectiveStage, metric: str) -> tuple[str, ...]:
    return next((names for known, names in ANSWERS.items() if known == metric), ()) if _answers(stage) else ()


def _answers(stage: EffectiveStage) -> bool:
    """Whether its data hold prompts with answers."""
    spec = stage.spec
    if stage.has_head:
        return False
    # Every token is learned: nothing of a row is a prompt.
    whole = spec.method.type == "SFT" and (spec.method.sft or SFT()).loss == "All"
    texts = bool(spec.datasets) and all(dataset.format == "Text" for dataset in spec.datasets)
    return not whole and not texts
