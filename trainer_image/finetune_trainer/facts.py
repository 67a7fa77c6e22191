"""What is told of a finished job, in words and rows: for the model card and the report alike. Pure functions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from finetune_api.figures import Figure, parse, ranked
from finetune_api.job import FineTuneJobSpec
from finetune_api.manifest import RunInfo
from finetune_api.method import DPO, GRPO, KTO, ORPO, PPO, SFT, Method, Reward
from finetune_api.run import RunConfig
from finetune_api.sizing import Sizing
from finetune_api.stages import EffectiveStage
from finetune_api.training import Training
from finetune_api.tuning import Freeze, LoRA, Tuning
from finetune_trainer.evaluation.samples import Sample
from finetune_trainer.results import StageEnd

METHODS = {
    "SFT": "supervised fine-tuning",
    "DPO": "direct preference optimisation (DPO)",
    "KTO": "Kahneman-Tversky optimisation (KTO)",
    "ORPO": "odds-ratio preference optimisation (ORPO)",
    "Reward": "reward modelling",
    "PPO": "proximal policy optimisation (PPO)",
    "GRPO": "group-relative policy optimisation (GRPO)",
}
TITLES = {
    "evalLoss": "loss",
    "perplexity": "perplexity",
    "tokenAccuracy": "token accuracy",
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "exactMatch": "exact match",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "meteor": "METEOR (exact and stem)",
    "winRate": "win rate",
    "rewardMargin": "reward margin",
    "preferenceAccuracy": "preference accuracy",
    "chosenReward": "reward of chosen answers",
    "rejectedReward": "reward of rejected answers",
    "meanReward": "mean reward",
    "kl": "KL from the model before",
}
LOWER = ("evalLoss", "perplexity")
UNJUDGED = ("chosenReward", "rejectedReward", "kl")
"""Figures that are neither better higher nor better lower by themselves."""
Rows = list[list[str]]


class Evidence(NamedTuple):
    """What was seen of the model beside figures."""

    classes: Sequence[str] = ()
    confusion: Sequence[Sequence[int]] = ()
    """Examples of the test data, else of the validation data, by class (outer) and by the class that the model took
    them for; may be empty."""
    samples: Sequence[Sample] = ()


class Facts(NamedTuple):
    config: RunConfig
    """The job's."""
    stages: Sequence[EffectiveStage]
    kind: Literal["Adapter", "Model"]
    run: RunInfo
    courses: Sequence[StageEnd]
    """Of each stage that was trained, in their order; a job without stages has one, without a name."""
    data: Mapping[str, Mapping[str, Any]] = {}
    """data-report.json of each stage, by its name."""
    evidence: Evidence = Evidence()

    @property
    def spec(self) -> FineTuneJobSpec:
        """Of the last stage."""
        return self.stages[-1].spec

    @property
    def trained(self) -> list[tuple[EffectiveStage, StageEnd]]:
        known = {course.name: course for course in self.courses}
        return [(stage, known[stage.name]) for stage in self.stages if stage.name in known]

    @property
    def scores(self) -> bool:
        """Whether what is published has a head for scores or classes in place of a vocabulary."""
        return self.stages[-1].has_head


class Row(NamedTuple):
    """A figure before and after."""

    title: str
    figure: Figure
    before: float | None
    after: float | None

    @property
    def better(self) -> bool | None:
        """None where that cannot be said."""
        if self.before is None or self.after is None or self.before == self.after or self.figure.base in UNJUDGED:
            return None
        return (self.after < self.before) == (self.figure.base in LOWER)


def title_of(figure: Figure) -> str:
    known = TITLES.get(figure.base, figure.base)
    return f"{figure.split.capitalize()} {known}"


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"


def results(metrics: Mapping[str, float], stage: str = "") -> list[Row]:
    """What was measured over everything, the most telling first; `stage`: an earlier one's, by its end."""
    rows = rows_of(metrics)
    return [row for row in rows if row.figure.stage == stage and not (row.figure.dataset or row.figure.after)]


def groups(metrics: Mapping[str, float]) -> list[Row]:
    """What was measured of each dataset and slice."""
    return [row for row in rows_of(metrics) if row.figure.dataset and not row.figure.stage]


