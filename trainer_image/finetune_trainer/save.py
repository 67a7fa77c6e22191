"""The folder that is published: a plain peft adapter, the tokenizer as it came, the model card and the figures."""

import shutil
from pathlib import Path
from typing import Any

from finetune_trainer.state import Tensors

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
)


def save_adapter(model: Any, parameters: Tensors, directory: Path) -> None:
    """adapter_model.safetensors (float32) and adapter_config.json; `parameters`: the trained ones, whole, by name."""
    shutil.rmtree(directory, ignore_errors=True)
    for config in model.peft_config.values():
        if isinstance(config.target_modules, set):  # a set is written in another order each time
            config.target_modules = sorted(config.target_modules)
    # "auto" would look the base model up on a hub to see whether its vocabulary grew.
    model.save_pretrained(directory, state_dict=parameters, safe_serialization=True, save_embedding_layers=False)
    # safetensors writes files that only their owner may read.
    (directory / "adapter_model.safetensors").chmod(0o644)


def copy_tokenizer(model: Path, directory: Path) -> None:
    """The base model's own files: written anew they would carry the folder that they were loaded from."""
    for pattern in TOKENIZER_FILES:
        for path in model.glob(pattern):
            if path.is_file():
                target = directory / path.relative_to(model)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
