"""A program in a child process with limits: what a library does with a tenant's files can end the child, and it alone.

Libraries in Rust and C++ abort where memory ends, and never come back from some inputs: no exception tells of it. So
the child notes what it is about to do (`during`), in memory that it shares with its parent, and the parent says what
killed it, in one sentence for the person who can act.
"""

import contextlib
import ctypes
import gc
import json
import mmap
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from finetune_api.failures import FineTuneError, Reason, TerminationMessage
from finetune_trainer import log
from finetune_trainer.outcome import failure_of, one_line

LANES = ("encode", "main")
"""Threads that may be at work at once. Where both are when the child dies, the first is the cause: it runs a library's
own code, the other one mostly bounded code of ours."""
MIB = 2**20
_NOTE, _WHAT, _ADVICE = 4096, 700, 150
"""Bytes of one lane's note, and characters of its texts."""
_SHARE, _STACKS = 0.9, 512 * MIB
"""Part of the pod's memory that the child may take; and the stacks of its threads, which are mapped but not used."""
_POLL = 0.25
_PR_SET_PDEATHSIG = 1
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Note(NamedTuple):
    """What a lane is doing."""

    reason: Reason
    what: str
    """The subject of a sentence that says what went wrong: `spec.baseModel.uri: s3://…: loading it`."""
    advice: str
    seconds: float
    """CPU time of the process that it may take, counted by the parent: asking for it costs more than a row does."""
    memory: int
    """Bytes that it may take more than there were."""
    mapped: int
    resident: int
    """Bytes of memory that the process had mapped as its own, and that were there, when it began."""


class _Board:
    """The notes of all lanes, in memory that parent and child share."""

    def __init__(self, limit: int) -> None:
        self._memory = mmap.mmap(-1, _NOTE * len(LANES))
        self.limit = limit
        """Bytes that the child may take."""
        self.hard = self.soft = 0
        """In the child: RLIMIT_DATA, and what of it holds now."""
        self.seen = (0, 0)
        """Its memory when last looked at."""

    def write(self, lane: str, note: Note | None) -> None:
        if note:
            note = note._replace(what=one_line(note.what)[:_WHAT], advice=note.advice[:_ADVICE])
        data = json.dumps(note, ensure_ascii=False).encode() if note else b""
        start = LANES.index(lane) * _NOTE
        # The first byte says that the rest is whole.
        self._memory[start] = 0
        self._memory[start + 1 : start + 3] = len(data).to_bytes(2, "little")
        self._memory[start + 3 : start + 3 + len(data)] = data
        self._memory[start] = 1

    def read(self) -> list[Note]:
        """The notes that stand there, the likeliest cause first."""
        found = []
        for lane in range(len(LANES)):
            start = lane * _NOTE
            length = int.from_bytes(self._memory[start + 1 : start + 3], "little")
            if self._memory[start] and length:
                try:
                    reason, *rest = json.loads(self._memory[start + 3 : start + 3 + length])
                except ValueError:
                    # It is being written just now: the next look finds it whole.
                    continue
                found.append(Note(Reason(reason), *rest))
        return found


_board: _Board | None = None
"""Of a confined process."""
_lane = threading.local()
_at: dict[str, Note | None] = {}
"""What the lanes of this process do."""


@contextlib.contextmanager
def lane(name: str) -> Iterator[None]:
    """What this thread does is noted apart from what others do."""
    _lane.name = name
    try:
        yield
    finally:
        _lane.name = "main"


@contextlib.contextmanager
def during(
    reason: Reason, what: str, *, seconds: float = 60.0, memory: int = 2048 * MIB, advice: str = ""
) -> Iterator[None]:
    """Something that a library does with a tenant's file: whatever goes wrong is the file's fault, and is told so.

    `what` names field, file and what is done: the subject of the sentence. `seconds`: CPU time; `memory`: bytes more
    than there are; both are held to in a confined process alone. Raises FineTuneError with `reason`.
    """
    own = str(getattr(_lane, "name", "main"))
    before = _at.get(own)
    if _board:
        told = f"{before.what}: {what}" if before and not what.startswith("spec.") else what
        _enter(own, Note(reason, told, advice, seconds, memory, *_look()))
    try:
        yield
    except FineTuneError:
        raise
    except BaseException as error:
        # A library in Rust that panics raises what is no Exception.
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        raise fault(reason, what, error, advice) from error
    finally:
        if _board:
            _enter(own, before)


def mark(reason: Reason, what: str, seconds: float = 120.0) -> None:
    """Notes what the main lane does from now on, without limits of its own: cheap enough for every row."""
    if _board:
        note = Note(reason, what, "", seconds, _board.limit, *_board.seen)
        _board.write("main", note)


def unmark() -> None:
    """Notes that the main lane does nothing of that kind any more."""
    if _board:
        _board.write("main", _at.get("main"))


def fault(reason: Reason, what: str, error: BaseException, advice: str = "") -> FineTuneError:
    """What a library raised on a tenant's file, as ours; its traceback goes to the log.

    Raises MemoryError where it is one and no limit of ours says whose fault it is.
    """
    if isinstance(error, MemoryError):
        notes = _board.read() if _board else []
        if not _board or not notes:
            raise error
        soft = _board.soft
        return _of_memory(notes, _board.limit, lambda note: soft - note.mapped)
    log.event("a library failed", level="warning", traceback="".join(traceback.format_exception(error))[-4000:])
    return FineTuneError(reason, one_line(f"{what}: {said(error)}{_tail(advice)}"))


def _enter(own: str, note: Note | None) -> None:
    assert _board
    _at[own] = note
    _board.write(own, note)
    # All lanes are in one process: the narrowest limit holds.
    rooms = [known.mapped + known.memory for known in _at.values() if known]
    _board.soft = min([*rooms, _board.hard])
    resource.setrlimit(resource.RLIMIT_DATA, (_board.soft, _board.hard))