def rows_of(metrics: Mapping[str, float]) -> list[Row]:
    known = {parse(name): value for name, value in metrics.items()}
    figures = dict.fromkeys(parse(name)._replace(before=False) for name in ranked(metrics))
    return [
        Row(title_of(figure), figure, known.get(figure._replace(before=True)), known.get(figure))
        for figure in figures
        if figure.base in TITLES
    ]


def forgetting(metrics: Mapping[str, float]) -> list[tuple[str, str, str, float]]:
    """Stage whose data it is of, figure, stage after which it was measured (its own at first), value."""
    found = []
    own = {parse(name): value for name, value in metrics.items() if parse(name).stage}
    for figure, value in own.items():
        if figure.base in TITLES and not (figure.before or figure.dataset):
            again = [other for other in own if other._replace(after="") == figure._replace(after="") and other.after]
            if again:
                found.append((figure.stage, title_of(figure), figure.after or figure.stage, value))
    return found


def earlier_results(facts: Facts) -> list[tuple[str, list[Row]]]:
    """Of each stage but the last, where something was measured."""
    found = [(stage.name, results(facts.run.metrics, stage.name)) for stage in facts.stages[:-1]]
    return [(name, rows) for name, rows in found if rows]


def what_it_is(facts: Facts) -> str:
    """In one sentence, with the base model as code between back-ticks."""
    tuning, base = facts.spec.tuning, facts.run.base_model_uri
    if facts.kind == "Adapter":
        what = f"A {tuning.type} adapter for `{base}`, trained"
    elif tuning.is_adapter:
        what = f"`{base}`, trained ({tuning.type}, merged)"
    else:
        what = f"`{base}`, trained ({tuning.type})"
    steps = [method_name(stage) for stage in facts.stages]
    return f"{what} by {', then '.join(dict.fromkeys(steps))}."


def method_name(stage: EffectiveStage) -> str:
    method = stage.spec.method
    if stage.generate:
        return "learning from rows that a model wrote"
    if method.type == "SFT" and stage.has_head:
        return "learning to classify"
    if method.type == "GRPO" and (method.grpo or GRPO()).advantage == "LeaveOneOut":
        return "reinforcement with leave-one-out baselines (RLOO)"
    return METHODS[method.type]


def method_words(stage: EffectiveStage) -> str:
    method: Method = stage.spec.method
    match method.type:
        case "SFT":
            return "SFT of a classification head" if stage.has_head else f"SFT, loss on {(method.sft or SFT()).loss}"
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
        case "PPO":
            ppo = method.ppo or PPO()
            against = f"against {ppo.reward_model.uri}" if ppo.reward_model else "against the reward model before"
            return f"PPO {against}, KL coefficient {ppo.kl_coefficient:g}, clipped at {ppo.clip_range:g}"
        case "GRPO":
            grpo = method.grpo or GRPO()
            by = [f"`{reward.name}`" for reward in grpo.rewards]
            by += [grpo.reward_model.uri] if grpo.reward_model else []
            by = by or ["the reward model before"]
            judged = f"judged by {', '.join(by)}"
            return f"GRPO ({grpo.advantage} advantages), {grpo.generations} answers to a prompt, {judged}"


def tuning_words(tuning: Tuning) -> str:
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


def training_rows(facts: Facts, stage: EffectiveStage, course: StageEnd) -> Rows:
    """How a stage was trained: name and value."""
    spec, training = stage.spec, stage.spec.training
    config, devices = facts.config, facts.config.devices
    sizing = config.stage_sizings[stage.number] if config.stage_sizings else config.sizing
    steps = int(course.history[-1]["step"]) if course.history else 0
    packed = bool(spec.method.sft and spec.method.sft.packing)
    rows = [
        ["Method", method_words(stage)],
        [spec.tuning.type, tuning_words(spec.tuning)],
        ["Steps", f"{steps:,}, {training.global_batch_size} {'packed rows' if packed else 'examples'} each"],
        ["Passes", f"{training.epochs:g}" if training.epochs else "by steps" if training.max_steps else "1"],
        ["Learning rate", f"{training.learning_rate:g}, {training.schedule}, warm-up {training.warmup_ratio:.0%}"],
        [
            "Optimizer",
            f"AdamW, weight decay {training.weight_decay:g}, gradients clipped at {training.max_grad_norm:g}",
        ],
        ["Length", f"at most {training.max_length:,} tokens"],
        ["Precision", spec.base_model.dtype],
        ["Seed", str(training.seed)],
        ["Processes", f"{devices.world_size} ({devices.kind}){_strategy(sizing)}"],
        ["Time", f"{course.seconds:,.0f} s of training"],
    ]
    if "bestStep" in course.metrics:
        rows.insert(3, ["Weights", _weights(training, course, steps)])
    return ([["Starts from", course.origin]] if course.origin else []) + rows


