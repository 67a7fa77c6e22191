"""Gangs that learn from their own answers: prompts of three numbers, and answers that are worth what they add up to."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune_api.run import RunConfig
from support.gang import VOCABULARY, Gang, make_gang, make_tiny_model
from support.preferring import PreferenceGang, Row
from support.s3 import S3

LARGE = f"numbers(completion)|sum / [words(completion), 1]|max / {VOCABULARY}"
"""The mean number that an answer is made of, between 0 and 1."""


def make_numbers_model(directory: Path) -> Path:
    """The gang's tiny Llama with a tokenizer whose tokens are numbers: token 17 is the word 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    make_tiny_model(directory)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {str(number): number for number in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def make_prompts(count: int, seed: int = 0) -> list[Row]:
    """Of three to six tokens; the reference is the first of them."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, VOCABULARY, size=rng.integers(3, 7)).tolist() for _ in range(count)]
    return [{"input_ids": ids, "labels": [-100] * len(ids), "reference": str(ids[0])} for ids in prompts]


@dataclass
class PromptGang(PreferenceGang):
    reward_model: Path | None = None
    """The folder of a reward model, which each pod has pulled."""

    def start(self) -> Gang:
        for rank in range(self.config.devices.world_size):
            place = self.work(rank).reward_model
            if self.reward_model and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(self.reward_model)
        return super().start()

    def steps(self) -> list[dict[str, float]]:
        """What was logged of each step, from the published metrics.jsonl."""
        lines = self.s3.get(f"{self.config.output_uri}{self.attempt_uid}/metrics.jsonl").decode().splitlines()
        return [json.loads(line) for line in lines[:-1]]


def make_prompt_gang(
    directory: Path,
    s3: S3,
    model: Path,
    method: Row,
    *,
    reward_model: Path | None = None,
    micro_batch: int = 8,
    prompts: int = 48,
    validation: int = 9,
    **arguments: Any,
) -> PromptGang:
    """`micro_batch` counts answers."""
    gang = make_gang(directory, s3, model, method=method, micro_batch=1, **arguments)
    rollout = gang.config.spec.method.rollout
    assert rollout
    fields = gang.config.to_json()
    answers = gang.config.spec.training.global_batch_size * rollout.answers
    together = gang.config.devices.world_size * micro_batch
    assert answers % together == 0
    fields["sizing"] |= {"microBatchSize": micro_batch, "gradientAccumulation": answers // together}
    known = {f.name: getattr(gang, f.name) for f in dataclasses.fields(gang)} | {"train": {}, "validation": []}
    known["config"] = RunConfig.model_validate(fields)
    rows = {"train": make_prompts(prompts), "validation": make_prompts(validation, seed=99)}
    return PromptGang(**known, kind="Prompts", rows=rows, reward_model=reward_model)
