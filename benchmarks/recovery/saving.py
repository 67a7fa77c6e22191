"""How long a save stops training and how long it takes to resume, by the number of trained parameters."""

import os
import shutil
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from finetune_trainer import state
from finetune_trainer.checkpoint import Checkpoints
from finetune_trainer.distributed import Ranks
from finetune_trainer.state import SavedState
from finetune_trainer.storage import Store
from finetune_trainer.workdir import WorkDir
from support.runs import make_run_config, pod_environment
from support.s3 import S3

WIDTH = 1024
ROUNDS = 5


def measure(directory: Path, s3: S3, parameters: int) -> dict[str, Any]:
    """Of so many trained parameters with Adam's two moments: three float32 each."""
    trainer = _trained(parameters)
    size = 12 * sum(p.numel() for p in trainer.model.parameters())
    ours = _ours(directory / "ours", s3, trainer)
    return {"parameters": parameters, "bytes": size} | ours | _plain(directory / "plain", trainer)


def _trained(parameters: int) -> Any:
    """A model and Adam after a step, as much of a Trainer as a checkpoint looks at."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(max(1, parameters // WIDTH**2))]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    found = SimpleNamespace(model=model, optimizer=optimizer, is_deepspeed_enabled=False)
    found.state = SimpleNamespace(global_step=0)
    found.accelerator = SimpleNamespace(scaler=None)
    found.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return found


def _ours(directory: Path, s3: S3, trainer: Any) -> dict[str, float]:
    directory.mkdir(parents=True)
    config = make_run_config(endpoint=s3.endpoint)
    scratch = f"s3://bucket/{directory.parent.name}/.scratch/{config.job_uid}/"
    config = config.model_copy(update={"scratch_uri": scratch})
    os.environ.update(pod_environment(directory, config) | s3.environment)
    assert dist.group.WORLD
    ranks = Ranks(0, 0, 1, torch.device("cpu"), dist.group.WORLD)
    checkpoints = Checkpoints(Store(config.storage), scratch, WorkDir.from_env(), "0" * 64, ranks, keep=1)
    checkpoints.prepare(trainer)
    stalls, stored = [], []
    for step in range(1, ROUNDS + 1):
        saved = SavedState(step=step, optimizer_step=1, tokens=1, seconds=1.0, before={}, history=[])
        started = time.monotonic()
        stalls.append(checkpoints.save(trainer, lambda count, saved=saved: saved))
        checkpoints.wait()
        stored.append(time.monotonic() - started)
        checkpoints.check()
    started = time.monotonic()
    resumed = checkpoints.newest()
    assert resumed
    fetched = time.monotonic() - started
    state.restore(trainer, resumed.directory, resumed.saved)
    whole = time.monotonic() - started
    checkpoints.close()
    shutil.rmtree(directory)
    # The first is shown as well: its pages are the operating system's to find.
    return {
        "stall": statistics.median(stalls),
        "stallWorst": max(stalls),
        "stored": statistics.median(stored),
        "fetched": fetched,
        "resumed": whole,
    }


def _plain(directory: Path, trainer: Any) -> dict[str, float]:
    """What transformers' Trainer does for a checkpoint, to the local disk: it stands still all the while."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    stalls = []
    for _ in range(ROUNDS):
        started = time.monotonic()
        save_file(trainer.model.state_dict(), directory / "adapter_model.safetensors")
        torch.save(trainer.optimizer.state_dict(), directory / "optimizer.pt")
        stalls.append(time.monotonic() - started)
    started = time.monotonic()
    # Its pickles are read as if they were trusted; ours never are.
    trainer.optimizer.load_state_dict(torch.load(directory / "optimizer.pt", weights_only=True))
    resumed = time.monotonic() - started
    shutil.rmtree(directory)
    return {"plainStall": statistics.median(stalls), "plainResumed": resumed}