def _weights(training: Training, course: StageEnd, steps: int) -> str:
    """Of early stopping: whose weights they are."""
    best = int(course.metrics["bestStep"])
    metric = training.early_stopping.metric if training.early_stopping else ""
    ended = f"; training ended after step {steps:,}" if steps > best else ""
    return f"of step {best:,}, the best by {metric}{ended}"


MIX_HEAD = ["Dataset", "Planned share", "Share", "Rows", "Tokens"]


def mix_rows(course: StageEnd) -> Rows:
    """Below MIX_HEAD: what each dataset was to give of the rows that were learned, and what it gave."""
    prefix, found = "trainRows.", course.metrics
    rows = {name.removeprefix(prefix): count for name, count in found.items() if name.startswith(prefix)}
    total = sum(rows.values()) or 1.0
    return [
        [
            name,
            f"{found.get(f'plannedShare.{name}', 0.0):.1%}",
            f"{count / total:.1%}",
            f"{int(count):,}",
            f"{int(found.get(f'trainTokens.{name}', 0)):,}",
        ]
        for name, count in rows.items()
    ]


def _strategy(sizing: Sizing | None) -> str:
    return f", {sizing.strategy}" if sizing else ""


DATA_HEAD = ["Dataset", "From", "Examples", "Tokens", "Held out", "Weight", "SHA-256"]


def data_rows(facts: Facts, stage: EffectiveStage) -> Rows:
    """The datasets of a stage, below DATA_HEAD."""
    spec = stage.spec
    trained = {dataset.name: dataset for dataset in spec.datasets}
    held = {
        dataset.name: dataset
        for holdout in (spec.validation, spec.test, spec.evaluation.retention)
        for dataset in (holdout.datasets if holdout else None) or []
    }
    rows = []
    for report in facts.data.get(stage.name, {}).get("datasets", []):
        name, splits = str(report.get("name", "")), report.get("splits", {})
        dataset = trained.get(name) if "train" in splits else held.get(name) or trained.get(name)
        train = splits.get("train", {})
        others = sum(part.get("examples", 0) for split, part in splits.items() if split != "train")
        weight = dataset.weight if dataset else None
        sha256 = next((digest for digest in _digests(facts.run, stage.name, name, splits)), "")
        rows.append(
            [
                name,
                f"`{dataset.uri}`" if dataset else "",
                f"{train.get('examples', 0):,}",
                f"{train.get('tokens', 0):,}",
                f"{others:,}",
                "in proportion" if weight is None else f"{weight:g}",
                f"`{sha256[:16]}`",
            ]
        )
    return rows


def _digests(run: RunInfo, stage: str, name: str, splits: Mapping[str, Any]) -> Iterator[str]:
    own = [f"{split}/{name}" for split in splits if split != "train"] if "train" not in splits else []
    for key in (*own, name):
        for full in (f"{stage}/{key}" if stage else key, key):
            if full in run.datasets_sha256:
                yield run.datasets_sha256[full]


def dropped(facts: Facts) -> dict[str, int]:
    """Rows that were left out, by cause, the most frequent first."""
    counts: dict[str, int] = {}
    for report in facts.data.values():
        for dataset in report.get("datasets", []):
            for cause, count in dataset.get("dropped", {}).items():
                counts[cause] = counts.get(cause, 0) + count
    return dict(sorted(((cause, n) for cause, n in counts.items() if n), key=lambda item: (-item[1], item[0])))


def provenance_rows(facts: Facts) -> Rows:
    run = facts.run
    rows = [
        ["Job", f"{run.namespace}/{run.job}, attempt {run.attempt} (`{run.attempt_uid}`)"],
        ["Spec SHA-256", f"`{run.spec_sha256}`"],
        ["Base model SHA-256", f"`{run.base_model_sha256}`"],
    ]
    if adapter := facts.stages[0].spec.base_model.adapter_uri:
        rows.append(["Started from", f"`{adapter}`"])
    if run.image:
        rows.append(["Image", f"`{run.image}`"])
    return rows
