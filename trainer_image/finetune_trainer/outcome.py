"""How a process of the gang tells the launcher how it ended: one TerminationMessage in a file of its own.

The file's time is the moment of the failure: a rank that failed first may well be the last to exit.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from finetune_api.failures import EXIT_CODES, FineTuneError, Reason, TerminationMessage
from finetune_api.printable import printable
from finetune_trainer import log

_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Outcome(NamedTuple):
    message: TerminationMessage
    time: float
    """Seconds since the epoch."""


def write_outcome(path: Path, message: TerminationMessage) -> None:
    """Writes the file whole or not at all; the first failure that a process reports is the one that stays."""
    earlier = read_outcome(path)
    if earlier is not None and earlier.message.reason is not None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(message.encode())
    partial.rename(path)


def read_outcome(path: Path) -> Outcome | None:
    """None where the process left nothing, or nothing that can be read."""
    try:
        message = TerminationMessage.decode(path.read_text())
        return Outcome(message, path.stat().st_mtime) if message else None
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def one_line(text: str) -> str:
    """The text as a part of a sentence, fit for a log and for JSON: without line ends, controls and surrogates."""
    return _UNFIT.sub("\ufffd", " ".join(text.splitlines()))[:2000]


def failure_of(error: BaseException) -> TerminationMessage:
    """The message for what ended a program; what is no FineTuneError is RankFailed, named with its place."""
    if isinstance(error, FineTuneError):
        return TerminationMessage(
            reason=error.reason, message=one_line(str(error)), exit_code=EXIT_CODES.get(error.reason, 1)
        )
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = one_line(f"{type(error).__name__}: {error}")[:1900] + place
    return TerminationMessage(reason=Reason.RANK_FAILED, message=text, exit_code=EXIT_CODES[Reason.RANK_FAILED])


def guarded(main: Callable[[], None], path: Path) -> int:
    """Runs `main` and returns its exit code; where it raises, the outcome is at `path` and the traceback on stderr."""
    try:
        main()
    except Exception as error:
        write_outcome(path, message := failure_of(error))
        if not isinstance(error, FineTuneError):
            log.stack(error)
        else:
            print(printable(f"{error.reason}: {error}"), file=sys.stderr, flush=True)
        return message.exit_code
    return 0
