"""Which parts of a valid spec do not go together, and why: refused before anything runs."""

from collections.abc import Iterator

from finetune_api.job import FineTuneJobSpec, Method
from finetune_api.model import Path, Problem
from finetune_api.sizing import STRATEGIES
from finetune_api.tuning import Tuning


def problems(spec: FineTuneJobSpec) -> Iterator[Problem]:
    """Of spec itself, and of each stage with what it takes from spec."""
    if not spec.stages:
        yield from _tuning(spec, spec.tuning, spec.method, ("spec",))
        if spec.method.type == "KTO" and spec.training.global_batch_size < 2:
            text = "found 1; KTO's reference point needs the answers of other examples: at least 2"
            yield Problem(("spec", "training", "globalBatchSize"), text)
    for index, stage in enumerate(spec.stages):
        path = ("spec", "stages", index) if stage.tuning else ("spec",)
        yield from _tuning(spec, stage.tuning or spec.tuning, stage.method or spec.method, path)


def _tuning(spec: FineTuneJobSpec, tuning: Tuning, method: Method, path: Path) -> Iterator[Problem]:
    strategy = spec.distribution.strategy
    allowed = STRATEGIES.get(tuning.type)
    if allowed and strategy not in ("Auto", *allowed):
        text = f"found {strategy}; {_WHY_NOT_PARTITIONED[tuning.type]}: {' or '.join(allowed)} (or Auto)"
        yield Problem(("spec", "distribution", "strategy"), text)
    if tuning.virtual_tokens and method.sft and method.sft.packing:
        text = f"found true; {tuning.type} puts its tokens before a row, so only the row's first example would see them"
        yield Problem(("spec", "method", "sft", "packing"), text)
    yield from _preference(tuning, method, path)
    if spec.base_model.adapter_uri and method.type in ("DPO", "KTO", "Reward"):
        text = f"{method.type} starts from a whole model; publish the adapter merged and start from that model"
        yield Problem(("spec", "baseModel", "adapterUri"), text)
    if tuning.type == "QLoRA" and tuning.lora and tuning.lora.initialization == "PiSSA":
        text = "found PiSSA; it changes the base weights, which QLoRA has quantised; LoRA and DoRA can start from it"
        yield Problem((*path, "tuning", "lora", "initialization"), text)
    if spec.base_model.adapter_uri and not tuning.is_adapter:
        text = f"{tuning.type} trains the model's own weights; publish the adapter merged and start from that model"
        yield Problem(("spec", "baseModel", "adapterUri"), text)
    if spec.base_model.adapter_uri and tuning.lora and tuning.lora.initialization == "PiSSA":
        text = "found PiSSA; an earlier adapter is the start already: leave one of the two out"
        yield Problem((*path, "tuning", "lora", "initialization"), text)
    if spec.output.merged and tuning.type in _WHY_NOT_MERGED:
        yield Problem(("spec", "output", "merged"), f"found true; {_WHY_NOT_MERGED[tuning.type]}; leave it out")


def _preference(tuning: Tuning, method: Method, path: Path) -> Iterator[Problem]:
    if method.type in ("DPO", "KTO"):
        why = f"{method.type} compares with the model as it was, which it finds by switching the adapter off"
        if not tuning.is_adapter:
            yield Problem((*path, "tuning", "type"), f"found {tuning.type}; {why}: {', '.join(ADAPTERS)}")
        if tuning.lora and tuning.lora.initialization == "PiSSA":
            text = f"found PiSSA; it changes the base weights, and {why}: Default"
            yield Problem((*path, "tuning", "lora", "initialization"), text)
    if method.type == "Reward" and tuning.type not in SCORING:
        text = f"found {tuning.type}; the head of a reward model is published with an adapter: {', '.join(SCORING)}"
        yield Problem((*path, "tuning", "type"), text)


_WHOLE = "trains the model's own weights, so a whole model is published in any case"
_WHY_NOT_MERGED = {
    "PromptTuning": "PromptTuning adds tokens, not weights: there is nothing to merge",
    "PrefixTuning": "PrefixTuning adds tokens, not weights: there is nothing to merge",
    "Freeze": f"Freeze {_WHOLE}",
    "Full": f"Full {_WHOLE}",
}
ADAPTERS = ("LoRA", "QLoRA", "DoRA", "IA3", "PromptTuning", "PrefixTuning")
SCORING = ("LoRA", "QLoRA", "DoRA", "IA3")
"""What a model with a head of one score is tuned by."""
_WHY_NOT_PARTITIONED = {
    "QLoRA": "QLoRA's quantised weights cannot be partitioned",
    "DoRA": "DoRA needs the norms of whole weights",
    "PromptTuning": "PromptTuning's few parameters are not partitioned",
    "PrefixTuning": "PrefixTuning's few parameters are not partitioned",
}
