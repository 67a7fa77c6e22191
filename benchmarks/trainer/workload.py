"""Model and data of the benchmark, made from a seed; and the plan of steps that ours follows."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from task import Task

from finetune_trainer.batches import Examples, Plan, rows_of

PROMPT_SHARE = 0.4
"""Of an example's tokens: the rest is learned."""


@dataclass(frozen=True)
class Size:
    """Of a Llama. The defaults: so large that two cores compute, and do not wait for the interpreter."""

    hidden: int = 256
    layers: int = 6
    intermediate: int = 688
    heads: int = 8
    key_value_heads: int = 4
    vocabulary: int = 4096


SIZES = {"tiny": Size(64, 2, 128, 4, 2, 512), "small": Size(), "8b": Size(4096, 32, 14336, 32, 8, 128_256)}
"""The largest is Llama-3-8B's."""


def make_model(folder: Path, size: Size, max_length: int, dtype: str) -> Path:
    """Random weights, and a tokenizer of as many words as there are tokens."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if dtype == "BFloat16" else torch.float32)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.key_value_heads,
            max_position_embeddings=max_length,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size.vocabulary)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(folder)
    return folder


def make_data(file: Path, lengths: np.ndarray, vocabulary: int, prompt_share: float = PROMPT_SHARE) -> Path:
    rng = np.random.default_rng(1)
    ids = [rng.integers(3, vocabulary, length).tolist() for length in lengths.tolist()]
    labels = [[-100] * int(prompt_share * len(row)) + row[int(prompt_share * len(row)) :] for row in ids]
    kind = pa.list_(pa.int32())
    pq.write_table(pa.table({"input_ids": pa.array(ids, kind), "labels": pa.array(labels, kind)}), file)
    return file


def mixed_lengths(count: int, max_length: int) -> np.ndarray:
    """Log-normal, as instructions and their answers are: a mean of a quarter of the longest, a tail up to it."""
    drawn = np.random.default_rng(2).lognormal(np.log(max_length / 6), 0.9, count)
    return np.clip(drawn, 16, max_length).astype(int)


def examples_of(file: Path) -> Examples:
    table = pq.read_table(file)
    ids, labels = (table[name].combine_chunks() for name in ("input_ids", "labels"))
    return Examples(
        ids.values.to_numpy(),
        labels.values.to_numpy(),
        ids.offsets.to_numpy().astype(np.int64),
        np.zeros(len(ids), np.int64),
    )


def plan_of(task: Task, examples: Examples) -> Plan:
    return Plan(
        rows_of(examples, task.packed, task.max_length, task.seed),
        global_batch=task.micro * task.accumulation,
        weights=[None],
        seed=task.seed,
        epochs=None,
        max_steps=task.steps,
    )


def flops_per_token(model: Path, mean_length: float) -> float:
    """Of a LoRA step: a forward pass, and the gradients of what flows through the frozen weights (4 P), and attention.

    The adapter's own work and what is recomputed do not count (PaLM's MFU, Chowdhery et al. 2022, for frozen weights).
    """
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    shared = config["num_key_value_heads"] / heads
    block = hidden * hidden * (2 + 2 * shared) + 3 * hidden * config["intermediate_size"]
    return 4 * (layers * block + hidden * config["vocab_size"]) + 6 * layers * hidden * mean_length
