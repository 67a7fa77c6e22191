"""The training state as plain tensors and JSON: the same files for DDP and every ZeRO stage, for any number of ranks.

    adapter.safetensors     the trained parameters, float32, by name
    optimizer.safetensors   Adam's moments: `<name>|exp_avg`, `<name>|exp_avg_sq`
    state.json              SavedState

Nothing is pickled. What else a run depends on, the order of the data and the random numbers of dropout, is a function
of (seed, step, rank) and needs no saving.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file

from finetune_trainer.model import trained_parameters

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
Tensors = dict[str, torch.Tensor]


class SavedState(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    step: int
    """Optimizer steps that are done."""
    optimizer_step: int
    """Adam's own count; behind `step` where float16 overflowed and a step was skipped."""
    tokens: int
    """Tokens seen, padding excluded."""
    seconds: float
    """Spent training, over all attempts."""
    before: dict[str, float]
    """Metrics of the base model, evaluated once per job."""
    history: list[dict[str, float]]
    """What was logged so far: step, loss, learning_rate, grad_norm, tokens_per_second, and figures of evaluations."""
    seen: dict[str, tuple[int, int]] = {}
    """By dataset: rows and tokens that were learned."""
    sound: int | None = None
    """The newest step with a checkpoint that was saved while nothing was suspicious."""
    loss_scale: dict[str, float] = {}
    """float16 under DDP: the gradient scaler's state."""


def capture(trainer: Any) -> tuple[Tensors, Tensors, int]:
    """Trained parameters, Adam's moments (both on the CPU, whole) and Adam's count. Collective under ZeRO."""
    named = trained_parameters(trainer.model)
    if trainer.is_deepspeed_enabled:
        return _capture_zero(trainer.model_wrapped.optimizer, named)
    optimizer = _adam(trainer)
    parameters = {name: _cpu(parameter.data) for name, parameter in named.items()}
    moments = {
        f"{name}|{key}": _cpu(optimizer.state[parameter][key])
        for name, parameter in named.items()
        for key in MOMENTS
        if parameter in optimizer.state
    }
    counts = [int(optimizer.state[p]["step"]) for p in named.values() if p in optimizer.state]
    return parameters, moments, max(counts, default=0)


def restore(trainer: Any, directory: Path, saved: SavedState) -> None:
    """Puts back what `write` wrote; after DDP or DeepSpeed have wrapped the model. Collective under ZeRO."""
    named = trained_parameters(trainer.model)
    parameters, moments = load_file(directory / ADAPTER), load_file(directory / OPTIMIZER)
    if parameters.keys() != named.keys():
        raise ValueError(
            f"the checkpoint has {len(parameters)} trained tensors; this model has {len(named)}, of other names"
        )
    if trainer.is_deepspeed_enabled:
        _restore_zero(trainer.model_wrapped.optimizer, named, parameters, moments, saved.optimizer_step)
        scheduler = trainer.model_wrapped.lr_scheduler
    else:
        optimizer = _adam(trainer)
        for name, parameter in named.items():
            parameter.data.copy_(parameters[name])
            if saved.optimizer_step:
                optimizer.state[parameter] = _adam_state(
                    optimizer, saved.optimizer_step, *(moments[f"{name}|{key}"].to(parameter.device) for key in MOMENTS)
                )
        scheduler = trainer.lr_scheduler
        if saved.loss_scale and trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(saved.loss_scale)
    # The rate is a function of the step: one step up to the one that was saved sets it in every group.
    scheduler.last_epoch = saved.step - 1
    scheduler.step()


def write(directory: Path, parameters: Tensors, moments: Tensors, saved: SavedState) -> None:
    directory.mkdir(parents=True)
    save_file(parameters, directory / ADAPTER)
    save_file(moments, directory / OPTIMIZER)
    (directory / STATE).write_text(saved.model_dump_json())


def read(directory: Path) -> SavedState:
    return SavedState.model_validate_json((directory / STATE).read_bytes())


def parameters_of(directory: Path) -> Tensors:
    """The trained parameters of what `write` wrote."""
    found: Tensors = load_file(directory / ADAPTER)
    return found


def loss_scale(trainer: Any) -> dict[str, float]:
    scaler = getattr(trainer.accelerator, "scaler", None)
    return {} if scaler is None or trainer.is_deepspeed_enabled else dict(scaler.state_dict())


def _capture_zero(zero: Any, named: dict[str, torch.nn.Parameter]) -> tuple[Tensors, Tensors, int]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    parameters = {name: _cpu(safe_get_full_fp32_param(parameter)) for name, parameter in named.items()}
    states = [zero.optimizer.state.get(part, {}) for part in _partitions(zero)]
    count = max((int(state["step"]) for state in states if "step" in state), default=0)
    moments = {
        f"{name}|{key}": _cpu(safe_get_full_optimizer_state(parameter, key))
        for name, parameter in named.items()
        for key in MOMENTS
        if count
    }
    return parameters, moments, count


def _restore_zero(
    zero: Any, named: dict[str, torch.nn.Parameter], parameters: Tensors, moments: Tensors, count: int
) -> None:
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if count:
        # Adam makes its moments at its first step; they must exist to be filled.
        for part in _partitions(zero):
            zero.optimizer.state[part] = _adam_state(
                zero.optimizer, count, torch.zeros_like(part), torch.zeros_like(part)
            )
        if link := getattr(zero, "_lazy_init_hp_params_optimizer_state", None):
            link()
    for name, parameter in named.items():
        value = parameters[name].to(parameter.device)
        # First what the forward pass uses (rounded to its dtype), then the float32 master that the optimizer keeps.
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value)
        for key in MOMENTS if count else ():
            safe_set_full_optimizer_state(parameter, moments[f"{name}|{key}"].to(parameter.device), key)


def _partitions(zero: Any) -> list[torch.Tensor]:
    """This rank's flat float32 parts: ZeRO-3 keeps them under one name, ZeRO-1 and -2 under another."""
    parts = getattr(zero, "fp32_partitioned_groups_flat", None)
    return list(zero.single_partition_of_fp32_groups if parts is None else parts)


def _adam(trainer: Any) -> Any:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def _adam_state(optimizer: Any, count: int, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> dict[str, torch.Tensor]:
    # A fused or capturable Adam counts on the device, the plain one on the CPU.
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    step = torch.tensor(float(count), device=exp_avg.device if on_device else "cpu")
    return {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
