"""How a command ends: exit codes that scripts can use, and the one exception that carries them."""

from enum import IntEnum


class Exit(IntEnum):
    COMPLETE = 0
    FAILED = 1
    """The job failed, or what was asked for could not be done."""
    USAGE = 2
    """The command line or the manifest is wrong."""
    UNREACHABLE = 3
    """No cluster (or no object store) answers."""
    TIMEOUT = 124
    INTERRUPTED = 130


class CliError(Exception):
    """One sentence for the person at the terminal, and the exit code."""

    def __init__(self, message: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.code = code
