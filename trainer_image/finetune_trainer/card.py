"""What a person reads of a published adapter: the model card and the figures it is drawn from. Pure functions."""

import json
from collections.abc import Sequence

from finetune_api.manifest import RunInfo
from finetune_api.method import DPO, KTO, ORPO, SFT, Method, Reward
from finetune_api.run import PreparedData, RunConfig
from finetune_api.tuning import Freeze, LoRA, Tuning

POINTS = 12
"""Rows of the loss table."""
METHODS = {
    "SFT": "supervised fine-tuning",
    "DPO": "direct preference optimisation (DPO)",
    "KTO": "Kahneman-Tversky optimisation (KTO)",
    "ORPO": "odds-ratio preference optimisation (ORPO)",
    "Reward": "reward modelling",
}
BARS = "▁▂▃▄▅▆▇█"
History = Sequence[dict[str, float]]


def metrics_lines(history: History, metrics: dict[str, float]) -> str:
    """metrics.jsonl: one object per logged step, and a last one with the final figures."""
    return "".join(json.dumps(entry) + "\n" for entry in [*history, {"final": metrics}])


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """The values as one line of bars, lowest to highest; empty for fewer than two."""
    if len(values) < 2:
        return ""
    chosen = (
        [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)] if len(values) > width else values
    )
    low, high = min(chosen), max(chosen)
    return "".join(BARS[round((value - low) / ((high - low) or 1.0) * (len(BARS) - 1))] for value in chosen)


def model_card(config: RunConfig, index: PreparedData, run: RunInfo, history: History, seconds: float) -> str:
    """README.md of the adapter: where it comes from, how it was made, what it gained."""
    tuning = config.spec.tuning
    what = (
        f"A {tuning.type} adapter for `{run.base_model_uri}`, trained"
        if tuning.is_adapter
        else f"`{run.base_model_uri}`, trained ({tuning.type})"
    )
    before = "Earlier adapter" if config.spec.base_model.adapter_uri else "Base model"
    parts = [
        _front_matter(config),
        f"# {config.job}\n\n{what} by {METHODS[config.spec.method.type]}.",
        "## Results\n\n" + _results(run.metrics, before, "With this adapter" if tuning.is_adapter else "This model"),
        "## Use\n\n" + (_use(config) if tuning.is_adapter else USE_MODEL),
        "## Data\n\n" + _data(config, index, run),
        "## Training\n\n" + _training(config, seconds, history),
        "## Loss\n\n" + _loss(history),
        "## Provenance\n\n" + _provenance(config, run),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: RunConfig) -> str:
    # No licence: it depends on the base model's and the data's, which are not ours to state.
    fields = {
        "base_model": config.spec.base_model.uri,
        "library_name": "peft" if config.spec.tuning.is_adapter else "transformers",
        "pipeline_tag": "text-classification" if _scores(config) else "text-generation",
        "tags": [config.spec.tuning.type.lower(), config.spec.method.type.lower()],
    }
    return "---\n" + "\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items()) + "\n---"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _results(metrics: dict[str, float], before: str, after: str) -> str:
    pairs = (
        ("Validation loss", "evalLoss"),
        ("Validation perplexity", "perplexity"),
        ("Reward margin", "rewardMargin"),
        ("Preference accuracy", "preferenceAccuracy"),
        ("Reward of chosen answers", "chosenReward"),
        ("Reward of rejected answers", "rejectedReward"),
    )
    rows = [
        [title, f"{metrics[f'{name}Before']:.4f}", f"{metrics[name]:.4f}"]
        for title, name in pairs
        if name in metrics and f"{name}Before" in metrics
    ]
    if not rows:
        return "No validation data was given, so nothing was evaluated."
    return _table(["", before, after], rows)


USE_MODEL = (
    "```python\n"
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("<this folder>")\n'
    'tokenizer = AutoTokenizer.from_pretrained("<this folder>")\n'
    "```"
)


def _use(config: RunConfig) -> str:
    kind, options = ("SequenceClassification", ", num_labels=1") if _scores(config) else ("CausalLM", "")
    uri = config.spec.base_model.uri
    whole = "\n\nThe folder `merged` is a whole model: it needs no peft and no base model."
    more = whole if config.spec.output.merged else ""
    return (
        "```python\n"
        "from peft import PeftModel\n"
        f"from transformers import AutoModelFor{kind}, AutoTokenizer\n\n"
        f'model = AutoModelFor{kind}.from_pretrained("<a copy of {uri}>"{options})\n'
        'model = PeftModel.from_pretrained(model, "<this folder>")\n'
        'tokenizer = AutoTokenizer.from_pretrained("<this folder>")\n'
        f"```{more}"
    )


