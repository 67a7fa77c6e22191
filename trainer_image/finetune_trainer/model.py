"""The base model from the pod's disk, and what of it is trained."""

import importlib.util
import os
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import set_seed

from finetune_api.failures import FineTuneError, Reason
from finetune_api.job import FineTuneJobSpec
from finetune_api.run import Devices
from finetune_api.tuning import LoRA, Tuning

DTYPES = {"BFloat16": torch.bfloat16, "Float16": torch.float16, "Float32": torch.float32}


def dtype_of(spec: FineTuneJobSpec, devices: Devices) -> torch.dtype:
    """Auto: bfloat16 on GPUs that compute in it, float32 elsewhere. Raises InvalidSpec."""
    wanted = spec.base_model.dtype
    if wanted == "Auto":
        return torch.bfloat16 if devices.kind == "CUDA" and torch.cuda.is_bf16_supported() else torch.float32
    if wanted == "Float16" and devices.kind == "CPU":
        raise FineTuneError(
            Reason.INVALID_SPEC,
            "spec.baseModel.dtype: found Float16; CPUs train in Float32 or BFloat16 (Auto: Float32)",
        )
    return DTYPES[wanted]


def load_tokenizer(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def attention_of(dtype: torch.dtype, devices: Devices) -> Literal["flash_attention_2", "sdpa"]:
    """flash-attention where the image has it and the weights are of a kind that it computes in."""
    flash = devices.kind == "CUDA" and dtype != torch.float32 and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def load_model(path: Path, dtype: torch.dtype, attention: str, device: torch.device | None) -> Any:
    """A causal language model from safetensors; code that comes with a model is never run. Raises ModelInvalid.

    `device`: where each weight goes as it is read; None leaves it to DeepSpeed, which partitions as it reads.
    """
    on_gpu = device is not None and device.type == "cuda"
    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            device_map={"": device} if on_gpu else None,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        text = str(error).replace(f"{path}{os.sep}", "").replace(str(path), "the model").strip().split("\n")[0]
        raise FineTuneError(Reason.MODEL_INVALID, f"the base model cannot be loaded: {text}") from error


def lora_config(lora: LoRA, base_model_uri: str) -> LoraConfig:
    names = lora.target_modules
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha if lora.alpha != int(lora.alpha) else int(lora.alpha),
        lora_dropout=lora.dropout,
        target_modules="all-linear" if names == ["AllLinear"] else list(names),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model_uri,
    )


def tune(model: Any, tuning: Tuning, base_model_uri: str, seed: int, gradient_checkpointing: bool) -> PeftModel:
    """The model with an adapter to train and the rest frozen; the same adapter on every rank. Raises InvalidSpec."""
    if tuning.type != "LoRA":
        raise FineTuneError(Reason.INVALID_SPEC, f"spec.tuning.type: found {tuning.type}; this version supports LoRA")
    set_seed(seed)
    model.config.use_cache = False
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = lora_config(tuning.lora or LoRA(), base_model_uri)
    try:
        peft = get_peft_model(model, config)
    except ValueError as error:
        raise FineTuneError(Reason.INVALID_SPEC, f"spec.tuning.lora.targetModules: {error}") from error
    # peft writes the model's own path over what it was given, and a mounted path would leak into what is published.
    peft.peft_config["default"].base_model_name_or_path = base_model_uri
    return peft


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """By name, in the model's order: the same on every rank and under every strategy."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_packing(forward: Any, flat: bool, device: torch.device) -> None:
    """Packed examples must not see each other: the second's logits may not depend on the first. Raises InvalidSpec."""
    second = [5, 6, 7, 8]
    ids = torch.tensor([[1, 2, 3, *second], [4, 3, 1, *second]], device=device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]], device=device).expand(2, -1)
    if flat:
        ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
    with torch.no_grad():
        logits = forward(input_ids=ids, position_ids=positions).logits.reshape(2, 7, -1)[:, 3:].float()
    difference = float((logits[0] - logits[1]).abs().max())
    if difference > 1e-3 * max(1.0, float(logits.abs().max())):
        raise FineTuneError(
            Reason.INVALID_SPEC,
            "spec.method.sft.packing: found true; this model lets packed examples see each other (logits differ by "
            f"{difference:.2g}); set it to false",
        )
