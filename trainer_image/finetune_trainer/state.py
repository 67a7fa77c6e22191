"""The training state as plain tensors and JSON: the same files for DDP and every ZeRO stage, for any number of ranks.

    adapter.safetensors     the trained parameters, float32, by name
    optimizer.safetensors   Adam's moments, float32: `<name>|exp_avg`, `<name>|exp_avg_sq`
    state.json              SavedState

What is large is in parts, `adapter-00001-of-00003.safetensors` and so on, with an index as transformers writes it.

Nothing is pickled. What else a run depends on, the order of the data and the random numbers of dropout, is a function
of (seed, step, rank) and needs no saving.
"""

import json
from collections.abc import Iterator, KeysView
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open

from finetune_trainer.model import trained_parameters
from finetune_trainer.snapshot import INDEX

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


def shapes(trainer: Any) -> dict[str, dict[str, list[int]]]:
    """By file, the names and shapes of what `parameters` and `moments` yield."""
    own = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in trained_parameters(trainer.model).items()}
    return {ADAPTER: own, OPTIMIZER: {f"{name}|{key}": shape for name, shape in own.items() for key in MOMENTS}}


def parameters(trainer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The trained ones, whole, on whichever device. Collective under ZeRO: every rank takes them all."""
    for name, parameter in trained_parameters(trainer.model).items():
        yield name, _full_parameter(trainer, parameter)


def moments(trainer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Adam's, as `parameters`; zeros where it has not moved yet."""
    count = adam_steps(trainer)
    for name, parameter in trained_parameters(trainer.model).items():
        for key in MOMENTS:
            yield f"{name}|{key}", _full_moment(trainer, parameter, key, count)


def adam_steps(trainer: Any) -> int:
    """Adam's own count."""
    if trainer.is_deepspeed_enabled:
        zero = trainer.model_wrapped.optimizer
        states = [zero.optimizer.state.get(part, {}) for part in _partitions(zero)]
    else:
        optimizer = _adam(trainer)
        states = [optimizer.state.get(p, {}) for p in trained_parameters(trainer.model).values()]
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def on_cpu(trainer: Any) -> Tensors:
    """The trained parameters, on every rank. Collective under ZeRO."""
    return {name: _cpu(value) for name, value in parameters(trainer)}


def restore(trainer: Any, directory: Path, saved: SavedState) -> None:
    """Puts back what a checkpoint holds; after DDP or DeepSpeed have wrapped the model. Collective under ZeRO."""
    named = trained_parameters(trainer.model)
    kept, adam = Stored(directory, ADAPTER), Stored(directory, OPTIMIZER)
    if kept.names != named.keys():
        raise ValueError(
            f"the checkpoint has {len(kept.names)} trained tensors; this model has {len(named)}, of other names"
        )
    if trainer.is_deepspeed_enabled:
        _restore_zero(trainer.model_wrapped.optimizer, named, kept, adam, saved.optimizer_step)
        scheduler = trainer.model_wrapped.lr_scheduler
    else:
        optimizer = _adam(trainer)
        for name, parameter in named.items():
            parameter.data.copy_(kept[name])
            if saved.optimizer_step:
                optimizer.state[parameter] = _adam_state(
                    optimizer, saved.optimizer_step, *(adam[f"{name}|{key}"].to(parameter.device) for key in MOMENTS)
                )
        scheduler = trainer.lr_scheduler
        if saved.loss_scale and trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(saved.loss_scale)
    # The rate is a function of the step: one step up to the one that was saved sets it in every group.
    scheduler.last_epoch = saved.step - 1
    scheduler.step()


def read(directory: Path) -> SavedState:
    return SavedState.model_validate_json((directory / STATE).read_bytes())


def parameters_of(directory: Path) -> Tensors:
    """The trained parameters of a checkpoint."""
    stored = Stored(directory, ADAPTER)
    return {name: stored[name] for name in stored.names}


class Stored:
    """The tensors of one file, or of its parts, read one by one."""

    def __init__(self, directory: Path, name: str) -> None:
        index = directory / (name + INDEX)
        if index.exists():
            files = {
                key: directory / Path(part).name for key, part in json.loads(index.read_text())["weight_map"].items()
            }
        else:
            with safe_open(directory / name, "pt") as file:
                files = dict.fromkeys(file.keys(), directory / name)
        self._files = files
        self._open: dict[Path, Any] = {}

    @property
    def names(self) -> KeysView[str]:
        return self._files.keys()

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, "pt").__enter__()  # type: ignore[no-untyped-call]
        found: torch.Tensor = self._open[path].get_tensor(name)
        return found


def loss_scale(trainer: Any) -> dict[str, float]:
    scaler = getattr(trainer.accelerator, "scaler", None)
    return {} if scaler is None or trainer.is_deepspeed_enabled else dict(scaler.state_dict())


def _full_parameter(trainer: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    if not trainer.is_deepspeed_enabled:
        return parameter.data
    from deepspeed.utils import safe_get_full_fp32_param

    return cast(torch.Tensor, safe_get_full_fp32_param(parameter))


def _full_moment(trainer: Any, parameter: torch.nn.Parameter, key: str, count: int) -> torch.Tensor:
    if not trainer.is_deepspeed_enabled:
        state = _adam(trainer).state.get(parameter, {})
        return cast(torch.Tensor, state[key]) if key in state else torch.zeros_like(parameter)
    from deepspeed.utils import safe_get_full_optimizer_state

    if not count:
        return torch.zeros(getattr(parameter, "ds_shape", parameter.shape))
    return cast(torch.Tensor, safe_get_full_optimizer_state(parameter, key))


def _restore_zero(zero: Any, named: dict[str, torch.nn.Parameter], kept: Stored, adam: Stored, count: int) -> None:
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
        value = kept[name].to(parameter.device)
        # First what the forward pass uses (rounded to its dtype), then the float32 master that the optimizer keeps.
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value)
        for key in MOMENTS if count else ():
            safe_set_full_optimizer_state(parameter, adam[f"{name}|{key}"].to(parameter.device), key)


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
