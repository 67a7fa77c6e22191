"""PPO against the papers' formulas, written down token by token; GRPO and RLOO against TRL's trainers on one batch."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from finetune_api.method import Method
from finetune_trainer.batches import Examples, Plan, rows_of
from finetune_trainer.methods import ROLLOUT
from finetune_trainer.methods.grpo import GRPOTrainer, group_advantages
from finetune_trainer.methods.ppo import PPOTrainer, advantages, token_rewards, whiten
from finetune_trainer.methods.rollout import Answered, RolloutTrainer, collate_answers, rows_of_tokens, sums_of_rows
from finetune_trainer.prompting import PromptBatches
from finetune_trainer.rewards import Rewards
from finetune_trainer.shards import Prompts
from support.asking import make_numbers_model, make_prompts

ROWS, TEMPERATURE = 8, 0.7


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_numbers_model(tmp_path_factory.mktemp("model"))


def batches_of(answers: int) -> PromptBatches:
    rows = make_prompts(ROWS // answers)
    ids = [row["input_ids"] for row in rows]
    flat, ends = np.concatenate(ids).astype(np.int32), np.cumsum([0, *map(len, ids)])
    examples = Examples(flat, np.full_like(flat, -100), ends, np.zeros(len(ids), np.int64))
    plan = Plan(
        rows_of(examples, False, 64, 0), global_batch=len(ids), weights=[None], seed=0, epochs=1, max_steps=None
    )
    prompts = Prompts(examples, [row["reference"] for row in rows])
    return PromptBatches(plan, prompts, answers=answers, rank=0, world_size=1, micro_batch=ROWS // 2)


def written() -> tuple[list[list[int]], list[list[int]], torch.Tensor]:
    """Prompts, of which each stands there four times, answers of one to seven tokens, and scores."""
    rng = np.random.default_rng(3)
    prompts = [row["input_ids"] for row in make_prompts(ROWS // 4) for _ in range(4)]
    answers = [rng.integers(3, 64, size=rng.integers(1, 8)).tolist() for _ in prompts]
    return prompts, answers, torch.from_numpy(rng.normal(size=ROWS))


def answered() -> list[Answered]:
    """In two micro-batches."""
    prompts, answers, scores = written()
    parts = itertools.pairwise((0, ROWS // 2, ROWS))
    return [Answered(collate_answers(prompts[a:b], answers[a:b]), torch.arange(a, b), scores[a:b]) for a, b in parts]


def ours(method: dict[str, Any], model: Any, args: Any, tiny: Path) -> RolloutTrainer:
    from tokenizers import Tokenizer

    kind = Method.model_validate(method)
    rewards = Rewards(Tokenizer.from_file(str(tiny / "tokenizer.json")), [], None)
    return ROLLOUT[kind.type](model, args, batches_of(4 if kind.type == "GRPO" else 1), kind, rewards)


def learnable(trainer: RolloutTrainer) -> list[dict[str, torch.Tensor]]:
    with trainer._evaluating():
        return trainer.learnable(answered())


def move(model: Any, seed: int = 9) -> None:
    """An update, so that the policy is not the one that answered."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))


def test_rewards_are_costs_and_a_score_at_the_end() -> None:
    labels = torch.tensor([[-100, 7, 8, -100], [-100, -100, -100, 9]])
    found = token_rewards(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([5.0, 7.0]), labels)
    assert found.tolist() == pytest.approx([0.1, 5.2, 7.3])
    assert rows_of_tokens(labels).tolist() == [0, 0, 1]
    assert sums_of_rows(found, labels).tolist() == pytest.approx([5.3, 7.3])


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0)])
def test_advantages_are_those_of_a_loop_over_each_answer(discount: float, gae_lambda: float) -> None:
    rng = np.random.default_rng(0)
    lengths = [3, 1, 6]
    labels = torch.full((3, 10), -100)
    for row, length in enumerate(lengths):
        labels[row, 2 + row : 2 + row + length] = 1
    rewards, values = (rng.normal(size=sum(lengths)) for _ in range(2))
    expected = gae_by_hand(np.split(rewards, [3, 4]), np.split(values, [3, 4]), discount, gae_lambda)
    found = advantages(torch.from_numpy(rewards), torch.from_numpy(values), labels, discount, gae_lambda)
    assert found.tolist() == pytest.approx(np.concatenate(expected).tolist())


