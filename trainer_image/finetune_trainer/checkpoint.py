"""Checkpoints in the job's scratch prefix: `checkpoints/[<stage>/]step-00000200/…`, the manifest last.

Saving stops training for as long as it takes to copy the trained state to shared memory; another process makes files
of it, hashes them and uploads them (see `uploader`). Resuming takes the newest one whose manifest and files verify and
whose spec is this job's; what is torn is named and skipped.
"""

import collections
import itertools
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from finetune_api.failures import FineTuneError, Reason
from finetune_api.manifest import MANIFEST_KEY
from finetune_trainer import log, state, uploader
from finetune_trainer.distributed import Ranks
from finetune_trainer.handover import Handover
from finetune_trainer.publish import fetch_verified, read_manifest
from finetune_trainer.snapshot import Snapshot
from finetune_trainer.steps import name_of
from finetune_trainer.storage import Store
from finetune_trainer.uploader import Place, Request
from finetune_trainer.workdir import WorkDir

_PASSING = (Reason.STORAGE_UNAVAILABLE, Reason.STORAGE_DENIED)


class Resumed(NamedTuple):
    saved: state.SavedState
    directory: Path
    """On this pod's disk."""


class Checkpoints:
    def __init__(
        self, store: Store, scratch_uri: str, work: WorkDir, spec_sha256: str, ranks: Ranks, keep: int
    ) -> None:
        self._store, self._work, self._place = store, work, Place.of(scratch_uri, work.stage)
        self._spec_sha256, self._ranks, self._keep = spec_sha256, ranks, keep
        self._snapshot: Snapshot | None = None
        self._handover: Handover | None = None
        self.on_uploaded: Callable[[str, int], None] = lambda uri, step: None
        """Called with the URI and step of each checkpoint that is complete, from another thread."""
        self.on_trouble: Callable[[str], None] = lambda message: None
        """Called with what became of a checkpoint that cannot be used or stored; empty: one was stored again."""
        self.leans_on: Callable[[state.SavedState], int | None] = lambda saved: None
        """The step of another checkpoint without which this one is worth nothing."""

    def uri(self, step: int) -> str:
        return self._place.uri(step)

    # Resuming

    def newest(self) -> Resumed | None:
        """Collective: rank 0 looks for the newest good one, then every pod fetches the same."""
        step = self._ranks.from_main(self._choose() if self._ranks.is_main else None)
        return None if step is None else self._on_every_pod(step)

    def fetch(self, step: int) -> Resumed:
        """Collective: the checkpoint of this step. Raises StorageUnavailable where it was not stored."""
        if self._ranks.is_main:
            if not self.has(step):
                text = f"the checkpoint of step {step}, the best one, could not be stored; it is made again"
                raise FineTuneError(Reason.STORAGE_UNAVAILABLE, text)
            self.download(step)
        self._ranks.barrier()
        return self._on_every_pod(step)

    def has(self, step: int) -> bool:
        """Whether it is complete, once what is on its way has arrived."""
        self.wait()
        return step in self._complete()

    def _on_every_pod(self, step: int) -> Resumed:
        """Rank 0's pod has it."""
        if self._ranks.local_rank == 0 and not self._ranks.is_main:
            self.download(step)
        self._ranks.barrier()
        directory = self._work.checkpoints / name_of(step)
        return Resumed(state.read(directory), directory)

    def _complete(self) -> list[int]:
        return uploader.complete(self._store, self._place)

    def _choose(self) -> int | None:
        complete = self._complete()
        for step in complete:
            try:
                manifest = read_manifest(self._store, self.uri(step) + MANIFEST_KEY)
                if (manifest.kind, manifest.step, manifest.spec_sha256) != ("Checkpoint", step, self._spec_sha256):
                    raise FineTuneError(Reason.DATA_INVALID, "it is not a checkpoint of this job's spec")
                self.download(step)
                saved = state.read(self._work.checkpoints / name_of(step))
                if saved.step != step:
                    raise FineTuneError(Reason.DATA_INVALID, f"it holds step {saved.step}")
                if (other := self.leans_on(saved)) is not None and other not in complete:
                    raise FineTuneError(Reason.DATA_INVALID, f"the best one, of step {other}, is not there")
            except (FineTuneError, ValueError) as error:
                if isinstance(error, FineTuneError) and error.reason in _PASSING:
                    raise
                log.event("checkpoint skipped", level="warning", uri=self.uri(step), why=str(error))
                self.on_trouble(f"the checkpoint of step {step} was skipped: {error}")
                continue
            log.event("checkpoint found", uri=self.uri(step), step=step)
            return step
        return None

    def download(self, step: int) -> Path:
        """To this pod alone."""
        directory = self._work.checkpoints / name_of(step)
        shutil.rmtree(directory, ignore_errors=True)
        fetch_verified(self._store, self.uri(step) + MANIFEST_KEY, directory)
        return directory

    # Saving

    def prepare(self, trainer: Any) -> None:
        """Once the model is wrapped: makes room for what is saved, and starts the process that stores it."""
        if self._ranks.is_main:
            self._snapshot = Snapshot(state.shapes(trainer), [state.STATE])
            self._handover = Handover(self._work, self._ranks.world_size)
            self._handover.on_stored = self._stored
            self._handover.on_failed = lambda step, why: self.on_trouble(
                f"the checkpoint of step {step} could not be stored: {why}"
            )
            self._handover.give(self._snapshot)

    def save(self, trainer: Any, saved: Callable[[int], state.SavedState], held: Collection[int] = ()) -> float:
        """Collective. `saved` makes the JSON part from Adam's count; `held`: steps that are kept however old they are.

        Returns the seconds that training stood still.
        """
        started = time.monotonic()
        finite = self._capture(trainer)
        if not self._ranks.from_main(finite):
            raise FineTuneError(
                Reason.DIVERGED, f"the trained weights are not numbers at step {trainer.state.global_step}"
            )
        if self._snapshot and self._handover:
            whole = saved(state.adam_steps(trainer))
            self._snapshot.write(state.STATE, whole.model_dump_json())
            self._handover.send(
                Request(step=whole.step, spec_sha256=self._spec_sha256, keep=self._keep, held=sorted(held))
            )
        return time.monotonic() - started

    def _capture(self, trainer: Any) -> bool:
        """Into rank 0's snapshot; whether the trained parameters are numbers, which rank 0 alone knows."""
        if self._snapshot is None or self._handover is None:
            if trainer.is_deepspeed_enabled:
                # Each is gathered on all ranks; none is kept.
                collections.deque(itertools.chain(state.parameters(trainer), state.moments(trainer)), maxlen=0)
            return True
        self._handover.wait_free()
        total = torch.zeros((), dtype=torch.float64)
        for name, value in state.parameters(trainer):
            self._snapshot.put(name, value)
            # One sum is a number where all of its terms are, and takes no room.
            total = total.to(value.device) + value.sum(dtype=torch.float32)
        for name, value in state.moments(trainer):
            self._snapshot.put(name, value)
        self._snapshot.finish()
        return bool(total.isfinite())

    @property
    def uploading(self) -> bool:
        return self._handover is not None and self._handover.busy

    def check(self) -> None:
        """Raises where checkpoints can no longer be stored, and training on would be for nothing. On rank 0."""
        if self._handover:
            self._handover.check()

    def trouble(self, step: int) -> str:
        """Why the checkpoint of this step could not be stored; empty where it was. On rank 0, after `wait`."""
        return self._handover.failure(step) if self._handover else ""

    def wait(self) -> None:
        """Until what was saved has been stored, well or not."""
        if self._handover:
            self._handover.wait()

    def close(self) -> None:
        """Nothing more is saved."""
        if self._handover:
            self._handover.close()

    def remove(self) -> None:
        """All of them: there is something better to start from."""
        uploader.remove(self._store, self._place, self._complete())
        self._store.delete_prefix(self._place.prefix, self._place.scratch)

    def _stored(self, step: int) -> None:
        self.on_uploaded(self.uri(step), step)
        self.on_trouble("")
