"""Does what a job published do what it learned? Asked of plain peft and transformers."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.teaching import rows

CHANGED = 1e-3
FIRST, COUNT = 900, 24


def assert_learned(artifact: Path, base: Path, prefers: bool = True) -> None:
    """It loads, and prefers good answers to bad ones by more than the base model does; else it answers otherwise."""
    config = _config(artifact)
    if config.get("task_type") == "SEQ_CLS" or "SequenceClassification" in str(config.get("architectures")):
        model = _load(artifact, base, config, heads=True)
        if _labels_of(model) > 1:
            sure = _certainty(model)
            assert sure > 0.5, f"the true class has a probability of {sure:.3f}"
        else:
            better = _verdict(model)
            assert better > 0, f"good answers score {better:.3f} above bad ones"
        return
    before, after = _preference(_load(None, base, config)), _preference(_load(artifact, base, config))
    assert after > before or (not prefers and abs(after - before) > CHANGED), (
        f"good answers are {after:.3f} likelier than bad ones, before {before:.3f}"
    )


def _config(artifact: Path) -> dict[str, Any]:
    path = artifact / "adapter_config.json"
    found: dict[str, Any] = json.loads((path if path.exists() else artifact / "config.json").read_text())
    return found


def _load(artifact: Path | None, base: Path, config: dict[str, Any], heads: bool = False) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    kind = AutoModelForSequenceClassification if heads else AutoModelForCausalLM
    if artifact is None:
        return kind.from_pretrained(base).eval()
    if "peft_type" not in config:
        return kind.from_pretrained(artifact).eval()
    labels = {"num_labels": _labels(artifact)} if heads else {}
    return PeftModel.from_pretrained(kind.from_pretrained(base, **labels), artifact).eval()


def _labels(artifact: Path) -> int:
    """Rows of the published head."""
    from safetensors import safe_open

    with safe_open(artifact / "adapter_model.safetensors", "pt") as file:
        heads = [file.get_tensor(name) for name in list(file.keys()) if "score" in name]
    return int(heads[0].shape[0])


def _preference(model: Any) -> float:
    """The mean log-probability of good answers less that of bad ones, in nats per answer."""
    return sum(
        _log_probability(model, row["prompt"], row["chosen"]) - _log_probability(model, row["prompt"], row["rejected"])
        for row in _unseen("Preference")
    )


def _log_probability(model: Any, question: str, answer: str) -> float:
    import torch

    tokenizer = _tokenizer(model)
    head = tokenizer(question)["input_ids"]
    tail = tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([head + tail])).logits[0]
    # A prompt of virtual tokens stands before.
    found = logits[-len(tail) - 1 : -1].log_softmax(-1)
    return float(found.gather(1, torch.tensor(tail)[:, None]).sum()) / COUNT


def _labels_of(model: Any) -> int:
    return int(getattr(model, "base_model", model).config.num_labels)


def _certainty(model: Any) -> float:
    """The mean probability of the true class."""
    shares = [
        _scores(model, row["text"]).softmax(-1)[["first", "second"].index(row["label"])] for row in _unseen("Labelled")
    ]
    return float(sum(shares)) / COUNT


def _verdict(model: Any) -> float:
    """How much higher good answers score than bad ones; an answer ends with EOS."""
    margins = [
        _scores(model, f"{row['prompt']}{row['chosen']}", ends=True)
        - _scores(model, f"{row['prompt']}{row['rejected']}", ends=True)
        for row in _unseen("Preference")
    ]
    return float(sum(margins)) / COUNT


def _scores(model: Any, text: str, ends: bool = False) -> Any:
    """What the head says of the last token."""
    import torch

    tokenizer = _tokenizer(model)
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * ends
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def _unseen(form: str) -> Iterator[dict[str, Any]]:
    """Rows that nobody has learned."""
    return itertools.islice(rows({"format": form}), FIRST, FIRST + COUNT)


_TOKENIZERS: dict[str, Any] = {}


def _tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    folder = model.get_base_model().name_or_path if hasattr(model, "get_base_model") else model.name_or_path
    if folder not in _TOKENIZERS:
        _TOKENIZERS[folder] = AutoTokenizer.from_pretrained(folder)
    return _TOKENIZERS[folder]