def said(error: BaseException) -> str:
    """What a library says, in one line, with the kind of its error where the text alone says too little."""
    text = one_line(str(error))
    return text if " " in text and not isinstance(error, LookupError) else f"{type(error).__name__}: {text}"


def _tail(advice: str) -> str:
    return f"; {advice}" if advice else ""


def _look() -> tuple[int, int]:
    """This process's memory: what it has mapped as its own, which RLIMIT_DATA counts, and what is there."""
    found = memory_of("self")
    if _board:
        _board.seen = found
    return found


def memory_of(process: int | str) -> tuple[int, int]:
    """Bytes that are mapped as its own, and bytes that are there."""
    fields = Path(f"/proc/{process}/statm").read_text().split()
    return int(fields[5]) * _PAGE, int(fields[1]) * _PAGE


def pod_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this container may take; those of the machine where nobody says less."""
    machine = os.sysconf("SC_PHYS_PAGES") * _PAGE
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return min(machine, int((cgroup / name).read_text()))
        except (OSError, ValueError):
            continue
    return machine


def confined(work: Callable[[], TerminationMessage]) -> TerminationMessage:
    """Runs `work` in a child process and returns what it returns. Raises the FineTuneError that it raises."""
    limit = int(_SHARE * pod_memory())
    board = _Board(limit)
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(work, board, writing, parent)
    os.close(writing)
    try:
        answer, killed, resident = _watch(pid, reading, board)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(reading)
        _, status = os.waitpid(pid, 0)
    if answer:
        return _told(answer)
    raise killed or _death(os.waitstatus_to_exitcode(status), board.read(), limit, resident)


def _child(work: Callable[[], TerminationMessage], board: _Board, writing: int, parent: int) -> None:
    """Never returns."""
    global _board
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        _board = board
        # A collection would go through all that was there before, and with that copy its pages.
        gc.freeze()
        board.hard = board.soft = _look()[0] + board.limit + _STACKS
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (board.hard, board.hard))
        try:
            answer: dict[str, Any] = {"message": work().model_dump_json(by_alias=True, exclude_none=True)}
        except FineTuneError as error:
            answer = {"reason": error.reason, "text": one_line(str(error))}
        except MemoryError:
            traceback.print_exc()
            full = _of_memory(board.read(), board.limit, lambda note: board.soft - note.mapped)
            answer = {"reason": full.reason, "text": str(full)}
        except Exception as error:
            traceback.print_exc()
            answer = {"message": failure_of(error).model_dump_json(by_alias=True, exclude_none=True)}
        data = memoryview(json.dumps(answer).encode())
        while data:
            data = data[os.write(writing, data) :]
        code = 0
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _watch(pid: int, reading: int, board: _Board) -> tuple[bytes, FineTuneError | None, int]:
    """What the child said before it ended; else why it was killed here, if it was; and the memory that it had last."""
    answer, resident = b"", 0
    clock = (~pid << 3) | 2
    begun: dict[str, float] = {}
    while True:
        if select.select([reading], [], [], _POLL)[0]:
            if data := os.read(reading, 2**16):
                answer += data
                continue
            return answer if answer.endswith(b"}") else b"", None, resident
        notes = board.read()
        used, resident = time.clock_gettime(clock), memory_of(pid)[1]
        begun = {note.what: begun.get(note.what, used) for note in notes}
        late = next((note for note in notes if used - begun[note.what] > note.seconds), None)
        if late:
            text = f"{late.what}: it takes more than {late.seconds:g} seconds of CPU time{_tail(late.advice)}"
            killed = FineTuneError(late.reason, one_line(text))
        elif resident > board.limit:
            killed = _by_resident(notes, board.limit, resident)
        else:
            continue
        os.kill(pid, signal.SIGKILL)
        return b"", killed, resident


def _by_resident(notes: list[Note], limit: int, resident: int) -> FineTuneError:
    return _of_memory(notes, limit, lambda note: resident - note.resident)


def _of_memory(notes: list[Note], limit: int, grown: Callable[[Note], int]) -> FineTuneError:
    """Who took it, by the bytes since each began: what took more than it may, or half of the pod's; else all did."""
    for note in notes:
        most = min(note.memory, limit // 2)
        if grown(note) >= most:
            text = f"{note.what}: it takes more than {most // MIB:,} MiB of memory{_tail(note.advice)}"
            return FineTuneError(note.reason, one_line(text))
    return FineTuneError(Reason.HOST_OUT_OF_MEMORY, _pod_is_full(limit))


def _pod_is_full(limit: int) -> str:
    return (
        f"the pod's memory is exhausted ({limit // MIB:,} MiB); spec.prepare.memory of the profile says how much it has"
    )


def _death(code: int, notes: list[Note], limit: int, resident: int) -> FineTuneError:
    """What a child died of that said nothing: a library that broke or was refused memory, or the kernel's hand."""
    if code == -signal.SIGKILL:
        return _by_resident(notes, limit, max(resident, limit))
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    if notes:
        note = notes[0]
        room = min(note.memory, limit) // MIB
        text = f"{note.what}: a library ended the process ({name}), as where it is refused more than {room:,} MiB"
        return FineTuneError(note.reason, one_line(f"{text} of memory{_tail(note.advice)}"))
    return FineTuneError(Reason.RANK_FAILED, f"the process that prepares the data ended by {name}, without a word")


def _told(answer: bytes) -> TerminationMessage:
    value = json.loads(answer)
    if "message" in value:
        return TerminationMessage.model_validate_json(value["message"])
    raise FineTuneError(Reason(value["reason"]), value["text"])
