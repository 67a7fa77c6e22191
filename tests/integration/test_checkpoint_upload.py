"""Checkpoints with the process that stores them and a real S3: what is stored, what is not, and what follows."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from finetune_api.failures import FineTuneError, Reason
from finetune_trainer.checkpoint import Checkpoints
from finetune_trainer.distributed import Ranks
from finetune_trainer.state import SavedState, parameters_of
from finetune_trainer.storage import Store
from finetune_trainer.underway import at_work
from finetune_trainer.workdir import WorkDir
from support.runs import make_run_config, pod_environment
from support.s3 import S3, running_s3

SPEC = "0" * 64


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD
    yield Ranks(0, 0, 1, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()


class Run:
    """A model that learns, without a Trainer around it, and its checkpoints."""

    def __init__(self, directory: Path, s3: S3, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
        self.s3, self.ranks = s3, ranks
        directory.mkdir(exist_ok=True)
        config = make_run_config(bucket="bucket", endpoint=s3.endpoint)
        scratch = f"s3://{bucket}/{directory.parent.name}/.scratch/{config.job_uid}/"
        self.config = config.model_copy(update={"scratch_uri": scratch})
        for name, value in (pod_environment(directory, self.config) | s3.environment).items():
            monkeypatch.setenv(name, value)
        self.work = WorkDir.from_env()
        model = torch.nn.Linear(40, 30)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        state = SimpleNamespace(global_step=0)
        self.trainer: Any = SimpleNamespace(model=model, optimizer=optimizer, is_deepspeed_enabled=False, state=state)
        self.step = 0
        self.told: list[str] = []
        self.uploaded: list[int] = []
        self.kept: dict[int, dict[str, torch.Tensor]] = {}
        self.checkpoints = self.take_up()
        self.checkpoints.prepare(self.trainer)

    def take_up(self) -> Checkpoints:
        checkpoints = Checkpoints(
            Store(self.config.storage, attempts=2, timeout=5.0), self.config.scratch_uri, self.work, SPEC, self.ranks, 2
        )
        checkpoints.on_trouble = self.told.append
        checkpoints.on_uploaded = lambda uri, step: self.uploaded.append(step)
        return checkpoints

    def learn(self) -> None:
        self.trainer.optimizer.zero_grad()
        self.trainer.model(torch.randn(8, 40)).square().mean().backward()
        self.trainer.optimizer.step()
        self.step += 1

    def save(self) -> None:
        self.learn()
        self.kept[self.step] = {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}
        self.checkpoints.save(self.trainer, self.state)

    def state(self, count: int) -> SavedState:
        return SavedState(step=self.step, optimizer_step=count, tokens=1, seconds=1.0, before={}, history=[])

    def path(self, step: int, name: str) -> str:
        return f"{self.checkpoints.uri(step)}{name}"

    @property
    def process(self) -> int:
        handover = self.checkpoints._handover
        assert handover
        return handover._process.pid


def eventually(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.02)


@pytest.fixture
def run(tmp_path: Path, s3: S3, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    run = Run(tmp_path / "run", s3, ranks, monkeypatch, "bucket")
    yield run
    run.checkpoints.close()
    shutil.rmtree(run.work.root)


def test_what_is_saved_is_what_is_resumed_and_training_goes_on_meanwhile(run: Run) -> None:
    for _ in range(3):
        run.save()
        # The snapshot is a copy: what is learned after it changes nothing.
        run.learn()
    run.checkpoints.wait()
    assert run.uploaded == [1, 3, 5]
    assert run.told == ["", "", ""]
    resumed = run.take_up().newest()
    assert resumed
    assert (resumed.saved.step, resumed.saved.optimizer_step) == (5, 5)
    found = parameters_of(resumed.directory)
    assert all(torch.equal(found[name], value) for name, value in run.kept[5].items())
    # `keep` of them are left.
    keys = run.s3.keys("bucket", run.config.scratch_uri.removeprefix("s3://bucket/"))
    assert {key.split("/")[-2] for key in keys} == {"step-00000003", "step-00000005"}


def test_every_flipped_byte_is_found_and_the_one_before_is_taken(run: Run) -> None:
    run.save()
    run.save()
    run.checkpoints.wait()
    names = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
    for name in names:
        uri = run.path(2, name)
        whole = run.s3.get(uri)
        for place in {0, 9, len(whole) // 3, len(whole) // 2, len(whole) - 3}:
            torn = bytearray(whole)
            torn[place] ^= 0x04
            run.s3.put(uri, bytes(torn))
            run.told.clear()
            resumed = run.take_up().newest()
            assert resumed
            if resumed.saved.step == 2:
                # What a manifest says besides (when it was made, by how many) is no part of the state.
                assert name == "manifest.json"
                found = parameters_of(resumed.directory)
                assert all(torch.equal(found[key], value) for key, value in run.kept[2].items())
            else:
                assert resumed.saved.step == 1
                assert "the checkpoint of step 2 was skipped: " in run.told[0], (name, place)
        for broken in (whole[:-1], b""):
            run.s3.put(uri, broken)
            resumed = run.take_up().newest()
            assert resumed
            assert resumed.saved.step == 1, name
        run.s3.put(uri, whole)
    assert (again := run.take_up().newest())
    assert again.saved.step == 2


def test_weights_that_are_no_numbers_are_not_stored(run: Run) -> None:
    run.save()
    with torch.no_grad():
        run.trainer.model.weight[3, 5] = float("nan")
    with pytest.raises(FineTuneError, match="the trained weights are not numbers") as failure:
        run.checkpoints.save(run.trainer, run.state)
    assert failure.value.reason == Reason.DIVERGED
    run.checkpoints.wait()
    assert run.uploaded == [1]


def test_what_was_given_is_stored_though_rank_0_is_gone(run: Run) -> None:
    run.save()
    run.checkpoints.close()
    eventually(lambda: not at_work(run.work))
    assert (resumed := run.take_up().newest())
    assert resumed.saved.step == 1


def test_an_uploader_that_dies_becomes_the_reason(run: Run) -> None:
    run.save()
    run.checkpoints.wait()
    run.checkpoints.check()
    os.kill(run.process, signal.SIGKILL)
    run.save()
    run.checkpoints.wait()
    eventually(lambda: run.checkpoints.trouble(2))
    with pytest.raises(FineTuneError, match="the process that stores checkpoints was killed by signal 9") as failure:
        run.checkpoints.check()
    assert failure.value.reason == Reason.RANK_FAILED


def test_what_is_not_allowed_becomes_the_reason(
    tmp_path: Path, s3: S3, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "denied", s3, ranks, monkeypatch, "forbidden")
    run.save()
    run.checkpoints.wait()
    with pytest.raises(FineTuneError, match=r"the checkpoint of step 1: cannot .* s3://forbidden/") as failure:
        run.checkpoints.check()
    assert failure.value.reason == Reason.STORAGE_DENIED
    run.checkpoints.close()


def test_a_full_disk_costs_a_checkpoint_and_is_told(run: Run) -> None:
    """A folder that cannot be made stands for one that cannot be written."""
    run.work.checkpoints.parent.mkdir(exist_ok=True)
    run.work.checkpoints.write_text("in the way")
    run.save()
    run.checkpoints.wait()
    run.checkpoints.check()
    assert run.told[0].startswith("the checkpoint of step 1 could not be stored: ")
    run.work.checkpoints.unlink()
    run.save()
    run.checkpoints.wait()
    assert run.told[-1] == ""
    assert (resumed := run.take_up().newest())
    assert resumed.saved.step == 2
