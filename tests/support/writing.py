"""A tiny model that knows how a list of tasks with their answers goes on: what a stage that generates asks of one."""

import itertools
from pathlib import Path

from finetune_trainer.synthesis.requests import PREAMBLE, Pair, opening, request
from support.teaching import GOOD, teach
from support.tiny import make_tiny_model

PAIRS = [Pair(f"Repeat {one} {two}", f"{one} {two}") for one, two in itertools.permutations(GOOD, 2)]
KNOWN = PAIRS[::4]
"""What the user has; the rest is for the model to find."""


def known_rows(pairs: list[Pair] = KNOWN) -> list[dict[str, str]]:
    return [{"prompt": pair.instruction, "completion": f" {pair.answer}"} for pair in pairs]


def make_writer(directory: Path) -> Path:
    """It has learned PAIRS by heart, two or so shown before each."""
    shown = [request(PAIRS, number, 2, 0) for number in range(400)]
    texts = [f"{PREAMBLE}{one.text}{opening(one)}" for one in shown]
    make_tiny_model(directory, vocab_text="\n".join(texts[:40]), vocab_size=400, hidden=64, max_positions=256)
    return teach(directory, texts, steps=150, rate=4e-3)
