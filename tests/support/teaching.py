"""What a model of two layers can learn in seconds, in every format of data: rows made by code, and the model."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.tiny import make_tiny_model

GOOD = ["apple", "river", "stone", "cloud", "window", "garden", "paper", "silver"]
BAD = ["morning", "engine", "letter", "yellow", "market", "summer", "bridge", "ladder"]
TEXT = "Number repeat these words which question answer first second south north passage says " + " ".join(GOOD + BAD)
NEEDED = {
    "Messages": ("messages",),
    "PromptCompletion": ("prompt", "completion"),
    "Instruction": ("instruction", "input", "output"),
    "Text": ("text",),
    "Preference": ("prompt", "chosen", "rejected"),
    "Labelled": ("text", "label"),
    "PromptOnly": ("prompt",),
}


def rows(dataset: dict[str, Any], unpaired: bool = False) -> Iterator[dict[str, Any]]:
    """Endless rows for a dataset of a spec, by its format and columns; a good answer is of words from GOOD alone.

    `unpaired`: Preference as a completion and whether it is good.
    """
    form = dataset.get("format", "Auto").replace("Auto", "PromptCompletion")
    named = {role: name for role, name in (dataset.get("columns") or {}).items() if name}
    needed = dict.fromkeys((*NEEDED[form], *named))
    if form == "Preference" and unpaired:
        needed = dict.fromkeys(("prompt", "completion", "label"))
    for number in itertools.count():
        good, bad = _words(number, GOOD), _words(number, BAD)
        # By no digit of the number: the words alone tell.
        fine = random.Random(number).random() < 0.5
        question = f"Number {number}: which words of {good[1]} {bad[1]}?"
        answer = good if fine or not unpaired else bad
        turns = ({"role": "user", "content": question}, {"role": "assistant", "content": " ".join(good)})
        known = {
            "messages": list(turns),
            "prompt": question,
            "completion": " " + " ".join(answer),
            "text": f"{question} {' '.join(good if fine or form != 'Labelled' else bad)}",
            "instruction": "Which words?",
            "input": question,
            "output": " ".join(good),
            "system": "Answer in words.",
            "chosen": " " + " ".join(good),
            "rejected": " " + " ".join(bad),
            "label": fine if unpaired else ("first" if fine else "second"),
            "context": [f"Passage {number} says {' '.join(good)}.", f"Another says {' '.join(bad)}."],
            "slice": "north" if number % 3 else "south",
        }
        yield {named.get(role, role): known[role] for role in needed}


def _words(number: int, words: list[str]) -> list[str]:
    return [words[(number * step + shift) % len(words)] for shift, step in enumerate((1, 3, 5)[: 2 + number // 2 % 2])]


def write_rows(path: Path, dataset: dict[str, Any], count: int, first: int = 0, unpaired: bool = False) -> Path:
    """Rows `first` to `first + count` as JSONL."""
    found = itertools.islice(rows(dataset, unpaired), first, first + count)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def make_model(directory: Path) -> Path:
    """A Llama of 2 layers and 32 dimensions that answers questions with two or three words, good or bad by chance."""
    text = f"{TEXT} {TEXT.replace(' ', ': ')} 0123456789?.\n"
    make_tiny_model(directory, vocab_text=text, vocab_size=360, max_positions=256, spread=0.3)
    shown = itertools.islice(rows({"format": "Preference"}, unpaired=True), 1000, 1400)
    return teach(directory, [f"{row['prompt']}{row['completion']}</s>" for row in shown], steps=200, rate=1e-2)


def teach(directory: Path, texts: list[str], steps: int, rate: float) -> Path:
    """The model there learns the texts by heart, 16 a step."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    shown = [torch.tensor(tokenizer.encode(text)) for text in texts]
    optimizer, choose = torch.optim.AdamW(model.parameters(), lr=rate), random.Random(0)
    for _ in range(steps):
        batch = torch.nn.utils.rnn.pad_sequence(choose.sample(shown, 16), batch_first=True, padding_value=-100)
        loss = model(input_ids=batch.clamp(min=0), labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return directory
