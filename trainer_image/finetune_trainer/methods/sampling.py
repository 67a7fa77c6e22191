"""Answers that a model writes while it learns: sampled token by token, the same whatever the number of ranks."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from finetune_trainer.batches import Ints
from finetune_trainer.distributed import on_any

Tokens = NDArray[np.integer[Any]]


class Sampling(NamedTuple):
    temperature: float
    max_new_tokens: int
    ends: tuple[int, ...]
    """Tokens that end an answer, of which they are part."""
    cached: bool
    """Whether what was computed of the tokens so far is kept: virtual tokens would be put before every single token."""
    lockstep: bool
    """Whether each forward pass is a collective (ZeRO-3), so that all ranks make as many as the one that needs most."""


def draws(seed: Sequence[int], places: Ints, count: int) -> NDArray[np.float64]:
    """(places, count) numbers in [0, 1), those of a place by (seed, place) alone."""
    return np.stack([np.random.default_rng((*seed, int(place))).random(count) for place in places])


def sample(
    model: Any, prompts: Sequence[Tokens], numbers: NDArray[np.float64], how: Sampling, device: torch.device
) -> list[Ints]:
    """An answer to each prompt: at least one token, at most `how.max_new_tokens`.

    `model`: in evaluation mode; `numbers`: of `draws`, one for each token. Without gradients; collective in lockstep.
    """
    chance = torch.from_numpy(numbers).to(device)
    ends = torch.tensor(how.ends, device=device, dtype=torch.long)
    written = torch.zeros(chance.shape, dtype=torch.long, device=device)
    lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)
    writing = torch.ones(len(prompts), dtype=torch.bool, device=device)
    with torch.no_grad():
        forward: _Forward = (_Cached if how.cached else _Whole)(model, prompts, device)
        token = None
        for place in range(how.max_new_tokens):
            token = pick(forward(token), how.temperature, chance[:, place])
            written[:, place] = token
            lengths += writing
            writing &= ~torch.isin(token, ends)
            more = writing.any()
            if not (on_any(more) if how.lockstep else more):
                break
    known, counts = written.cpu().numpy(), lengths.tolist()
    return [known[row, :count] for row, count in enumerate(counts)]


def pick(logits: torch.Tensor, temperature: float, chance: torch.Tensor) -> torch.Tensor:
    """(rows,) the token up to which the probabilities of `logits` (rows, vocabulary) add up to `chance` (rows,)."""
    cumulative = (logits.float() / temperature).softmax(-1).double().cumsum(-1)
    wanted = chance[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


class _Forward(Protocol):
    def __call__(self, token: torch.Tensor | None) -> torch.Tensor:
        """Logits (rows, vocabulary) of what follows `token` (rows,); of what follows the prompts where it is None."""


class _Cached:
    """Prompts padded on the left, each further token by itself."""

    def __init__(self, model: Any, prompts: Sequence[Tokens], device: torch.device) -> None:
        width = max(map(len, prompts))
        ids, mask = np.zeros((len(prompts), width), dtype=np.int64), np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        self._model, self._past = model, None
        self._ids, self._mask = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        self._options = inspect.signature(type(_causal(model)).forward).parameters

    def __call__(self, token: torch.Tensor | None) -> torch.Tensor:
        ids = self._ids
        if token is not None:
            ids, self._mask = token[:, None], torch.nn.functional.pad(self._mask, (0, 1), value=1)
        options: dict[str, Any] = {
            "position_ids": (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
            "logits_to_keep": 1,
        }
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            past_key_values=self._past,
            use_cache=True,
            **{name: value for name, value in options.items() if name in self._options},
        )
        self._past = output.past_key_values
        logits: torch.Tensor = output.logits[:, -1]
        return logits


class _Whole:
    """Rows padded on the right and computed anew for each token, as they are when they are learned."""

    def __init__(self, model: Any, prompts: Sequence[Tokens], device: torch.device) -> None:
        ids = np.zeros((len(prompts), max(map(len, prompts))), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        self._model, self._ids = model, torch.from_numpy(ids).to(device)
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)

    def __call__(self, token: torch.Tensor | None) -> torch.Tensor:
        rows = torch.arange(len(self._lengths), device=self._lengths.device)
        if token is not None:
            if int(self._lengths.max()) == self._ids.shape[1]:
                self._ids = torch.nn.functional.pad(self._ids, (0, 8))
            self._ids[rows, self._lengths] = token
            self._lengths = self._lengths + 1
        logits: torch.Tensor = self._model(input_ids=self._ids).logits
        return logits[:, -self._ids.shape[1] :][rows, self._lengths - 1]


def _causal(model: Any) -> Any:
    """The transformers model below DDP's or DeepSpeed's wrapper and peft's."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "peft_config") else model
