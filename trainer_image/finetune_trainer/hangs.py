"""Which processes of a pod no longer get on, which of them is to blame, and what all of them were doing."""

import contextlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from finetune_trainer import heartbeat, log
from finetune_trainer.heartbeat import SECONDS, Beat

DUMP_SECONDS = 3.0
SILENT_SECONDS = 5 * SECONDS
"""After which a process that has not written its file does not run."""
_WAITING = re.compile(
    r"torch/distributed/|torch/autograd/graph\.py.* in _engine_run_backward|deepspeed/comm/"
    r"|in (wait_free|wait|barrier|all_reduce|broadcast)$"
)


@dataclass(frozen=True)
class Deadlines:
    """Seconds without getting on, by phase. Of a step: so many times the median of those before."""

    pulling: float = 900.0
    loading: float = 1800.0
    first_step: float = 1800.0
    step_factor: float = 20.0
    step_least: float = 600.0
    evaluating: float = 1800.0
    saving: float = 1800.0
    publishing: float = 3600.0

    def of(self, beat: Beat) -> float:
        match beat.phase:
            case "Pulling":
                return self.pulling
            case "Training" if beat.pace is None:
                return self.first_step
            case "Training":
                assert beat.pace is not None
                return max(self.step_least, self.step_factor * beat.pace)
            case "Evaluating":
                return self.evaluating
            case "Saving":
                return self.saving
            case "Publishing":
                return self.publishing
            case _:
                return self.loading


class Hung(NamedTuple):
    name: str
    """Of the process that is to blame."""
    message: str
    step: int | None
    """The last that it finished."""
    waits: bool
    """It only waits for others, which may be of another pod."""


class Watch:
    """`files`: the heartbeats of processes by name. Looks at most once a second."""

    def __init__(self, files: Mapping[str, Path], deadlines: Deadlines) -> None:
        self._files, self._deadlines = files, deadlines
        self._looked = time.monotonic()
        self._since = Beat(pid=0, progress=self._looked, alive=self._looked)
        for path in files.values():
            # What a process of an earlier stage, or of a container before this one, has left.
            path.unlink(missing_ok=True)
            heartbeat.stack_of(path).unlink(missing_ok=True)

    def late(self, names: list[str]) -> bool:
        """Whether one of these, which have not ended, is past its deadline."""
        now = time.monotonic()
        if now - self._looked < SECONDS:
            return False
        # Who was stopped together with us (a laptop that slept) gets as long again.
        if now - self._looked > SILENT_SECONDS:
            self._since = self._since.model_copy(update={"progress": now})
        self._looked = now
        return any(self._waited(self._beat(name), now) > self._deadlines.of(self._beat(name)) for name in names)

    def explain(self, names: list[str], node: str) -> Hung:
        """Asks all of these for their stacks, writes them to the log, and says who is to blame."""
        stacks, now = self._dump(names), time.monotonic()
        beats = {name: self._beat(name) for name in names}
        silent = {name: now - beat.alive > SILENT_SECONDS or not stacks[name] for name, beat in beats.items()}
        waits = {name: not silent[name] and waiting(stacks[name]) for name in names}
        # Who does not answer, else who does not wait for others, else who is behind.
        worst = min(names, key=lambda name: (not silent[name], waits[name], beats[name].progress))
        beat, state = beats[worst], state_of(beats[worst].pid)
        at = f" after step {beat.step}" if beat.step is not None else ""
        how = f"; it does not answer (process state {state})" if silent[worst] else ""
        how = "; it waits for other ranks" if waits[worst] else how
        text = (
            f"{worst} on node {node or 'unknown'} has not got on for {self._waited(beat, now):.0f} s in phase "
            f"{beat.phase}{at}; allowed are {self._deadlines.of(beat):.0f} s{how}"
        )
        return Hung(worst, text, beat.step, waits[worst])

    def _beat(self, name: str) -> Beat:
        # Until it has written one it is being loaded.
        return heartbeat.read(self._files[name]) or self._since

    def _waited(self, beat: Beat, now: float) -> float:
        return now - max(beat.progress, self._since.progress)

    def _dump(self, names: list[str]) -> dict[str, str]:
        for name in names:
            if pid := self._beat(name).pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, heartbeat.STACK_SIGNAL)
        deadline, found = time.monotonic() + DUMP_SECONDS, dict.fromkeys(names, "")
        while time.monotonic() < deadline and not all(found.values()):
            time.sleep(0.1)
            found = {name: _text(heartbeat.stack_of(self._files[name])) for name in names}
        for name, text in found.items():
            log.event("stacks", level="error", of=name, stacks=text or "it does not answer")
        return found


def waiting(stacks: str) -> bool:
    """Whether the main thread, which faulthandler writes last, is in a call that ends when other ranks come."""
    main = re.split(r"\n\s*\n", stacks.strip())[-1].splitlines()
    frames = [line for line in main if line.lstrip().startswith("File ")]
    return any(_WAITING.search(line) for line in frames[:4])


def state_of(pid: int) -> str:
    """Of a process, as ps says it: T is stopped, D waits for a device; "gone" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