def gae_by_hand(rewards: list[Any], values: list[Any], discount: float, gae_lambda: float) -> list[Any]:
    """Schulman et al. 2016, equation 16: the sum of (discount x lambda)^l delta_{t+l}, as it stands there."""
    found = []
    for r, v in zip(rewards, values, strict=True):
        following = np.append(v[1:], 0.0)
        delta = r + discount * following - v
        powers = [(discount * gae_lambda) ** k for k in range(len(r))]
        found.append(np.array([sum(p * d for p, d in zip(powers, delta[t:], strict=False)) for t in range(len(r))]))
    return found


def test_whitening_is_over_all_parts_together() -> None:
    parts = whiten([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])])
    whole = torch.cat(parts)
    assert whole.mean().item() == pytest.approx(0, abs=1e-6)
    assert whole.var(unbiased=False).item() == pytest.approx(1)
    assert (whole[3] - whole[2]).item() == pytest.approx(3 * (whole[1] - whole[0]).item())


def test_group_advantages() -> None:
    scores = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
    assert group_advantages(scores, "Centered").tolist() == [[-2.0, -1.0, 3.0]]
    assert group_advantages(scores, "LeaveOneOut").tolist() == [[-3.0, -1.5, 4.5]]
    assert group_advantages(scores, "Normalized")[0].tolist() == pytest.approx(
        [x / (math.sqrt(7) + 1e-4) for x in (-2, -1, 3)]
    )
    same = torch.full((1, 3), 4.0, dtype=torch.float64)
    assert group_advantages(same, "Normalized").tolist() == [[0.0] * 3]


def policy_of(tiny: Path) -> Any:
    """A LoRA that has learned something already."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    return get_peft_model(base, LoraConfig(init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM"))


def test_ppo_has_the_loss_and_the_gradient_of_the_papers(tiny: Path, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    settings = {
        "rewardModel": {"uri": "s3://bucket/judge/"},
        "klCoefficient": 0.3,
        "clipRange": 0.1,
        "valueClipRange": 0.05,
        "valueCoefficient": 0.4,
        "discount": 0.98,
        "gaeLambda": 0.9,
        "temperature": TEMPERATURE,
    }
    model = policy_of(tiny)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = ours({"type": "PPO", "ppo": settings}, model, args, tiny)
    assert isinstance(trainer, PPOTrainer)
    torch.nn.init.normal_(trainer.value_head.score.weight, std=0.3)

    prompts, answers, scores = written()
    with torch.no_grad():
        before = [read(model, *row) for row in zip(prompts, answers, strict=True)]
        with model.disable_adapter():
            reference = [read(model, *row)[0].numpy() for row in zip(prompts, answers, strict=True)]
    old, values = ([part[i].numpy() for part in before] for i in range(2))
    rewards = [-0.3 * (p - q) for p, q in zip(old, reference, strict=True)]
    for row, score in zip(rewards, scores.tolist(), strict=True):
        row[-1] += score
    gained = gae_by_hand(rewards, values, 0.98, 0.9)
    returns = [a + v for a, v in zip(gained, values, strict=True)]
    every = np.concatenate(gained)
    white = [(a - every.mean()) / math.sqrt(every.var() + 1e-8) for a in gained]

    batches = learnable(trainer)
    assert torch.cat([b["advantages"] for b in batches]).tolist() == pytest.approx(
        np.concatenate(white).tolist(), abs=1e-4
    )
    move(model)
    expected = torch.zeros(())
    clipped = 0
    for row in range(ROWS):
        now, value = read(model, prompts[row], answers[row])
        for t in range(len(answers[row])):
            ratio = torch.exp(now[t] - float(old[row][t]))
            a, v0, r = float(white[row][t]), float(values[row][t]), float(returns[row][t])
            policy = torch.minimum(ratio * a, torch.clamp(ratio, 0.9, 1.1) * a)
            near = v0 + torch.clamp(value[t] - v0, -0.05, 0.05)
            expected = expected - policy + 0.4 * 0.5 * torch.maximum((value[t] - r) ** 2, (near - r) ** 2)
            clipped += not 0.9 < float(ratio) < 1.1
    tokens = sum(map(len, answers))
    expected = expected / tokens
    assert 0 < clipped < tokens
    loss = sum((trainer.loss(model, batch, tokens, ROWS) for batch in batches), torch.zeros(()))
    agree(model, loss, expected)


def read(model: Any, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each of the answer's tokens, and the value before it; one row, no padding."""
    out = model(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True)
    log_probs = (out.logits[0] / TEMPERATURE).log_softmax(-1)
    value = out.hidden_states[-1][0] @ model.value_head.score.weight[0]
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return (
        torch.stack([log_probs[p, token] for p, token in zip(places, answer, strict=True)]),
        torch.stack([value[p] for p in places]),
    )


