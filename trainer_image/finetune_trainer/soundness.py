"""Weights must be numbers: one NaN makes every loss NaN, and would be told as a training that diverged."""

from pathlib import Path

import torch
from safetensors import safe_open

from finetune_api.failures import FineTuneError, Reason
from finetune_trainer.model import reading

KINDS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Of other types, quantised ones, every value is a number."""


def check_finite(folder: Path, field: str, rank: int = 0, ranks: int = 1) -> None:
    """Every tensor of every *.safetensors; of several ranks each reads its share. Raises ModelInvalid.

    One pass at the speed of the memory, over what is read for loading anyway. `field`: where the user named the folder.
    """
    place = 0
    for path in sorted(folder.glob("*.safetensors")):
        with reading(f"{field}: {path.name} cannot be read", folder), safe_open(path, framework="pt") as file:
            names = file.keys()
            for name in names:
                place += 1
                if place % ranks == rank:
                    _check(file.get_tensor(name), name, path.name, field)


def _check(tensor: torch.Tensor, name: str, file: str, field: str) -> None:
    if tensor.dtype not in KINDS or not tensor.numel():
        return
    # Twenty times as fast as isfinite: a NaN is both the least and the greatest.
    if all(map(bool, torch.isfinite(torch.stack(torch.aminmax(tensor))))):
        return
    nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    found = " and ".join(f"{count:,} {what}" for count, what in ((nan, "NaN"), (infinite, "infinite")) if count)
    raise FineTuneError(
        Reason.MODEL_INVALID,
        f"{field}: {file}: the tensor {name} holds {found} of {tensor.numel():,} values; each must be a finite number",
    )
