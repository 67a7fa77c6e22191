"""What an answer is worth: the score of a reward model, and the manifest's own expressions."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer

from finetune_api.method import RewardExpression
from finetune_trainer.expressions import compiled, evaluated

Tokens = Sequence[int] | np.ndarray[Any, Any]


class Judge(Protocol):
    def score(self, rows: Sequence[Tokens]) -> torch.Tensor:
        """(rows,) in float64: what each row of tokens, prompt and answer, is worth. Not collective."""


class Rewards:
    """The sum of the reward model's score and the expressions' values, each times its weight."""

    def __init__(self, tokenizer: Tokenizer, rewards: Sequence[RewardExpression], model: Judge | None) -> None:
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
