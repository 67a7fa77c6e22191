"""A tiny model that knows how a list of tasks with their answers goes on: what a stage that generates asks of one."""

import itertools
import random
from pathlib import Path

from finetune_trainer.synthesis.requests import PREAMBLE, Pair, opening, request
from support.teaching import GOOD
from support.tiny import make_tiny_model

PAIRS = [Pair(f"Repeat {one} {two}", f"{one} {two}") for one, two in itertools.permutations(GOOD, 2)]
KNOWN = PAIRS[::4]
"""What the user has; the rest is for the model to find."""


def known_rows(pairs: list[Pair] = KNOWN) -> list[dict[str, str]]:
    return [{"prompt": pair.instruction, "completion": f" {pair.answer}"} for pair in pairs]


def make_writer(directory: Path) -> Path:
    """It has learned PAIRS by heart, two or so shown before each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shown = [request(PAIRS, number, 2, 0) for number in range(400)]
    texts = [f"{PREAMBLE}{one.text}{opening(one)}" for one in shown]
    make_tiny_model(directory, vocab_text="\n".join(texts[:40]), vocab_size=400, hidden=64, max_positions=256)
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    rows = [torch.tensor(tokenizer.encode(text)) for text in texts]
    optimizer, choose = torch.optim.AdamW(model.parameters(), lr=4e-3), random.Random(0)
    torch.manual_seed(0)
    for _ in range(150):
        batch = torch.nn.utils.rnn.pad_sequence(choose.sample(rows, 16), batch_first=True, padding_value=-100)
        loss = model(input_ids=batch.clamp(min=0), labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return directory
