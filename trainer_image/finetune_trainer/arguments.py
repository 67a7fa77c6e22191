"""What the spec means to transformers and DeepSpeed: pure functions."""

from pathlib import Path
from typing import Any

from finetune_api.sizing import Sizing
from finetune_api.training import Training

SCHEDULES = {"Constant": "constant_with_warmup", "Linear": "linear", "Cosine": "cosine"}
STAGES = {"ZeRO1": 1, "ZeRO2": 2, "ZeRO3": 3}
BETAS, EPSILON = (0.9, 0.999), 1e-8


def deepspeed_config(sizing: Sizing, training: Training, dtype: str, device: str) -> dict[str, Any] | None:
    """DeepSpeed's configuration, or None where no ZeRO stage is used.

    `dtype`: BFloat16, Float16 or Float32; `device`: CPU or CUDA.
    """
    if sizing.strategy == "DDP":
        return None
    stage = STAGES[sizing.strategy]
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": device == "CUDA",
        "contiguous_gradients": True,
        # Adapters are small: the default buckets (500 million elements) would be most of what a rank allocates.
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": 50_000_000,
            # Below this size a weight is not partitioned: gathering it would cost more than keeping it.
            "stage3_param_persistence_threshold": 10_000,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if sizing.offload != "None":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "CUDA"}
    if stage == 3 and sizing.offload == "OptimizerAndParameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": device == "CUDA"}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "BFloat16"},
        "fp16": {"enabled": dtype == "Float16"},
        "train_micro_batch_size_per_gpu": sizing.micro_batch_size,
        "gradient_accumulation_steps": sizing.gradient_accumulation,
        "gradient_clipping": training.max_grad_norm,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": training.learning_rate,
                "betas": list(BETAS),
                "eps": EPSILON,
                "weight_decay": training.weight_decay,
                # DeepSpeed's own Adam is compiled at start, by a compiler that images do not have.
                "torch_adam": True,
            },
        },
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def training_arguments(
    training: Training,
    sizing: Sizing,
    *,
    output: Path,
    total_steps: int,
    dtype: str,
    device: str,
    deepspeed: dict[str, Any] | None,
) -> dict[str, Any]:
    """Keyword arguments for transformers.TrainingArguments: everything that would act by itself is off."""
    return {
        "output_dir": str(output),
        "max_steps": total_steps,
        "per_device_train_batch_size": sizing.micro_batch_size,
        "gradient_accumulation_steps": sizing.gradient_accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": SCHEDULES[training.schedule],
        "warmup_steps": warmup_steps(training, total_steps),
        "weight_decay": training.weight_decay,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPSILON,
        "optim": "adamw_torch_fused" if device == "CUDA" else "adamw_torch",
        "max_grad_norm": training.max_grad_norm,
        "seed": training.seed,
        "bf16": dtype == "BFloat16",
        "fp16": dtype == "Float16",
        "use_cpu": device == "CPU",
        "deepspeed": deepspeed,
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
        "logging_strategy": "steps",
        "logging_steps": log_interval(total_steps),
        "logging_first_step": True,
        # A loss that is not a number must be seen, not averaged away.
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": False,
        "include_num_input_tokens_seen": "no",
    }


def warmup_steps(training: Training, total_steps: int) -> int:
    return round(training.warmup_ratio * total_steps)


def log_interval(total_steps: int) -> int:
    """Steps between two log lines: some 200 lines in a short run, one every 50 steps in a long one."""
    return min(50, max(1, total_steps // 200))