def _data(config: RunConfig, index: PreparedData, run: RunInfo) -> str:
    rows = []
    for dataset in config.spec.datasets:
        shards = [shard for shard in index.shards if shard.dataset == dataset.name]
        train = [shard for shard in shards if shard.split == "train"]
        held_out = sum(shard.rows for shard in shards if shard.split == "validation")
        rows.append(
            [
                dataset.name,
                f"`{dataset.uri}`",
                f"{sum(shard.rows for shard in train):,}",
                f"{sum(shard.tokens for shard in train):,}",
                f"{held_out:,}",
                "in proportion" if dataset.weight is None else f"{dataset.weight:g}",
                f"`{run.datasets_sha256.get(dataset.name, '')[:16]}`",
            ]
        )
    head = ["Dataset", "From", "Examples", "Tokens", "Held out", "Weight", "SHA-256"]
    dropped = ", ".join(f"{count:,} {cause}" for cause, count in sorted(index.dropped.items()) if count)
    return _table(head, rows) + (f"\n\nLeft out: {dropped}." if dropped else "")


def _training(config: RunConfig, seconds: float, history: History) -> str:
    spec, sizing = config.spec, config.sizing
    assert sizing
    training = spec.training
    steps = int(history[-1]["step"]) if history else 0
    rows = [
        ["Method", _method(spec.method)],
        [spec.tuning.type, _tuning(spec.tuning)],
        ["Steps", f"{steps:,}, {training.global_batch_size} {'packed rows' if _packed(config) else 'examples'} each"],
        ["Passes", f"{training.epochs:g}" if training.epochs else "by steps" if training.max_steps else "1"],
        ["Learning rate", f"{training.learning_rate:g}, {training.schedule}, warm-up {training.warmup_ratio:.0%}"],
        [
            "Optimizer",
            f"AdamW, weight decay {training.weight_decay:g}, gradients clipped at {training.max_grad_norm:g}",
        ],
        ["Length", f"at most {training.max_length:,} tokens"],
        ["Precision", spec.base_model.dtype],
        ["Seed", str(training.seed)],
        ["Processes", f"{config.devices.world_size} ({config.devices.kind}), {sizing.strategy}"],
        ["Time", f"{seconds:,.0f} s of training"],
    ]
    return _table(["", ""], rows)


def _method(method: Method) -> str:
    match method.type:
        case "SFT":
            return f"SFT, loss on {(method.sft or SFT()).loss}"
        case "DPO":
            dpo = method.dpo or DPO()
            return f"DPO, {dpo.loss} loss, beta {dpo.beta:g}"
        case "KTO":
            kto = method.kto or KTO()
            weights = f"weights {kto.desirable_weight:g} and {kto.undesirable_weight:g}"
            return f"KTO, beta {kto.beta:g}, {weights} of good and bad answers"
        case "ORPO":
            return f"ORPO, beta {(method.orpo or ORPO()).beta:g}"
        case "Reward":
            return f"Reward, centring {(method.reward or Reward()).center_rewards_coefficient:g}"
        case _:
            return method.type


def _scores(config: RunConfig) -> bool:
    return config.spec.method.type == "Reward"


def _tuning(tuning: Tuning) -> str:
    modules = f"on {', '.join(tuning.target_modules)}"
    match tuning.type:
        case "Full":
            return "every weight"
        case "Freeze":
            return f"the last {(tuning.freeze or Freeze()).trainable_layers} blocks and the head"
        case "PromptTuning" | "PrefixTuning":
            return f"{tuning.virtual_tokens} virtual tokens"
        case "IA3":
            return modules
    lora = tuning.lora or LoRA()
    options = "".join(
        f", {words}"
        for words, chosen in (
            ("rank-stabilised", lora.scaling == "RankStabilized"),
            ("PiSSA initialisation", lora.initialization == "PiSSA"),
        )
        if chosen
    )
    return f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}{options}, {modules}"


def _packed(config: RunConfig) -> bool:
    return bool(config.spec.method.sft and config.spec.method.sft.packing)


def _loss(history: History) -> str:
    points = [(int(entry["step"]), entry["loss"]) for entry in history if "loss" in entry]
    if not points:
        return "Nothing was logged."
    count = min(POINTS, len(points))
    chosen = sorted({round(i * (len(points) - 1) / max(1, count - 1)) for i in range(count)})
    rows = [[f"{points[i][0]:,}", f"{points[i][1]:.4f}"] for i in chosen]
    line = sparkline([loss for _, loss in points])
    return (f"`{line}`\n\n" if line else "") + _table(["Step", "Training loss"], rows)


def _provenance(config: RunConfig, run: RunInfo) -> str:
    rows = [
        ["Job", f"{run.namespace}/{run.job}, attempt {run.attempt} (`{run.attempt_uid}`)"],
        ["Spec SHA-256", f"`{run.spec_sha256}`"],
        ["Base model SHA-256", f"`{run.base_model_sha256}`"],
    ]
    if config.spec.base_model.adapter_uri:
        rows.append(["Started from", f"`{config.spec.base_model.adapter_uri}`"])
    if run.image:
        rows.append(["Image", f"`{run.image}`"])
    return _table(["", ""], rows)
