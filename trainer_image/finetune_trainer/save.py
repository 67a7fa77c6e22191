"""The folder that is published: a plain peft adapter or a whole model, and the tokenizer as it came."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from finetune_api.tuning import Tuning
from finetune_trainer.model import Task, head_of, load_model, quantization_of
from finetune_trainer.state import Tensors
from finetune_trainer.tuning import as_plain_lora

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


def save_adapter(model: Any, parameters: Tensors, initial: Tensors, directory: Path) -> None:
    """adapter_model.safetensors (float32) and adapter_config.json; `parameters`: the trained ones, whole, by name.

    `initial`: of `tuning.initial_of`. Not collective.
    """
    shutil.rmtree(directory, ignore_errors=True)
    parameters = as_plain_lora(parameters, initial, model.peft_config["default"])
    for config in model.peft_config.values():
        if isinstance(getattr(config, "target_modules", None), set):  # a set is written in another order each time
            config.target_modules = sorted(config.target_modules)
    # "auto" would look the base model up on a hub to see whether its vocabulary grew.
    model.save_pretrained(directory, state_dict=parameters, safe_serialization=True, save_embedding_layers=False)
    _readable(directory)


def save_model(
    source: Path, dtype: torch.dtype, task: Task, classes: Sequence[str], parameters: Tensors, directory: Path
) -> None:
    """config.json and safetensors: the base model of `source` with the trained weights in place of its own.

    Read anew into the host's memory, since a rank of ZeRO-3 holds a share alone: as much again as the weights take.
    """
    shutil.rmtree(directory, ignore_errors=True)
    unset_hf_deepspeed_config()
    model = load_model(source, dtype, "sdpa", None, task=task, classes=classes)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in parameters.items():
            named[name].copy_(value)
    model.save_pretrained(directory)
    _readable(directory)


def save_merged(
    source: Path,
    tuning: Tuning,
    dtype: torch.dtype,
    task: Task,
    classes: Sequence[str],
    adapter: Path,
    directory: Path,
) -> None:
    """The base model of `source` with the saved adapter worked into its weights: a whole model, without peft.

    QLoRA's base weights are the quantised ones that the adapter was trained on, made whole again. In the host's memory,
    like `save_model`.
    """
    unset_hf_deepspeed_config()
    quantization = quantization_of(tuning, dtype)
    model = load_model(source, dtype, "sdpa", torch.device("cpu"), quantization, task, classes)
    if quantization:
        model = model.dequantize(dtype)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    # In a process group transformers lets rank 0 alone write; here one rank of each pod does.
    merged.should_save_on_this_rank = lambda is_main_process: True
    merged.save_pretrained(directory)
    _readable(directory)


def save_classes(source: Path, classes: Sequence[str], directory: Path) -> None:
    """config.json beside an adapter: the base model's with the classes of the new head, which peft does not write."""
    AutoConfig.from_pretrained(source, local_files_only=True, **head_of(classes)).save_pretrained(directory)


def _readable(directory: Path) -> None:
    """safetensors writes files that only their owner may read."""
    for path in directory.glob("*.safetensors"):
        path.chmod(0o644)


def copy_tokenizer(model: Path, directory: Path) -> None:
    """The base model's own files: written anew they would carry the folder that they were loaded from."""
    for pattern in TOKENIZER_FILES:
        for path in model.glob(pattern):
            if path.is_file():
                target = directory / path.relative_to(model)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
