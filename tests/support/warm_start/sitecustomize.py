"""Every Python of a pod begins here, by $PYTHONPATH: the trainer's own programs run in a fork of support.warm instead.

This process stays, as the supervisor's child: it passes signals on, and ends as the program does.
"""

import os
import sys

SOCKET = "WARM_START_SOCKET"
PROGRAMS = ("finetune_trainer.train", "finetune_trainer.pull", "finetune_trainer.prepare")


def program() -> str | None:
    """`python -m finetune_trainer.train` and its like; what is PID 1 stays what it is."""
    words = sys.orig_argv[1:]
    if words == ["-m", "finetune_trainer", "prepare"]:
        return "finetune_trainer"
    return words[1] if len(words) == 2 and words[0] == "-m" and words[1] in PROGRAMS else None


def hand_over(module: str, path: str) -> None:
    import json
    import signal
    import socket

    request = {"module": module, "arguments": sys.orig_argv[3:], "env": dict(os.environ), "directory": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [b"."], [1, 2])
        server.sendall(json.dumps(request).encode() + b"\n")
        answers = server.makefile("r")
        pid = int(answers.readline())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        status = int(answers.readline())
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL) if os.WTERMSIG(status) != signal.SIGKILL else None
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


if SOCKET in os.environ and (found := program()):
    hand_over(found, os.environ[SOCKET])
