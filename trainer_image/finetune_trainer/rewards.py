"""What an answer is worth: the score of a reward model, and the manifest's own expressions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from finetune_api.failures import FineTuneError, Reason
from finetune_api.method import Method, RewardExpression
from finetune_api.stages import reward_stage
from finetune_trainer.distributed import Ranks
from finetune_trainer.expressions import BadExpression, Expression
from finetune_trainer.model import attention_of, dtype_of
from finetune_trainer.reward_model import RewardModel
from finetune_trainer.start import StageRun, Start, make_result_ready, result_of
from finetune_trainer.storage import Store

Tokens = Sequence[int] | np.ndarray[Any, Any]


class Rewards:
    """The sum of the reward model's score and the expressions' values, each times its weight."""

    def __init__(self, tokenizer: Tokenizer, rewards: Sequence[RewardExpression], model: RewardModel | None) -> None:
        """Raises InvalidSpec where an expression cannot be compiled."""
        self._tokenizer, self._model = tokenizer, model
        self._expressions = compiled(rewards)

    def score(
        self,
        prompts: Sequence[Tokens],
        answers: Sequence[Tokens],
        references: Sequence[str | None],
        device: torch.device,
    ) -> torch.Tensor:
        """(rows,) in float64. Raises InvalidSpec where an expression gives no number."""
        total = torch.zeros(len(answers), dtype=torch.float64)
        if self._expressions:
            texts = [(self._text(p), self._text(a), r) for p, a, r in zip(prompts, answers, references, strict=True)]
            for place, expression in enumerate(self._expressions):
                total += torch.tensor([evaluated(expression, place, *text) for text in texts], dtype=torch.float64)
        total = total.to(device)
        if self._model:
            total += self._model.score([np.concatenate([p, a]) for p, a in zip(prompts, answers, strict=True)])
        return total

    def ends(self, model: Any) -> tuple[int, ...]:
        """Tokens that end an answer: the model's EOS, and whatever its tokenizer calls special (the end of a turn)."""
        found = {number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
            eos = getattr(config, "eos_token_id", None)
            found |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
        return tuple(sorted(found))

    def _text(self, tokens: Tokens) -> str:
        return str(self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True))


Weighted = tuple[RewardExpression, Expression]


def compiled(rewards: Sequence[RewardExpression]) -> list[Weighted]:
    """Raises InvalidSpec."""
    found = []
    for place, reward in enumerate(rewards):
        try:
            found.append((reward, Expression(reward.expression)))
        except BadExpression as error:
            raise _invalid(reward, place, error) from error
    return found


def evaluated(expression: Weighted, place: int, prompt: str, completion: str, reference: str | None) -> float:
    """Times its weight. Raises InvalidSpec."""
    reward, value = expression
    try:
        return reward.weight * value(prompt, completion, reference)
    except BadExpression as error:
        raise _invalid(reward, place, error) from error


def _invalid(reward: RewardExpression, place: int, error: BadExpression) -> FineTuneError:
    field = f"spec.method.grpo.rewards[{place}].expression"
    return FineTuneError(Reason.INVALID_SPEC, f"{field} ({reward.name}): found `{reward.expression}`; {error}")


def load_rewards(run: StageRun, store: Store, ranks: Ranks) -> Rewards:
    """Of the stage that is trained. Collective: one rank of each pod fetches an earlier stage's reward model."""
    spec, devices, judged_by = run.stage.spec, run.config.devices, reward_stage(run.stages, run.number)
    if judged_by is not None and ranks.local_rank == 0:
        make_result_ready(store, run.job, run.work, run.stages, judged_by)
    ranks.barrier()
    judge, dtype = judge_of(run), dtype_of(spec, devices)
    model = RewardModel(judge, dtype, attention_of(dtype, devices), ranks.device) if judge else None
    tokenizer = Tokenizer.from_file(str(run.start.model / "tokenizer.json"))
    return Rewards(tokenizer, expressions_of(spec.method), model)


def judge_of(run: StageRun) -> Start | None:
    """The reward model that the stage names, else that of the Reward stage before it."""
    rollout, work = run.stage.spec.method.rollout, run.work
    if rollout and rollout.reward_model:
        is_adapter = (work.reward_model / "adapter_config.json").exists()
        return Start(work.model, work.reward_model) if is_adapter else Start(work.reward_model, None)
    stage = reward_stage(run.stages, run.number)
    return None if stage is None else result_of(work, run.stages, stage)


def expressions_of(method: Method) -> list[RewardExpression]:
    return list(method.grpo.rewards) if method.type == "GRPO" and method.grpo else []
