"""PPO: raise the score of the model's own answers, step by step and not far from the model as it was before.

Schulman et al. 2017 (arXiv 1707.06347) with the advantages of Schulman et al. 2016 (arXiv 1506.02438), used on language
models as by Ziegler et al. 2019 and Ouyang et al. 2022: each token of an answer is an action, a token costs its share
of the distance (KL) to the reference, and the last one earns the answer's score. The tensors of tokens are flat,
(tokens,): the answers of a micro-batch one after the other.
"""

from typing import Any

import torch

from finetune_api.method import PPO
from finetune_trainer.batches import IGNORED, Batch
from finetune_trainer.methods.losses import clipped_losses
from finetune_trainer.methods.rollout import Answered, RolloutTrainer, global_sum, log_probs, rows_of_tokens


class PPOTrainer(RolloutTrainer):
    private = "value_head."

    def __init__(self, model: Any, *arguments: Any) -> None:
        self.value_head = ValueHead(model)
        model.add_module("value_head", self.value_head)
        super().__init__(model, *arguments)

    @property
    def ppo(self) -> PPO:
        return self.method.ppo or PPO()

    def _policy_and_values(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        found = log_probs(model, batch, self.sampling.temperature)
        return found, self.value_head.values(batch["labels"])

    def learnable(self, answered: list[Answered]) -> list[Batch]:
        ppo, batches = self.ppo, []
        for part in answered:
            labels = part.batch["labels"]
            old, values = self._policy_and_values(self.model_wrapped, part.batch)
            drift = old - self.reference_log_probs(part.batch)
            self.note_drift(part, drift)
            rewards = token_rewards(-ppo.kl_coefficient * drift, part.scores, labels)
            gained = advantages(rewards, values, labels, ppo.discount, ppo.gae_lambda)
            batches.append(
                part.batch | {"old": old, "values": values, "advantages": gained, "returns": gained + values}
            )
        whitened = whiten([batch["advantages"] for batch in batches])
        return [batch | {"advantages": gained} for batch, gained in zip(batches, whitened, strict=True)]

    def loss(self, model: Any, batch: Batch, tokens: int, rows: int) -> torch.Tensor:
        ppo = self.ppo
        now, values = self._policy_and_values(model, batch)
        policy = clipped_losses(now - batch["old"], batch["advantages"], ppo.clip_range)
        value = value_losses(values, batch["values"], batch["returns"], ppo.value_clip_range)
        return (policy.sum() + ppo.value_coefficient * value.sum()) / tokens


class ValueHead(torch.nn.Module):
    """What an answer is still expected to earn, read where the next token is predicted from; nothing at the start.

    A part of the model that is trained, so that DDP and DeepSpeed know it, and called within its forward pass.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        output = model.get_output_embeddings()
        width = model.config.get_text_config().hidden_size
        self.score = torch.nn.Linear(width, 1, bias=False, device=output.weight.device)
        torch.nn.init.zeros_(self.score.weight)
        self._seen: torch.Tensor | None = None
        output.register_forward_pre_hook(self._look)

    def _look(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """`inputs`: the last hidden states, (rows, length, hidden) or of some positions alone (n, hidden)."""
        hidden = inputs[0]
        with torch.autocast(hidden.device.type, enabled=False):
            self._seen = self.score(hidden.to(self.score.weight.dtype)).squeeze(-1).float()

    def values(self, labels: torch.Tensor) -> torch.Tensor:
        """(tokens,) of the last forward pass, before each token of `labels` (rows, length)."""
        seen, kept = self._seen, labels[:, 1:] != IGNORED
        assert seen is not None
        self._seen = None
        if seen.numel() == int(kept.sum()):
            return seen.reshape(-1)
        # Virtual tokens stand in front of the row's own.
        return seen[:, -labels.shape[1] : -1][kept]


def token_rewards(costs: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(tokens,): what each token costs, and at the last one of each answer its score (rows,)."""
    rows = rows_of_tokens(labels)
    last = torch.cat([rows[1:] != rows[:-1], rows.new_ones(1, dtype=torch.bool)])
    return costs + torch.where(last, scores[rows].to(costs.dtype), 0.0)


def advantages(
    rewards: torch.Tensor, values: torch.Tensor, labels: torch.Tensor, discount: float, gae_lambda: float
) -> torch.Tensor:
    """Generalised advantage estimation, all (tokens,): nothing is earned after an answer has ended."""
    kept = labels[:, 1:] != IGNORED
    reward, value = (values.new_zeros(kept.shape).masked_scatter(kept, x) for x in (rewards, values))
    found, ahead = torch.zeros_like(value), torch.zeros_like(value[:, 0])
    for place in reversed(range(kept.shape[1])):
        following = value[:, place + 1] if place + 1 < kept.shape[1] else 0.0
        ahead = (reward[:, place] + discount * following - value[:, place]) + discount * gae_lambda * ahead
        ahead = torch.where(kept[:, place], ahead, 0.0)
        found[:, place] = ahead
    return found[kept]


def whiten(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The values of all parts of all ranks, shifted to mean 0 and scaled to variance 1. Collective."""
    counts, total = global_sum([sum(part.numel() for part in parts), sum(float(part.double().sum()) for part in parts)])
    mean = total / counts
    (squares,) = global_sum([sum(float(((part.double() - mean) ** 2).sum()) for part in parts)])
    return [(part - mean) * (squares / counts + 1e-8) ** -0.5 for part in parts]


def value_losses(values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Half the squared error, the larger of that of the values and that of values near the old; one per token."""
    near = old + (values - old).clamp(-clip_range, clip_range)
    return 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2)
