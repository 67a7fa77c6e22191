"""The container's last word: one TerminationMessage where the kubelet looks for it, and the exit code that agrees."""

import os
from collections.abc import Callable
from pathlib import Path

from finetune_api.failures import EXIT_CODES, FineTuneError, TerminationMessage
from finetune_api.run import RunConfig
from finetune_trainer import log
from finetune_trainer.outcome import failure_of
from finetune_trainer.runconfig import read_config
from finetune_trainer.traffic import of_pod


def write_termination(message: TerminationMessage) -> None:
    """Writes to $FINETUNE_TERMINATION_LOG. In a pod that is a mounted file, over which nothing can be renamed: one
    write of at most 4,096 bytes is what makes it whole."""
    path = Path(os.environ["FINETUNE_TERMINATION_LOG"])
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.write(descriptor, message.encode())
    finally:
        os.close(descriptor)


def _moved() -> dict[str, int]:
    """What all processes of this pod have moved. A disk that fails must not cost the last word."""
    try:
        read, written = of_pod()
    except OSError as error:
        log.event("bytes moved are not known", level="warning", message=str(error))
        return {}
    return {"read_bytes": read, "written_bytes": written}


def run(program: Callable[[RunConfig], TerminationMessage]) -> int:
    """Runs a program that is a container's PID 1: writes its termination message and returns its exit code."""
    try:
        message = program(read_config())
    except Exception as error:
        message = failure_of(error)
        if not isinstance(error, FineTuneError):
            log.stack(error)
    message = message.model_copy(update={"node": os.environ.get("FINETUNE_NODE_NAME"), **_moved()})
    write_termination(message)
    if message.reason is None:
        log.event("done")
        return 0
    log.event("failed", level="error", reason=message.reason, message=message.message, rank=message.rank)
    return EXIT_CODES.get(message.reason, 1)
