"""Answers to prompts, the likeliest token each time: the work shared by all ranks, the same answers on any number."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from finetune_trainer.batches import Ints
from finetune_trainer.distributed import Ranks

MAX_BATCH = 64
Tokens = NDArray[np.int32]


class Answering(NamedTuple):
    """How answers are written."""

    max_new_tokens: int
    positions: int
    """Of the model: a prompt and its answer are never longer."""
    stop: tuple[int, ...]
    """Tokens that end an answer, of which they are part."""
    padding: int
    budget: int
    """Tokens, prompts and answers together, of one batch."""
    lockstep: bool
    """A forward pass is a collective (ZeRO-3): every rank makes as many as the others."""


def answers_to(model: Any, prompts: Sequence[Tokens], how: Answering, ranks: Ranks) -> list[list[int]]:
    """The answer to each prompt, on every rank. Collective. `model`: not wrapped by DDP.

    The batches do not depend on the number of ranks, so neither do the answers.
    """
    batches = batches_of([len(prompt) for prompt in prompts], how)
    rounds = -(-len(batches) // ranks.world_size)
    mine = batches[ranks.rank :: ranks.world_size]
    found: dict[int, list[int]] = {}
    for turn in range(rounds):
        # Who has nothing left does the last batch once more: its forward passes keep the others company.
        ids = mine[turn] if turn < len(mine) else batches[-1]
        if turn < len(mine) or how.lockstep:
            answers = complete(model, [prompts[i] for i in ids], how, ranks.device)
            if turn < len(mine):
                found |= dict(zip(ids.tolist(), answers, strict=True))
    return shared(found, len(prompts), ranks)


def batches_of(lengths: Sequence[int], how: Answering) -> list[Ints]:
    """Places of prompts, longest first; as many in a batch as its budget allows."""
    order = np.argsort(-np.array(lengths, dtype=np.int64), kind="stable")
    batches, at = [], 0
    while at < len(order):
        size = how.budget // (lengths[order[at]] + how.max_new_tokens)
        size = max(1, min(MAX_BATCH, size))
        batches.append(order[at : at + size])
        at += size
    return batches


def complete(model: Any, prompts: Sequence[Tokens], how: Answering, device: torch.device) -> list[list[int]]:
    """One batch of answers."""
    width = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), width), how.padding, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=min(how.max_new_tokens, how.positions - width),
        do_sample=False,
        eos_token_id=list(how.stop) or None,
        pad_token_id=how.padding,
        use_cache=True,
    )
    was_training = model.training
    model.eval()
    with torch.no_grad(), _without_defaults(model):
        found = model.generate(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            generation_config=config,
            synced_gpus=how.lockstep,
        )
    model.train(was_training)
    return [_until(row, how.stop) for row in found[:, width:].tolist()]


def _until(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """Up to the first token that ends an answer, and with it."""
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in stop), len(tokens))]


@contextmanager
def _without_defaults(model: Any) -> Iterator[None]:
    """A model may come with wishes of its own (penalties, a temperature), which would stand where nothing is said."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    # peft sets its own, made when the model was wrapped, on the model below.
    kept = [(part, part.generation_config) for part in dict.fromkeys((model, base))]
    try:
        for part, _ in kept:
            part.generation_config = GenerationConfig()
        yield
    finally:
        for part, config in kept:
            part.generation_config = config


def shared(found: dict[int, list[int]], count: int, ranks: Ranks) -> list[list[int]]:
    """Every rank's answers on all of them: each was written by one, the others add nothing to it."""
    lengths = np.zeros(count, dtype=np.int64)
    for place, answer in found.items():
        lengths[place] = len(answer)
    lengths = _summed(lengths, ranks)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.zeros(int(ends[-1]), dtype=np.int64)
    for place, answer in found.items():
        tokens[ends[place] : ends[place + 1]] = answer
    tokens = _summed(tokens, ranks)
    return [tokens[start:stop].tolist() for start, stop in itertools.pairwise(ends)]


def _summed(values: Ints, ranks: Ranks) -> Ints:
    # Exact: a float64 holds every token id.
    return np.array(ranks.sum(values.tolist())).round().astype(np.int64)
