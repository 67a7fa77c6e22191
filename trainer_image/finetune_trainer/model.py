"""The base model from the pod's disk, whole or quantised."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed import DistError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from finetune_api.failures import FineTuneError, Reason
from finetune_api.job import FineTuneJobSpec
from finetune_api.run import Devices
from finetune_api.tuning import Tuning
from finetune_trainer.outcome import one_line

Task = Literal["CAUSAL_LM", "SEQ_CLS"]
"""In peft's words: a language model, or one score or class for a sequence by a new head."""
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


@contextlib.contextmanager
def reading(what: str, folder: Path) -> Iterator[None]:
    """Says of whatever a library raises over a tenant's files that they are the cause. Raises ModelInvalid.

    What the machine lacks, or another rank, is none of their fault and passes.
    """
    try:
        yield
    except (FineTuneError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError, DistError):
        raise
    except Exception as error:
        text = str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "the model").strip()
        text = f"{type(error).__name__}: {text}" if " " not in text else text
        raise FineTuneError(Reason.MODEL_INVALID, f"{what}: {one_line(text.partition(chr(10))[0])}") from error


def load_tokenizer(path: Path) -> Any:
    """Raises ModelInvalid."""
    with reading("the tokenizer cannot be loaded", path):
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def attention_of(dtype: torch.dtype, devices: Devices) -> Literal["flash_attention_2", "sdpa"]:
    """flash-attention where the image has it and the weights are of a kind that it computes in."""
    flash = devices.kind == "CUDA" and dtype != torch.float32 and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def quantization_of(tuning: Tuning, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """QLoRA's: NF4 in blocks of 64 weights, their scales quantised again (Dettmers et al. 2023)."""
    if tuning.type != "QLoRA":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def load_model(
    path: Path,
    dtype: torch.dtype,
    attention: str,
    device: torch.device | None,
    quantization: BitsAndBytesConfig | None = None,
    task: Task = "CAUSAL_LM",
    classes: Sequence[str] = (),
) -> Any:
    """The model from safetensors; code that comes with a model is never run. Raises ModelInvalid.

    `device`: where each weight goes as it is read; None leaves it to DeepSpeed, which partitions as it reads.
    `classes`: what a head tells apart; a head without classes gives one score.
    """
    on_gpu = device is not None and device.type == "cuda"
    scores = task == "SEQ_CLS"
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    with reading("the base model cannot be loaded", path):
        model = kind.from_pretrained(
            path,
            **(head_of(classes) if scores else {}),
            dtype=dtype,
            # Quantised weights would go to a GPU by themselves, wherever they are wanted.
            device_map={"": device} if on_gpu or (quantization and device) else None,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            quantization_config=quantization,
        )
    if quantization:
        for module in model.modules():
            # bitsandbytes would repack the weights at the first evaluation, for a kernel that rounds to bfloat16.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model


def head_of(classes: Sequence[str]) -> dict[str, Any]:
    """What config.json says of a head: how many outputs it has, and what they are called."""
    if not classes:
        return {"num_labels": 1}
    names = dict(enumerate(classes))
    # Else transformers would guess from the type of the labels.
    return {
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
        "problem_type": "single_label_classification",
    }


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
