"""Every method with every tuning, on one worker and on two, and under each strategy: as jobs that take seconds."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from finetune_api import job, support

Spec = dict[str, Any]
BUCKET = "s3://finetune"
REWARD_MODEL = "reward-model"
"""Stands for the URI of a reward model that an earlier cell published."""
SETS: dict[str, Spec] = {
    "pairs": {"format": "PromptCompletion"},
    "ranked": {"format": "Preference"},
    "judged": {"format": "Preference"},
    "labelled": {"format": "Labelled"},
    "prompts": {"format": "PromptOnly"},
}


class Method(NamedTuple):
    spec: Spec
    """Members of a job's spec."""
    data: str
    figure: str
    """What moves, by its name in status.result.metrics; before training it has the suffix `Before`."""
    rises: bool
    least: float
    """How far it moves at least."""
    prefers: bool = True
    """Whether it learns to prefer the good answers of the data; else what it answers changes."""
    batch: int = 16
    """Examples of an optimizer step."""


def _dataset(name: str) -> Spec:
    return {"name": name, "uri": f"{BUCKET}/matrix/{name}.jsonl"} | SETS[name]


def _rule(expression: str) -> list[Spec]:
    return [{"name": "rule", "expression": expression}]


RULE = "completion.count('e') + completion.count('a') + completion.count('o')"
ANSWERS = {"maxNewTokens": 8}
ROLLOUT = 64
"""Prompts of a step where a model learns from its own answers: their scores differ by chance."""
SFT: Spec = {"type": "SFT", "sft": {"loss": "Completion"}}
DPO: Spec = {"type": "DPO", "dpo": {"beta": 0.1}}
REWARD: Spec = {"type": "Reward"}
PPO: Spec = {"type": "PPO", "ppo": ANSWERS | {"ppoEpochs": 2, "klCoefficient": 0.02}}
GRPO: Spec = {"type": "GRPO", "grpo": ANSWERS | {"generations": 4, "rewards": _rule(RULE)}}
METHODS: dict[str, Method] = {
    "SFT": Method({"method": SFT}, "pairs", "evalLoss", False, 0.05),
    "SFT, packed": Method(
        {"method": {"type": "SFT", "sft": {"loss": "Completion", "packing": True}}}, "pairs", "evalLoss", False, 0.05
    ),
    "SFT, classes": Method({"method": {"type": "SFT"}}, "labelled", "evalLoss", False, 0.01),
    "DPO": Method({"method": DPO}, "ranked", "rewardMargin", True, 0.01),
    "KTO": Method({"method": {"type": "KTO"}}, "judged", "rewardMargin", True, 0.01),
    "ORPO": Method({"method": {"type": "ORPO"}}, "ranked", "evalLoss", False, 0.05),
    "Reward": Method({"method": REWARD}, "ranked", "rewardMargin", True, 0.01),
    "PPO": Method(
        {"method": {"type": "PPO", "ppo": PPO["ppo"] | {"rewardModel": {"uri": REWARD_MODEL}}}},
        "prompts",
        "meanReward",
        True,
        0.01,
        prefers=False,
        batch=ROLLOUT,
    ),
    "GRPO": Method({"method": GRPO}, "prompts", "meanReward", True, 0.01, prefers=False, batch=ROLLOUT),
    "RLOO": Method(
        {"method": {"type": "GRPO", "grpo": GRPO["grpo"] | {"advantage": "LeaveOneOut"}}},
        "prompts",
        "meanReward",
        True,
        0.01,
        prefers=False,
        batch=ROLLOUT,
    ),
    "SFT → DPO": Method(
        {
            "stages": [
                {"name": "answers", "method": SFT},
                {"name": "ranked", "method": DPO, "datasets": [_dataset("ranked")]},
            ]
        },
        "pairs",
        "ranked/rewardMargin",
        True,
        0.01,
    ),
    "SFT → Reward → PPO": Method(
        {
            "stages": [
                # So few steps that there is something left to learn.
                {"name": "answers", "method": SFT, "training": {"maxSteps": 4}},
                {"name": "judge", "method": REWARD, "datasets": [_dataset("ranked")]},
                {"name": "policy", "method": PPO, "datasets": [_dataset("prompts")]},
            ]
        },
        "pairs",
        "policy/meanReward",
        True,
        0.01,
        prefers=False,
        batch=ROLLOUT,
    ),
}
SMALL = {"rank": 4, "alpha": 8}
TUNINGS: dict[str, Spec] = {
    "LoRA": {"type": "LoRA", "lora": SMALL},
    "rsLoRA": {"type": "LoRA", "lora": SMALL | {"scaling": "RankStabilized"}},
    "PiSSA": {"type": "LoRA", "lora": SMALL | {"initialization": "PiSSA"}},
    "QLoRA": {"type": "QLoRA", "lora": SMALL},
    "DoRA": {"type": "DoRA", "lora": SMALL},
    "IA3": {"type": "IA3"},
    "PromptTuning": {"type": "PromptTuning", "promptTuning": {"tokens": 8}},
    "PrefixTuning": {"type": "PrefixTuning", "prefixTuning": {"tokens": 8}},
    "Freeze": {"type": "Freeze", "freeze": {"trainableLayers": 1}},
    "Full": {"type": "Full"},
}
RATES = {"IA3": 0.05, "PromptTuning": 0.2, "PrefixTuning": 0.2, "Freeze": 0.005, "Full": 0.005}
ZERO = ("ZeRO1", "ZeRO2", "ZeRO3")
ZEROS = tuple(itertools.product(("LoRA", "Full"), ZERO))
"""An adapter, and a whole model: of the former DeepSpeed wraps another module than the one that answers."""


