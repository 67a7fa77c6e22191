"""Stores checkpoints beside the training, in a process of its own: `python -m finetune_trainer.uploader`.

Its standard input is a socket to rank 0 (see `handover`): first the names and descriptors of the snapshot's files, then
one JSON line for each checkpoint; it answers each with `taken`, once the snapshot may be written to again, `stored` or
`failed`, and `done`. When rank 0 is gone it finishes what it was given, and ends.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from finetune_api.failures import FineTuneError, Reason
from finetune_api.manifest import MANIFEST_KEY
from finetune_trainer import log
from finetune_trainer.fence import Fence
from finetune_trainer.publish import now, publish
from finetune_trainer.runconfig import read_config
from finetune_trainer.steps import complete_steps, name_of, superfluous
from finetune_trainer.storage import Store, join
from finetune_trainer.workdir import WorkDir

MAX_FILES = 250
"""Descriptors that one message may carry."""


class Request(BaseModel):
    """A checkpoint to be stored."""

    model_config = ConfigDict(extra="forbid")
    step: int
    spec_sha256: str
    keep: int
    held: list[int]
    """Steps that are kept however old they are."""


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["taken", "stored", "failed", "done"]
    step: int
    reason: Reason | None = None
    message: str = ""


class Place(NamedTuple):
    """Where a stage's checkpoints lie."""

    scratch: str
    prefix: str

    @classmethod
    def of(cls, scratch_uri: str, stage: str) -> "Place":
        return cls(scratch_uri, join(scratch_uri, f"checkpoints/{stage}/" if stage else "checkpoints/"))

    def uri(self, step: int) -> str:
        return f"{self.prefix}{name_of(step)}/"


def complete(store: Store, place: Place) -> list[int]:
    return complete_steps(item.uri for item in store.list(place.prefix))


def remove(store: Store, place: Place, steps: Iterable[int]) -> None:
    for step in steps:
        # The manifest goes first: half a checkpoint is none.
        store.delete(place.uri(step) + MANIFEST_KEY)
        store.delete_prefix(place.uri(step), place.scratch)


class Uploader:
    def __init__(
        self,
        store: Store,
        place: Place,
        work: WorkDir,
        files: dict[str, int],
        world_size: int,
        fence: Fence | None = None,
    ) -> None:
        self._fence = fence
        self._store, self._place, self._work = store, place, work
        self._files, self._world_size = files, world_size

    def handle(self, request: Request, answer: Callable[[Answer], None]) -> None:
        """Failing costs a checkpoint; what follows for the training, rank 0 decides."""
        directory = self._work.checkpoints / name_of(request.step)
        try:
            try:
                self._take(directory)
            finally:
                answer(Answer(kind="taken", step=request.step))
            self._send(request, directory)
            answer(Answer(kind="stored", step=request.step))
            self._prune(request)
        except (FineTuneError, OSError) as error:
            reason = error.reason if isinstance(error, FineTuneError) else Reason.STORAGE_UNAVAILABLE
            log.event("checkpoint failed", level="error", step=request.step, why=str(error))
            answer(Answer(kind="failed", step=request.step, reason=reason, message=str(error)))
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            answer(Answer(kind="done", step=request.step))

    def _prune(self, request: Request) -> None:
        try:
            found = complete(self._store, self._place)
            remove(self._store, self._place, superfluous(found, request.step, request.keep, request.held))
        except FineTuneError as error:
            log.event("old checkpoints are still there", level="warning", why=str(error))

    def _take(self, directory: Path) -> None:
        """From the snapshot to files. Raises OSError where the disk is full."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for name, descriptor in self._files.items():
            copy(descriptor, directory / name)

    def _send(self, request: Request, directory: Path) -> None:
        started, uri = time.monotonic(), self._place.uri(request.step)
        if self._fence:
            # A pod that comes back late must not delete what a later attempt has stored.
            self._fence.check()
        # An earlier attempt may have left this step half-written, or written and since found torn.
        self._store.delete_prefix(uri, self._place.scratch)
        done = publish(
            self._store,
            directory,
            uri,
            kind="Checkpoint",
            step=request.step,
            created_time=now(),
            world_size=self._world_size,
            spec_sha256=request.spec_sha256,
        )
        seconds = round(time.monotonic() - started, 2)
        log.event("checkpoint saved", uri=uri, step=request.step, bytes=done.size, seconds=seconds)


def copy(descriptor: int, path: Path) -> None:
    """All of a file that is in memory, whatever its offset is."""
    done, size = 0, os.fstat(descriptor).st_size
    with path.open("wb") as file:
        while done < size:
            done += os.sendfile(file.fileno(), descriptor, done, size - done)


def receive_files(server: socket.socket) -> tuple[dict[str, int], bytes]:
    """The files by name, and what of the first request came with them."""
    data, descriptors, _, _ = socket.recv_fds(server, 2**20, MAX_FILES)
    while b"\n" not in data:
        if not (more := server.recv(2**20)):
            return {}, b""
        data += more
    line, _, rest = data.partition(b"\n")
    names: Sequence[str] = json.loads(line)
    return dict(zip(names, descriptors, strict=True)), rest


def requests(server: socket.socket, unfinished: bytes) -> Iterator[Request]:
    while True:
        *lines, unfinished = unfinished.split(b"\n")
        for line in lines:
            yield Request.model_validate_json(line)
        if not (more := server.recv(65536)):
            return
        unfinished += more


def main(stage: str, world_size: int) -> int:
    # The pod's end is rank 0's affair: what it asks for is finished while there is time.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    work = WorkDir.from_env().of_stage(stage)
    with socket.socket(fileno=os.dup(0)) as server:
        config = read_config()
        with Store(config.storage) as store:
            files, rest = receive_files(server)
            uploader = Uploader(
                store, Place.of(config.scratch_uri, stage), work, files, world_size, Fence.of(store, config)
            )

            def answer(what: Answer) -> None:
                # Rank 0 may be gone.
                with contextlib.suppress(OSError):
                    server.sendall(what.model_dump_json().encode() + b"\n")

            for request in requests(server, rest):
                uploader.handle(request, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