def agree(model: Any, loss: torch.Tensor, expected: torch.Tensor) -> None:
    """The same loss, the same gradient."""
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    named = [p for p in model.parameters() if p.requires_grad]
    mine = torch.autograd.grad(loss, named, allow_unused=True)
    theirs = torch.autograd.grad(expected, named, allow_unused=True)
    assert sum(gradient is not None and bool(gradient.abs().max() > 1e-4) for gradient in theirs) > 5
    for one, other, parameter in zip(mine, theirs, named, strict=True):
        found = [torch.zeros_like(parameter) if g is None else g for g in (one, other)]
        assert torch.allclose(*found, rtol=1e-3, atol=1e-5)


class Reference:
    """One of TRL's trainers, which is given the same answers and scores."""

    def __init__(self, method: str, options: dict[str, Any], tiny: Path, directory: Path) -> None:
        import trl
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        prompts, self.answers, self.scores = written()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(tiny / "tokenizer.json"), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        )
        self.inputs = [{"prompt": " ".join(map(str, prompt))} for prompt in prompts]
        torch.manual_seed(1)
        self.trl = getattr(trl, f"{method}Trainer")(
            model=AutoModelForCausalLM.from_pretrained(tiny),
            reward_funcs=self.reward,
            args=getattr(trl, f"{method}Config")(
                output_dir=str(directory),
                use_cpu=True,
                bf16=False,
                report_to="none",
                gradient_checkpointing=False,
                per_device_train_batch_size=ROWS,
                num_generations=4,
                num_iterations=2,
                temperature=TEMPERATURE,
                max_completion_length=8,
                **options,
            ),
            train_dataset=Dataset.from_list(self.inputs),
            processing_class=tokenizer,
            peft_config=LoraConfig(init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        self.trl._generate_single_turn = lambda *_: self.answers if method == "RLOO" else (self.answers, None)
        self.trl.model.train()
        self.batch = self.trl._generate_and_score_completions(self.inputs)
        self.trl.current_gradient_accumulation_steps = self.trl.args.steps_per_generation

    def reward(self, completions: list[str], **_: Any) -> list[float]:
        return [float(score) for score in self.scores]

    def agree(self, method: dict[str, Any], tiny: Path) -> None:
        trainer = ours(method, self.trl.model, self.trl.args, tiny)
        assert isinstance(trainer, GRPOTrainer)
        batches = learnable(trainer)
        assert torch.cat([b["advantages"] for b in batches]).tolist() == pytest.approx(
            self.batch["advantages"].tolist(), rel=1e-3, abs=1e-4
        )
        move(self.trl.model)
        theirs = self.trl._compute_loss(self.trl.model, self.batch)
        tokens = sum(map(len, self.answers))
        loss = sum((trainer.loss(self.trl.model, batch, tokens, ROWS) for batch in batches), torch.zeros(()))
        agree(self.trl.model, loss, theirs)


@pytest.mark.parametrize(("advantage", "scaled"), [("Normalized", "group"), ("Centered", "none")])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_grpo_has_the_advantages_and_the_loss_of_trl(
    advantage: str, scaled: str, beta: float, tiny: Path, tmp_path: Path
) -> None:
    options = {"beta": beta, "epsilon": 0.05, "scale_rewards": scaled, "loss_type": "dapo"}
    settings = {
        "advantage": advantage,
        "beta": beta,
        "clipRange": 0.05,
        "generations": 4,
        "iterations": 2,
        "temperature": TEMPERATURE,
    }
    Reference("GRPO", options, tiny, tmp_path).agree({"type": "GRPO", "grpo": settings}, tiny)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_rloo_has_the_advantages_and_the_loss_of_trl(beta: float, tiny: Path, tmp_path: Path) -> None:
    settings = {
        "advantage": "LeaveOneOut",
        "beta": beta,
        "clipRange": 0.05,
        "generations": 4,
        "iterations": 2,
        "temperature": TEMPERATURE,
    }
    Reference("RLOO", {"beta": beta, "epsilon": 0.05}, tiny, tmp_path).agree({"type": "GRPO", "grpo": settings}, tiny)
