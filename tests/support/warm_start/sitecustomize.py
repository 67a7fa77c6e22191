"""Every Python of a pod begins here, by $PYTHONPATH: the trainer's own programs run in a fork of support.warm instead.

This process stays, as the supervisor's child: it passes signals on, and ends as the program does.
"""

import os
import sys

SOCKET = "WARM_START_SOCKET"
PROGRAMS = ("train", "pull", "prepare", "uploader")


def program() -> tuple[str, list[str]] | None:
    """Module and arguments of `python -m finetune_trainer.train` and its like; what is PID 1 stays what it is."""
    match sys.orig_argv[1:]:
        case ["-m", "finetune_trainer", "prepare"]:
            return "finetune_trainer", ["prepare"]
        case ["-m", module, *arguments] if module in [f"finetune_trainer.{name}" for name in PROGRAMS]:
            return module, arguments
    return None


class Fork:
    """A program in a process of its own below support.warm; it is killed when whoever has this is gone.

    `descriptors`: what of ours is open there, by the number that it has there.
    """

    def __init__(
        self, module: str, arguments: list[str], env: dict[str, str], directory: str, descriptors: dict[int, int]
    ) -> None:
        import json
        import socket

        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(env[SOCKET])
        request = {
            "module": module,
            "arguments": arguments,
            "env": env,
            "directory": directory,
            "descriptors": list(descriptors),
        }
        socket.send_fds(self._server, [b"."], list(descriptors.values()))
        self._server.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._server.makefile("r")
        self.pid = int(self._answers.readline())
        self.exitcode: int | None = None
        """As multiprocessing's: the negative number of a signal; None while it runs."""

    def join(self, timeout: float | None = None) -> None:
        """Waits for its end, in seconds at most."""
        import select

        if self.exitcode is None and select.select([self._server], [], [], timeout)[0]:
            self.exitcode = os.waitstatus_to_exitcode(int(self._answers.readline()))

    def is_alive(self) -> bool:
        self.join(0)
        return self.exitcode is None

    def kill(self) -> None:
        import signal

        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)


def inherited() -> list[int]:
    """Open descriptors that whoever started this program meant for it."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            # That of the listing.
            continue
    return found


def hand_over(module: str, arguments: list[str]) -> None:
    import signal

    fork = Fork(module, arguments, dict(os.environ), os.getcwd(), {number: number for number in inherited()})
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(fork.pid, number))
    fork.join()
    assert fork.exitcode is not None
    if fork.exitcode < 0:
        if fork.exitcode != -signal.SIGKILL:
            signal.signal(-fork.exitcode, signal.SIG_DFL)
        os.kill(os.getpid(), -fork.exitcode)
    os._exit(fork.exitcode)


if SOCKET in os.environ and (found := program()):
    hand_over(*found)
