"""A small Llama that has read the standard library's docstrings: the demo's base model, made in under a minute.

`python base_model.py TEXT.jsonl DIR` trains a byte-level BPE tokenizer on the text and a model of about a million
parameters from scratch, and writes them as any Hugging Face model is written (safetensors). Deterministic.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

VOCABULARY, LENGTH, BATCH, STEPS, LEARNING_RATE = 2048, 128, 8, 400, 7e-3

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def main(text_file: Path, directory: Path) -> None:
    logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(min(os.cpu_count() or 1, 8))
    texts = [json.loads(line)["text"] for line in text_file.read_text(encoding="utf-8").splitlines()]
    tokenizer = make_tokenizer(texts)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.06,  # the usual 0.02 is for wide models: this one learns faster from larger weights
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    pretrain(model, pack(tokenizer, texts))
    # The chat's tokens were never seen: they start as the mean word, not as noise.
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        for token in ("<|system|>", "<|user|>", "<|assistant|>"):
            embeddings[tokenizer.convert_tokens_to_ids(token)] = embeddings.mean(dim=0)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[2:],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts in one row after another: (rows, LENGTH) token ids."""
    ids = [i for encoded in tokenizer(texts)["input_ids"] for i in [*encoded, tokenizer.eos_token_id]]
    rows = len(ids) // LENGTH
    return torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH)


def pretrain(model: LlamaForCausalLM, rows: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    start, size = time.monotonic(), sum(p.numel() for p in model.parameters())
    print(f"pre-training {size / 1e6:.1f}M parameters on {rows.numel():,} tokens, {STEPS} steps", flush=True)
    order = torch.Generator().manual_seed(0)
    model.train()
    for step in range(STEPS):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=order)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"  step {step + 1}: loss {loss.item():.2f}, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