class Cell(NamedTuple):
    method: str
    tuning: str
    workers: int
    strategy: str = "Auto"
    merged: bool = False
    dtype: str = "Float32"

    @property
    def name(self) -> str:
        """A job's name."""
        words = self.method.lower().replace("→", "").replace(",", "").split()
        options = [self.strategy.lower()] * (self.strategy != "Auto") + ["merged"] * self.merged
        options += ["bf16"] * (self.dtype == "BFloat16")
        return "-".join([*words, self.tuning.lower(), str(self.workers), *options])

    @property
    def lesson(self) -> Method:
        return METHODS[self.method]

    def spec(self, reward_model: str = f"{BUCKET}/reward/") -> Spec:
        """`reward_model`: the URI of one that this job may be judged by."""
        return _filled(
            {
                "baseModel": {"uri": f"{BUCKET}/models/matrix/", "dtype": self.dtype},
                "tuning": TUNINGS[self.tuning],
                "datasets": [_dataset(self.lesson.data)],
                "validation": {"fraction": 0.15},
                "training": {
                    "maxSteps": 16,
                    "learningRate": RATES.get(self.tuning, 0.02),
                    "globalBatchSize": self.lesson.batch,
                    "maxLength": 96,
                },
                "distribution": {"workers": self.workers, "strategy": self.strategy},
                "output": {"uri": f"{BUCKET}/out/", "merged": self.merged},
                "credentials": {"secretRef": {"name": "s3-creds"}},
                "runPolicy": {"maxAttempts": 1},
                **self.lesson.spec,
            },
            reward_model,
        )

    def manifest(self, **arguments: str) -> Spec:
        return {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": self.name, "namespace": "default"},
            "spec": self.spec(**arguments),
        }

    @property
    def needs_reward_model(self) -> bool:
        return REWARD_MODEL in str(self.lesson.spec)

    def refusal(self) -> str:
        """Why it cannot be run, in the words of `finetune lint`; empty where it can be."""
        problems = support.unsupported(job.parse(self.manifest()).spec)
        return "; ".join(map(str, problems))


JUDGE = Cell("Reward", "LoRA", 1)
"""Whose reward model the others ask."""


def table() -> list[Cell]:
    """What `make matrix` runs: every method and tuning on 1 and 2 workers, and each method under each stage of ZeRO."""
    cells = [Cell(*choice) for choice in itertools.product(METHODS, TUNINGS, (1, 2))]
    return cells + [Cell(method, tuning, 2, stage) for method, (tuning, stage) in itertools.product(METHODS, ZEROS)]


FAMILIES = {
    "SFT, packed": "SFT",
    "DPO": "against a reference",
    "KTO": "against a reference",
    "Reward": "a head",
    "SFT, classes": "a head",
    "PPO": "own answers",
    "GRPO": "own answers",
    "RLOO": "own answers",
    "SFT → DPO": "stages",
    "SFT → Reward → PPO": "stages",
    "rsLoRA": "LoRA",
    "PiSSA": "LoRA",
    "DoRA": "LoRA",
    "PromptTuning": "virtual tokens",
    "PrefixTuning": "virtual tokens",
    "Freeze": "own weights",
    "Full": "own weights",
}
"""Methods that use the model alike, and tunings that change it alike."""
Pairs = frozenset[tuple[tuple[str, object], tuple[str, object]]]


def pairs(cell: Cell) -> Pairs:
    """Which two choices it makes together; of method, tuning and strategy, which are many, by families alone."""
    choices = cell._asdict() | {"kind": FAMILIES.get(cell.method, cell.method)}
    choices["tuned"] = FAMILIES.get(cell.tuning, cell.tuning)
    many = (
        {"method", "tuned"},
        {"tuning", "kind"},
        {"method", "tuning"},
        {"method", "strategy"},
        {"tuning", "strategy"},
    )
    found = itertools.combinations(sorted(choices.items()), 2)
    return frozenset(pair for pair in found if {pair[0][0], pair[1][0]} not in many)


def candidates() -> list[Cell]:
    """Every allowed cell, with more to choose than in the table."""
    places = [(1, "Auto"), (2, "Auto"), *((2, stage) for stage in ZERO)]
    choices = itertools.product(METHODS, TUNINGS, places, (False, True), ("Float32", "BFloat16"))
    cells = [Cell(method, tuning, *place, merged, dtype) for method, tuning, place, merged, dtype in choices]
    return [cell for cell in cells if not cell.refusal()]


def cover(candidates: list[Cell], done: list[Cell]) -> list[Cell]:
    """Few of the candidates that, beside those that are done anyway, make every pair of choices that can be made."""
    found = {cell: pairs(cell) for cell in candidates}
    left = set().union(*found.values()).difference(*map(pairs, done))
    chosen = []
    while left:
        best = max(found, key=lambda cell: (len(found[cell] & left), -cell.workers))
        chosen.append(best)
        left -= found[best]
    return chosen


def _filled(value: Any, reward_model: str) -> Any:
    match value:
        case dict():
            return {name: _filled(member, reward_model) for name, member in value.items()}
        case list():
            return [_filled(member, reward_model) for member in value]
    return reward_model if value == REWARD_MODEL else value


def datasets_of(spec: Spec) -> Iterator[Spec]:
    """Every dataset that a spec names, wherever it stands."""
    match spec:
        case dict():
            for name, member in spec.items():
                yield from member if name == "datasets" and member else datasets_of(member)
        case list():
            for member in spec:
                yield from datasets_of(member)
