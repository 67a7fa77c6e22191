"""A process that has imported the trainer once and forks for each of a pod's programs: an import takes five seconds.

Only the start of the interpreter is saved: the programs, their variables, output and exit codes are the pod's own. What
is lost is that a rank counts towards its pod's memory limit.
"""

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from support.warm_start.sitecustomize import SOCKET

PR_SET_PDEATHSIG = 1
MAX_DESCRIPTORS = 16


def variables() -> dict[str, str]:
    """By which programs find it."""
    directory = _server()[1]
    return {SOCKET: f"{directory}/socket", "PYTHONPATH": directory}


@functools.cache
def _server() -> tuple[subprocess.Popen[bytes], str]:
    """It ends with its standard input, so with this process, and removes its directory."""
    # In a short path of no pod's: a socket's name has at most 107 bytes, and the process node rewrites mounted paths.
    directory = tempfile.mkdtemp(prefix="warm-")
    shutil.copy(Path(__file__).with_name("warm_start") / "sitecustomize.py", directory)
    quiet = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # What is imported here in place of the sources is imported there, too.
    path = [str(Path(__file__).parents[1]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "support.warm", directory],
        env=os.environ | quiet | {"PYTHONPATH": os.pathsep.join(path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Ctrl-C ends whoever holds its standard input, and so ends it too.
        process_group=0,
    )
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        raise RuntimeError("the warm trainer did not start")
    return process, directory


def serve(directory: str) -> None:
    """Forks for each request until standard input ends."""
    from support import preloaded  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/socket")
        listener.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                shutil.rmtree(directory)
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                keep(connection)
            connection.close()


def keep(connection: socket.socket) -> None:
    """Runs one program below this process, and tells its end; it is killed where who asked for it is gone."""
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, received, _, _ = socket.recv_fds(connection, 1, MAX_DESCRIPTORS)
    request = json.loads(connection.makefile().readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        become(request, received)
    for descriptor in received:
        os.close(descriptor)
    process = os.pidfd_open(pid)
    # Who asked may be gone at any time.
    with contextlib.suppress(OSError):
        connection.sendall(f"{pid}\n".encode())
    ready, _, _ = select.select([process, connection], [], [])
    if process not in ready:
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def become(request: dict[str, Any], received: list[int]) -> None:
    import torch

    os.setpgid(0, 0)
    die_with_parent()
    # Out of the way first: one may have the number that another is to get.
    aside = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 1000) for descriptor in received]
    for descriptor in received:
        os.close(descriptor)
    for number, descriptor in zip(request["descriptors"], aside, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["directory"])
    sys.argv = [request["module"], *request["arguments"]]
    # The variable was read when torch was imported.
    torch.set_num_threads(int(request["env"].get("OMP_NUM_THREADS", "1")))
    if where := request["env"].get("WARM_PAUSE"):
        pause(where, f"rank-{request['env']['RANK']}" if "RANK" in request["env"] else "pull")
    code: Any = 1
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def pause(where: str, own: str) -> None:
    """`<process> <phase> <folder>`: that process waits where it enters the phase, from `reached` to `go` in the folder.

    The phase `Step` is the end of the fifth step; of `Saving` it is the second time.
    """
    from finetune_trainer import heartbeat

    process, phase, folder = where.split()
    reached, go = Path(folder) / "reached", Path(folder) / "go"
    if process != own:
        return

    def wait() -> None:
        if not reached.exists():
            reached.touch()
            while not go.exists():
                time.sleep(0.005)

    times = 0
    enter, step = heartbeat.enter, heartbeat.step

    def enter_and_wait(entered: Any) -> None:
        nonlocal times
        enter(entered)
        times += entered == phase
        if times == 1 + (phase == "Saving"):
            wait()

    def step_and_wait(number: int) -> None:
        step(number)
        if phase == "Step" and number == 5:
            wait()

    heartbeat.enter, heartbeat.step = enter_and_wait, step_and_wait


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    serve(sys.argv[1])
