"""Forward passes one token at a time of a model that ZeRO-3 has spread over the ranks, and that each would gather anew.

Where all ranks have room for the whole model, it is gathered once for all of them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from finetune_trainer import log
from finetune_trainer.distributed import on_any

SHARE = 0.5
"""Of the free memory that the weights may take: the rest is for the answers' keys and values."""


@contextmanager
def gathered(engine: Any, device: torch.device) -> Iterator[bool]:
    """Yields whether a forward pass is a collective, of which each rank must make as many as the others.

    `engine`: the model as accelerate has wrapped it. Collective under ZeRO-3.
    """
    if not is_deepspeed_zero3_enabled():
        yield False
        return
    parameters = list(engine.module.parameters())
    size = sum(p.ds_numel * p.element_size() for p in parameters)
    if on_any(torch.tensor(size > SHARE * free_memory(device), device=device)):
        log.event("weights are gathered for every token", level="warning", why="no rank may lack room", bytes=size)
        yield True
        return
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    with deepspeed.zero.GatheredParameters(parameters):
        # They would free each weight after its use.
        remove_hooks(engine)
        # Until DeepSpeed has seen a whole step, a collective. TRL leaves it where it is.
        offload = engine.optimizer.parameter_offload
        new_step = offload.module._forward_pre_hooks[offload.fwd_pre_hook.id]
        offload.fwd_pre_hook.remove()
        try:
            yield False
        finally:
            offload.fwd_pre_hook = offload.module.register_forward_pre_hook(new_step, prepend=True)
            add_hooks(engine)


def free_memory(device: torch.device, cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that this rank may still take: of its GPU, or its part of what is left to the pod."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free: float = psutil.virtual_memory().available
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        free = free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no cgroup of version 2 says what the pod may have
    return max(0.0, free) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
