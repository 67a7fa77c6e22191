"""The losses of learning from preferences, as pure functions on tensors; one value per pair or row, never averaged.

Log-probabilities are natural and in float32. `chosen` and `rejected` are the better and the worse answer of each pair.
"""

from typing import Literal

import torch
from torch.nn.functional import logsigmoid

from finetune_trainer.batches import IGNORED


def sequence_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each row's labelled tokens, and how many they are; both (rows,).

    `logits`: (rows, length, vocabulary), possibly longer at the front (virtual tokens); `labels`: (rows, length).
    Only the logits of labelled tokens are converted to float32.
    """
    kept = labels[:, 1:] != IGNORED
    return row_log_probs(logits[:, -labels.shape[1] : -1][kept].float(), labels[:, 1:][kept], labels)


def row_log_probs(
    logits: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from what `logits.learned_logits` returns: (n, vocabulary) and (n,), n being the labelled tokens."""
    kept = labels[:, 1:] != IGNORED
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    rows = torch.nonzero(kept)[:, 0]
    sums = torch.zeros(len(labels), device=losses.device).index_add(0, rows, -losses)
    return sums, kept.sum(1)


def dpo_losses(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    counts: tuple[torch.Tensor, torch.Tensor],
    beta: float,
    kind: Literal["Sigmoid", "Hinge", "IPO"],
) -> torch.Tensor:
    """Direct preference optimisation (Rafailov et al. 2023), hinge (SLiC, Zhao et al. 2023), IPO (Azar et al. 2023).

    `chosen`, `rejected`: (pairs,) log-probability of the answer less its log-probability under the reference;
    `counts`: tokens of the answers, which IPO divides by, as its authors do.
    """
    if kind == "IPO":
        delta = chosen / counts[0].clamp(min=1) - rejected / counts[1].clamp(min=1)
        return (delta - 1 / (2 * beta)) ** 2
    delta = beta * (chosen - rejected)
    return torch.relu(1 - delta) if kind == "Hinge" else -logsigmoid(delta)


def kto_losses(
    ratios: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> torch.Tensor:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, equation 7).

    `ratios`: (rows,) as for DPO; `desirable`: (rows,) bool; `kl`: the reference point, see `kl_estimate`.
    """
    sign = torch.where(desirable, 1.0, -1.0)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1 - torch.sigmoid(beta * sign * (ratios - kl)))


def kl_estimate(total: torch.Tensor, rows: int) -> torch.Tensor:
    """KTO's reference point: how far the policy is from the reference, in nats, never below zero.

    `total`: the log-ratios of `rows` answers to other rows' prompts, summed.
    """
    return (total / max(1, rows)).clamp(min=0)


def odds_ratio_losses(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """What ORPO adds to the chosen answer's cross-entropy (Hong et al. 2024, equations 4 and 7).

    `chosen`, `rejected`: (pairs,) mean log-probability per token of the answers, below zero.
    """
    odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return -beta * logsigmoid(odds)


def clipped_losses(moved: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> torch.Tensor:
    """The clipped surrogate objective, negated (Schulman et al. 2017, equation 7).

    `moved`: log-probability of an action less what it was when the action was taken; `advantages`: of that shape.
    """
    ratio = torch.exp(moved)
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def reward_losses(chosen: torch.Tensor, rejected: torch.Tensor, centring: float) -> torch.Tensor:
    """Bradley-Terry on the scores of each pair; `centring` pulls their sum to zero (Eisenstein et al. 2023)."""
    return -logsigmoid(chosen - rejected) + centring * (chosen + rejected) ** 2


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0: each branch is exact where the other loses its digits (Mächler 2012)."""
    # The branch that is not taken must not be infinite: its gradient would be no number.
    x = x.clamp(max=-1e-7)
    near = x > -0.6931471805599453
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    )
