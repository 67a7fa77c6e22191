"""Which parts of a valid spec do not go together, and why: refused before anything runs."""

from collections.abc import Iterator

from finetune_api.formats import kind_of
from finetune_api.model import Problem
from finetune_api.sizing import STRATEGIES
from finetune_api.stages import EffectiveStage
from finetune_api.watched import figures_of, watched


def problems(stage: EffectiveStage) -> Iterator[Problem]:
    spec = stage.spec
    tuning, method, strategy = spec.tuning, spec.method, spec.distribution.strategy
    if method.type == "KTO" and spec.training.global_batch_size < 2:
        text = "found 1; KTO's reference point needs the answers of other examples: at least 2"
        yield Problem((*stage.path("training"), "globalBatchSize"), text)
    allowed = STRATEGIES.get(tuning.type)
    if allowed and strategy not in ("Auto", *allowed):
        text = f"found {strategy}; {_WHY_NOT_PARTITIONED[tuning.type]}: {' or '.join(allowed)} (or Auto)"
        yield Problem(("spec", "distribution", "strategy"), text)
    if tuning.virtual_tokens and method.sft and method.sft.packing:
        text = f"found true; {tuning.type} puts its tokens before a row, so only the row's first example would see them"
        yield Problem((*stage.path("method"), "sft", "packing"), text)
    if stage.has_head and method.sft and method.sft.packing:
        text = "found true; a class is of a whole row, so each row of Labelled data holds one text"
        yield Problem((*stage.path("method"), "sft", "packing"), text)
    if stage.has_head and method.sft and method.sft.loss != "Completion":
        text = f"found {method.sft.loss}; of Labelled data classes are learned, not tokens: leave it out"
        yield Problem((*stage.path("method"), "sft", "loss"), text)
    yield from _head(stage)
    yield from _earlier_adapter(stage)
    yield from _evaluation(stage)
    if tuning.type == "QLoRA" and tuning.lora and tuning.lora.initialization == "PiSSA":
        text = "found PiSSA; it changes the base weights, which QLoRA has quantised; LoRA and DoRA can start from it"
        yield Problem((*stage.path("tuning"), "lora", "initialization"), text)
    if spec.output.merged and tuning.type in _WHY_NOT_MERGED:
        yield Problem(("spec", "output", "merged"), f"found true; {_WHY_NOT_MERGED[tuning.type]}; leave it out")


def _earlier_adapter(stage: EffectiveStage) -> Iterator[Problem]:
    """A job that starts from an adapter: baseModel.adapterUri."""
    spec, tuning, method = stage.spec, stage.spec.tuning, stage.spec.method
    if not spec.base_model.adapter_uri:
        return
    if stage.has_head:
        what = method.type if method.type != "SFT" else "a new head for Labelled data"
        text = f"{what} starts from a whole model; publish the adapter merged and start from that model"
        yield Problem(("spec", "baseModel", "adapterUri"), text)
    if not tuning.is_adapter:
        text = f"{tuning.type} trains the model's own weights; publish the adapter merged and start from that model"
        yield Problem(("spec", "baseModel", "adapterUri"), text)
    if tuning.lora and tuning.lora.initialization == "PiSSA":
        text = "found PiSSA; an earlier adapter is the start already: leave one of the two out"
        yield Problem((*stage.path("tuning"), "lora", "initialization"), text)


def _evaluation(stage: EffectiveStage) -> Iterator[Problem]:
    """What is measured while training needs something to be measured on."""
    spec, stopping = stage.spec, stage.spec.training.early_stopping
    why = "there is no validation data: say which with spec.validation"
    if stage.generate:
        return
    if spec.evaluation.every_steps and not spec.validation:
        yield Problem(("spec", "evaluation", "everySteps"), f"found {spec.evaluation.every_steps}; {why}")
    if stopping is None:
        return
    own = stage.own.training if stage.own else None
    path = (*(stage.path("training") if own and own.early_stopping else ("spec", "training")), "earlyStopping")
    if not spec.validation:
        yield Problem(path, f"found metric {stopping.metric}; {why}")
    kind = kind_of(spec.method.type, spec.datasets)
    if watched(stopping.metric, spec.method.type, kind) is None:
        allowed = ", ".join(figures_of(spec.method.type, kind))
        text = f"found {stopping.metric}; {spec.method.type} measures {allowed} while it trains"
        yield Problem((*path, "metric"), text)


def _head(stage: EffectiveStage) -> Iterator[Problem]:
    tuning, path = stage.spec.tuning, stage.path("tuning")
    if stage.has_head and tuning.type not in SCORING:
        text = f"found {tuning.type}; peft trains no new head beside virtual tokens: {', '.join(SCORING)}"
        yield Problem((*path, "type"), text)


_WHOLE = "trains the model's own weights, so a whole model is published in any case"
_WHY_NOT_MERGED = {
    "PromptTuning": "PromptTuning adds tokens, not weights: there is nothing to merge",
    "PrefixTuning": "PrefixTuning adds tokens, not weights: there is nothing to merge",
    "Freeze": f"Freeze {_WHOLE}",
    "Full": f"Full {_WHOLE}",
}
SCORING = ("LoRA", "QLoRA", "DoRA", "IA3", "Freeze", "Full")
"""What a model with a new head, for scores or classes, is tuned by."""
_WHY_NOT_PARTITIONED = {
    "QLoRA": "QLoRA's quantised weights cannot be partitioned",
    "DoRA": "DoRA needs the norms of whole weights",
    "IA3": "IA3's few parameters are not partitioned",
    "PromptTuning": "PromptTuning's few parameters are not partitioned",
    "PrefixTuning": "PrefixTuning's few parameters are not partitioned",
}
