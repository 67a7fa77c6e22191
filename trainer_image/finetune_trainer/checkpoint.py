"""Checkpoints in the job's scratch prefix: `checkpoints/[<stage>/]step-00000200/…`, the manifest last.

Saving stops training for as long as it takes to copy the trained state to a local file; the upload goes on beside it.
Resuming takes the newest one whose manifest and files verify and whose spec is this job's; what is torn is named and
skipped.
"""

import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from finetune_api.failures import FineTuneError, Reason
from finetune_api.manifest import MANIFEST_KEY
from finetune_trainer import log, state
from finetune_trainer.distributed import Ranks
from finetune_trainer.publish import fetch_verified, now, publish, read_manifest
from finetune_trainer.storage import Store, join
from finetune_trainer.workdir import WorkDir

_STEP = re.compile(r"/checkpoints/(?:[^/]+/)?step-(\d{8})/([^/]+)$")
_PASSING = (Reason.STORAGE_UNAVAILABLE, Reason.STORAGE_DENIED)


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def complete_steps(uris: Iterable[str]) -> list[int]:
    """The steps whose manifest is there, newest first; without one there is no checkpoint, whatever else is there."""
    found = (_STEP.search(uri) for uri in uris)
    return sorted({int(m[1]) for m in found if m and m[2] == MANIFEST_KEY}, reverse=True)


def superfluous(complete: Iterable[int], saved: int, keep: int, held: Collection[int] = ()) -> list[int]:
    """What may go once `saved` is complete: all but the `keep` newest up to it, never `saved` itself nor those held."""
    older = sorted((step for step in complete if step < saved), reverse=True)
    return [step for step in older[max(0, keep - 1) :] if step not in held]


class Resumed(NamedTuple):
    saved: state.SavedState
    directory: Path
    """On this pod's disk."""


class Checkpoints:
    def __init__(
        self, store: Store, scratch_uri: str, work: WorkDir, spec_sha256: str, ranks: Ranks, keep: int
    ) -> None:
        self._store, self._scratch, self._work = store, scratch_uri, work
        self._prefix = join(scratch_uri, f"checkpoints/{work.stage}/" if work.stage else "checkpoints/")
        self._spec_sha256, self._ranks, self._keep = spec_sha256, ranks, keep
        self._upload: threading.Thread | None = None
        self.on_uploaded: Callable[[str, int], None] = lambda uri, step: None
        """Called with the URI and step of each checkpoint that is complete, from another thread."""

        self.leans_on: Callable[[state.SavedState], int | None] = lambda saved: None
        """The step of another checkpoint without which this one is worth nothing."""

    def uri(self, step: int) -> str:
        return f"{self._prefix}{name_of(step)}/"

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
        return complete_steps(item.uri for item in self._store.list(self._prefix))

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

    def save(self, trainer: Any, saved: Callable[[int], state.SavedState], held: Collection[int] = ()) -> float:
        """Collective. `saved` makes the JSON part from Adam's count; `held`: steps that are kept however old they are.

        Returns the seconds that training stood still.
        """
        started = time.monotonic()
        parameters, moments, count = state.capture(trainer)
        if any(not bool(value.isfinite().all()) for value in parameters.values()):
            raise FineTuneError(
                Reason.DIVERGED, f"the trained weights are not numbers at step {trainer.state.global_step}"
            )
        if self._ranks.is_main:
            self.wait()
            whole = saved(count)
            directory = self._work.checkpoints / name_of(whole.step)
            shutil.rmtree(directory, ignore_errors=True)
            state.write(directory, parameters, moments, whole)
            self._upload = threading.Thread(
                target=self._send, args=(whole.step, directory, held), name="checkpoint", daemon=True
            )
            self._upload.start()
        return time.monotonic() - started

    @property
    def uploading(self) -> bool:
        return self._upload is not None and self._upload.is_alive()

    def wait(self) -> None:
        """Until the last upload has ended, well or not."""
        if self._upload is not None:
            self._upload.join()

    def remove(self) -> None:
        """All of them: there is something better to start from."""
        steps = complete_steps(item.uri for item in self._store.list(self._prefix))
        self._remove(steps)
        self._store.delete_prefix(self._prefix, self._scratch)

    def _remove(self, steps: Iterable[int]) -> None:
        for step in steps:
            # The manifest goes first: half a checkpoint is none.
            self._store.delete(self.uri(step) + MANIFEST_KEY)
            self._store.delete_prefix(self.uri(step), self._scratch)

    def _send(self, step: int, directory: Path, held: Collection[int]) -> None:
        """Failing costs a checkpoint, not the training: it is logged, and the next one tries again."""
        started = time.monotonic()
        try:
            # An earlier attempt may have left this step half-written, or written and since found torn.
            self._store.delete_prefix(self.uri(step), self._scratch)
            done = publish(
                self._store,
                directory,
                self.uri(step),
                kind="Checkpoint",
                step=step,
                created_time=now(),
                world_size=self._ranks.world_size,
                spec_sha256=self._spec_sha256,
            )
            seconds = round(time.monotonic() - started, 2)
            log.event("checkpoint saved", uri=self.uri(step), step=step, bytes=done.size, seconds=seconds)
            self.on_uploaded(self.uri(step), step)
            self._prune(step, held)
        except FineTuneError as error:
            log.event("checkpoint failed", level="error", step=step, why=str(error))
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _prune(self, saved: int, held: Collection[int]) -> None:
        self._remove(superfluous(self._complete(), saved, self._keep, held))
