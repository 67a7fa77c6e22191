"""PID 1 of a pod of the gang: pull once, start one process per GPU, pass on signals, say how it ended.

    run.json -> pull -> for each stage that is not finished: ranks (`python -m finetune_trainer.train`, static
    rendezvous at pod 0) -> termination message

Each stage has processes of its own: what one leaves behind in torch, DeepSpeed and transformers is none of the next.

The exit code is finetune_api.failures.EXIT_CODES of the first failed rank's reason. A rank tells its own in
`WorkDir.outcome(rank)`; one that was killed tells nothing, and the kernel's counters speak for it.
"""

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from finetune_api.failures import EXIT_CODES, FineTuneError, Reason, TerminationMessage
from finetune_api.run import RunConfig
from finetune_trainer import log
from finetune_trainer.hangs import Deadlines, Watch
from finetune_trainer.outcome import read_outcome
from finetune_trainer.supervise import Child, Supervisor
from finetune_trainer.termination import run
from finetune_trainer.underway import at_work
from finetune_trainer.verdict import RankEnd, judge
from finetune_trainer.workdir import WorkDir

PULLING = "the download of the base model and the data"
PULL = (sys.executable, "-m", "finetune_trainer.pull")
TRAIN = (sys.executable, "-m", "finetune_trainer.train")
DEADLINES = Deadlines()
PEER_GRACE = 10.0
"""Seconds that ranks get to fail by themselves, and to say why, after the first has failed."""
PATIENCE = 10.0
"""Seconds that a pod whose ranks only lost contact waits for the pod of the rank that failed to end first."""
UPLOAD_GRACE = 8.0
"""Seconds that a checkpoint gets to be stored after the ranks have failed."""
RESOLVE_SECONDS = 300.0
"""How long pod 0's name may take to appear in DNS: its pod may still be pulling its image."""


