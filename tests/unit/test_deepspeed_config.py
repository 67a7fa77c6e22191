"""What the spec means to DeepSpeed and transformers."""

from pathlib import Path
from typing import Any

import pytest

from finetune_api.sizing import Sizing
from finetune_api.training import Training
from finetune_trainer.arguments import deepspeed_config, log_interval, training_arguments, warmup_steps


def make_sizing(**fields: Any) -> Sizing:
    return Sizing.model_validate(
        {"strategy": "ZeRO2", "micro_batch_size": 4, "gradient_accumulation": 2, "memoryPerGPU": 1} | fields
    )


def config(dtype: str = "BFloat16", device: str = "CUDA", **sizing: Any) -> dict[str, Any]:
    made = deepspeed_config(make_sizing(**sizing), Training(learning_rate=1e-3, max_grad_norm=0.5), dtype, device)
    assert made is not None
    return made


def test_plain_data_parallelism_has_none() -> None:
    assert deepspeed_config(make_sizing(strategy="DDP"), Training(), "Float32", "CPU") is None


@pytest.mark.parametrize(("strategy", "stage"), [("ZeRO1", 1), ("ZeRO2", 2), ("ZeRO3", 3)])
def test_stages(strategy: str, stage: int) -> None:
    zero = config(strategy=strategy)["zero_optimization"]
    assert zero["stage"] == stage
    assert ("stage3_gather_16bit_weights_on_model_save" in zero) == (stage == 3)


@pytest.mark.parametrize(
    ("strategy", "offload", "keys"),
    [
        ("ZeRO2", "None", set()),
        ("ZeRO2", "Optimizer", {"offload_optimizer"}),
        ("ZeRO2", "OptimizerAndParameters", {"offload_optimizer"}),
        ("ZeRO3", "OptimizerAndParameters", {"offload_optimizer", "offload_param"}),
    ],
)
def test_offload(strategy: str, offload: str, keys: set[str]) -> None:
    zero = config(strategy=strategy, offload=offload)["zero_optimization"]
    assert {key for key in zero if key.startswith("offload")} == keys


@pytest.mark.parametrize("dtype", ["BFloat16", "Float16", "Float32"])
def test_precision(dtype: str) -> None:
    made = config(dtype=dtype)
    assert (made["bf16"]["enabled"], made["fp16"]["enabled"]) == (dtype == "BFloat16", dtype == "Float16")


def test_memory_is_pinned_on_gpus_alone() -> None:
    assert config(device="CUDA", offload="Optimizer")["zero_optimization"]["offload_optimizer"]["pin_memory"] is True
    assert config(device="CPU", offload="Optimizer")["zero_optimization"]["offload_optimizer"]["pin_memory"] is False


def test_deepspeed_and_transformers_are_told_the_same() -> None:
    training, sizing = Training(learning_rate=3e-4, weight_decay=0.1, max_grad_norm=0.7), make_sizing()
    made = deepspeed_config(sizing, training, "Float32", "CPU")
    assert made
    arguments = training_arguments(
        training, sizing, output=Path("out"), total_steps=100, dtype="Float32", device="CPU", deepspeed=made
    )
    adam = made["optimizer"]["params"]
    assert adam["torch_adam"] is True
    assert (adam["lr"], adam["weight_decay"]) == (arguments["learning_rate"], arguments["weight_decay"])
    assert adam["betas"] == [arguments["adam_beta1"], arguments["adam_beta2"]]
    assert made["gradient_clipping"] == arguments["max_grad_norm"]
    assert made["train_micro_batch_size_per_gpu"] == arguments["per_device_train_batch_size"]
    assert made["gradient_accumulation_steps"] == arguments["gradient_accumulation_steps"]


@pytest.mark.parametrize(
    ("schedule", "name"), [("Constant", "constant_with_warmup"), ("Linear", "linear"), ("Cosine", "cosine")]
)
def test_schedules(schedule: Any, name: str) -> None:
    training = Training(schedule=schedule, warmup_ratio=0.1)
    arguments = training_arguments(
        training, make_sizing(), output=Path("o"), total_steps=50, dtype="Float32", device="CPU", deepspeed=None
    )
    assert (arguments["lr_scheduler_type"], arguments["warmup_steps"]) == (name, 5)


def test_warm_up_is_a_share_of_all_steps() -> None:
    assert warmup_steps(Training(warmup_ratio=0.03), 1000) == 30
    assert warmup_steps(Training(warmup_ratio=0.0), 1000) == 0


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (199, 1), (1_000, 5), (10_000, 50), (1_000_000, 50)])
def test_log_lines(steps: int, every: int) -> None:
    assert log_interval(steps) == every
