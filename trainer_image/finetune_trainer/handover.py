"""Rank 0's side of the process that stores checkpoints: it is started once, given the snapshot, and heard."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from finetune_api.failures import FineTuneError, Reason
from finetune_trainer.snapshot import Snapshot
from finetune_trainer.underway import locked
from finetune_trainer.uploader import Answer, Request
from finetune_trainer.workdir import WorkDir

LASTING = (Reason.STORAGE_DENIED, Reason.INVALID_SPEC)
"""What the next checkpoint would fail by as well: training on would be for nothing."""


class Handover:
    def __init__(self, work: WorkDir, world_size: int) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        with theirs, locked(work) as lock:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "finetune_trainer.uploader", work.stage, str(world_size)],
                stdin=theirs.fileno(),
                pass_fds=[lock],
                # Whoever ends a rank ends its process group: what was handed over is stored all the same.
                process_group=0,
                # It computes nothing.
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        self._changed = threading.Condition()
        self._sent = self._taken = self._done = 0
        self._ended: str | None = None
        self._failures: dict[int, Answer] = {}
        self.on_stored: Callable[[int], None] = lambda step: None
        """Called with the step of each checkpoint that is complete, from another thread."""
        self.on_failed: Callable[[int, str], None] = lambda step, why: None
        threading.Thread(target=self._hear, name="uploader", daemon=True).start()

    def give(self, snapshot: Snapshot) -> None:
        """Its files, once, before anything is sent."""
        files = snapshot.descriptors
        socket.send_fds(self._socket, [json.dumps(list(files)).encode() + b"\n"], list(files.values()))

    def wait_free(self) -> None:
        """Until the snapshot may be written to."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken >= self._sent or self._ended)

    def send(self, request: Request) -> None:
        """What the snapshot holds."""
        with self._changed:
            self._sent += 1
        try:
            self._socket.sendall(request.model_dump_json().encode() + b"\n")
        except OSError:
            # `check` says why.
            return

    @property
    def busy(self) -> bool:
        with self._changed:
            return self._done < self._sent and self._ended is None

    def wait(self) -> None:
        """Until everything that was sent is stored, or is not."""
        with self._changed:
            self._changed.wait_for(lambda: self._done >= self._sent or self._ended)

    def failure(self, step: int) -> str:
        """Why the checkpoint of this step could not be stored; empty where it was."""
        with self._changed:
            return self._failures[step].message if step in self._failures else self._ended or ""

    def check(self) -> None:
        """Raises what makes training on useless: the uploader has ended, or what it failed by will last."""
        with self._changed:
            if self._ended:
                raise FineTuneError(Reason.RANK_FAILED, self._ended)
            for failed in self._failures.values():
                if failed.reason in LASTING:
                    raise FineTuneError(failed.reason, f"the checkpoint of step {failed.step}: {failed.message}")

    def close(self) -> None:
        """It ends once it has finished."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _hear(self) -> None:
        with self._socket.makefile("r", encoding="utf-8") as answers:
            try:
                for line in answers:
                    self._take(Answer.model_validate_json(line))
            except OSError:
                # How it ended says more.
                pass
            except ValueError as error:
                self._ended = f"the process that stores checkpoints cannot be understood: {error}"
        code = self._process.wait()
        with self._changed:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            self._ended = self._ended or f"the process that stores checkpoints {how}"
            self._changed.notify_all()

    def _take(self, answer: Answer) -> None:
        with self._changed:
            if answer.kind == "failed":
                self._failures[answer.step] = answer
            elif answer.kind == "stored":
                self._failures.pop(answer.step, None)
        if answer.kind == "stored":
            self.on_stored(answer.step)
        elif answer.kind == "failed":
            self.on_failed(answer.step, answer.message)
        with self._changed:
            if answer.kind == "taken":
                self._taken += 1
            elif answer.kind == "done":
                self._done += 1
            self._changed.notify_all()