class Layout(NamedTuple):
    """This pod's place in the gang."""

    worker: int
    workers: int
    processes: int
    master_address: str
    master_port: str
    cores: int

    @property
    def first_rank(self) -> int:
        return self.worker * self.processes

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.processes)

    def environment(self, local_rank: int) -> dict[str, str]:
        """What torch and accelerate read to find each other; OMP_NUM_THREADS is this rank's share of the cores."""
        return {
            "RANK": str(self.first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.workers * self.processes),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "GROUP_RANK": str(self.worker),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": self.master_port,
            "OMP_NUM_THREADS": str(max(1, self.cores // self.processes)),
            "PYTHONUNBUFFERED": "1",
        }


def cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole cores that this container may use: its quota where there is one, else those that it may run on."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def oom_kills(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processes of this container the kernel has killed for memory; 0 where it does not say."""
    for name in ("memory.events", "memory/memory.oom_control"):
        try:
            fields = dict(line.split() for line in (cgroup / name).read_text().splitlines())
        except (OSError, ValueError):
            continue
        return int(fields.get("oom_kill", 0))
    return 0


def resolve(supervisor: Supervisor, name: str, limit: float = RESOLVE_SECONDS) -> str:
    """The address of pod 0, waited for. Raises RankFailed, or Preempted where a signal came."""
    deadline = time.monotonic() + limit
    while True:
        try:
            return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
        except socket.gaierror as error:
            if time.monotonic() >= deadline:
                raise FineTuneError(
                    Reason.RANK_FAILED, f"pod 0's name {name} cannot be resolved after {limit:.0f} s: {error.strerror}"
                ) from error
        supervisor.step(1.0)
        if supervisor.stopped_at is not None:
            raise FineTuneError(Reason.PREEMPTED, "the pod was asked to end before training began")


def launch(
    config: RunConfig,
    *,
    pull: Sequence[str] = PULL,
    train: Sequence[str] = TRAIN,
    grace: float = PEER_GRACE,
    cgroup: Path = Path("/sys/fs/cgroup"),
    deadlines: Deadlines = DEADLINES,
) -> TerminationMessage:
    """Runs this pod's part of the gang and returns how it ended. `grace` is in seconds."""
    work = WorkDir.from_env()
    # A container that is started again in the same pod finds what the one before it said.
    _forget_outcomes(work)
    # Some of the grace period is ours: to kill what did not end, and to say so.
    stop_grace = config.grace_seconds - min(10.0, 0.2 * config.grace_seconds)
    killed_before = oom_kills(cgroup)
    with Supervisor() as supervisor:
        watched = Watched(supervisor, deadlines, {PULLING: work.heartbeat("pull")})
        puller = supervisor.start("", pull, os.environ)
        if hung := watched.run(grace, min(5.0, stop_grace), {PULLING: puller}):
            return hung
        if supervisor.stopped_at is not None:
            raise FineTuneError(Reason.PREEMPTED, "the pod was asked to end before training began")
        if puller.code != 0:
            end = _end(work.outcomes / "pull.json", -1, puller)
            message = judge([end], None, oom_kills(cgroup) > killed_before)
            text = message.message.replace("rank -1", PULLING)
            return message.model_copy(update={"rank": None, "message": text})
        layout = _layout(config, supervisor, os.environ)
        stages = [stage.name for stage in config.spec.stages] or [""]
        for number in range(_finished(work), len(stages)):
            log.event(
                "ranks starting",
                first=layout.first_rank,
                count=layout.processes,
                master=layout.master_address,
                **({"stage": stages[number]} if stages[number] else {}),
            )
            _forget_outcomes(work)
            watched = Watched(supervisor, deadlines, {f"rank {r}": work.heartbeat(f"rank-{r}") for r in layout.ranks})
            ranks = {f"rank {r}": _start(supervisor, layout, number, r, train) for r in layout.ranks}
            hung = watched.run(grace, stop_grace, ranks, (EXIT_CODES[Reason.PREEMPTED],))
            ends = [_end(work.outcome(r), r, child) for r, child in zip(layout.ranks, ranks.values(), strict=True)]
            message = hung or judge(ends, supervisor.stopped_at, oom_kills(cgroup) > killed_before)
            if message.reason is not None:
                break
        if message.reason is not None:
            _let_uploads_end(supervisor, work, stop_grace if supervisor.stopped_at else UPLOAD_GRACE)
        if message.victim:
            _let_the_cause_speak(supervisor)
        return message


class Watched:
    """A run of processes, given by name, that is ended where one of them hangs."""

    def __init__(self, supervisor: Supervisor, deadlines: Deadlines, heartbeats: Mapping[str, Path]) -> None:
        """Before they are started."""
        self._supervisor, self._watch = supervisor, Watch(heartbeats, deadlines)

    def run(
        self, grace: float, stop_grace: float, children: Mapping[str, Child], patient_codes: Sequence[int] = ()
    ) -> TerminationMessage | None:
        """What hung, if anything did; all have ended."""

        def alive() -> list[str]:
            return [name for name, child in children.items() if child.code is None]

        if not self._supervisor.run(grace, stop_grace, patient_codes, lambda: self._watch.late(alive())):
            return None
        hung = self._watch.explain(alive(), os.environ.get("FINETUNE_NODE_NAME", ""))
        self._supervisor.kill()
        self._supervisor.run(0.0, 0.0)
        rank = int(hung.name.removeprefix("rank ")) if hung.name.startswith("rank ") else None
        return TerminationMessage(
            reason=Reason.HUNG,
            message=hung.message[:2048],
            rank=rank,
            exit_code=EXIT_CODES[Reason.HUNG],
            step=hung.step,
            victim=hung.waits,
        )


def _let_uploads_end(supervisor: Supervisor, work: WorkDir, seconds: float) -> None:
    """A checkpoint that was on its way when its rank ended is whole: so much less is lost."""
    deadline = time.monotonic() + seconds - (time.time() - supervisor.stopped_at if supervisor.stopped_at else 0.0)
    while at_work(work) and (left := deadline - time.monotonic()) > 0:
        supervisor.step(min(0.1, left))


def _let_the_cause_speak(supervisor: Supervisor) -> None:
    """Stays until the pod is asked to end, or PATIENCE is over.

    The first pod that fails ends the Job, and the pods that are still there are deleted with what they had to say. A
    victim notices at once that its peer is gone, so it would often be first.
    """
    deadline = time.monotonic() + PATIENCE
    while supervisor.stopped_at is None and (left := deadline - time.monotonic()) > 0:
        supervisor.step(left)


def _layout(config: RunConfig, supervisor: Supervisor, env: Mapping[str, str]) -> Layout:
    worker = int(env.get("FINETUNE_WORKER_INDEX", "0"))
    # Pod 0 listens on its own address and need not wait for its name.
    address = env["FINETUNE_POD_IP"] if worker == 0 else resolve(supervisor, env["FINETUNE_MASTER_ADDR"])
    return Layout(
        worker=worker,
        workers=config.devices.workers,
        processes=config.devices.processes_per_worker,
        master_address=address,
        master_port=env["FINETUNE_MASTER_PORT"],
        cores=cores(),
    )


def _forget_outcomes(work: WorkDir) -> None:
    for stale in work.outcomes.glob("*.json"):
        stale.unlink()


def _finished(work: WorkDir) -> int:
    """How many stages the pull found finished."""
    try:
        return int(work.finished.read_text())
    except FileNotFoundError:
        return 0


def _start(supervisor: Supervisor, layout: Layout, stage: int, rank: int, command: Sequence[str]) -> Child:
    own = layout.environment(rank - layout.first_rank) | {"FINETUNE_STAGE": str(stage)}
    # A stage's ranks must not meet the store of the stage before.
    own["MASTER_PORT"] = str(int(layout.master_port) + stage)
    if threads := os.environ.get("OMP_NUM_THREADS"):
        own["OMP_NUM_THREADS"] = threads
    return supervisor.start(f"rank {rank}" if rank else "", command, os.environ | own)


def _end(path: Path, rank: int, child: Child) -> RankEnd:
    outcome = read_outcome(path)
    assert child.code is not None
    return RankEnd(
        rank=rank,
        code=child.code,
        time=outcome.time if outcome else child.ended,
        outcome=outcome.message if outcome else None,
        last_lines=tuple(child.tail),
        killed=child.killed,
    )


def main() -> int:
    return run(launch)
