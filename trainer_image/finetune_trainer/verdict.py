"""PURE: how the ranks of one pod ended -> the one message that says why.

When a rank dies its peers fail too, in their collectives, and often exit first. Such victims are never the cause where
another cause is known.
"""

import re
import signal
from collections.abc import Sequence
from typing import NamedTuple

from finetune_api.failures import EXIT_CODES, Reason, TerminationMessage, reason_of_exit_code

PREEMPTED_CODE = EXIT_CODES[Reason.PREEMPTED]
_VICTIM = re.compile(
    r"connection (was )?(closed|reset|refused|aborted|lost)|broken ?pipe|socket (closed|timeout)|remote (process|peer)"
    r"|nccl\w*(remote|system)error|nccl communicator was aborted|unhandled system error"
    r"|Dist(Backend|Network|Store)Error|gloo.*(timed out|timeout|rank)|heartbeat monitor",
    re.IGNORECASE,
)


_KILLED = "the process that stores checkpoints was killed by signal 9"


class RankEnd(NamedTuple):
    rank: int
    code: int
    """Exit code, negative for a signal."""
    time: float
    """When it failed, as it says itself, or when it was found to have ended."""
    outcome: TerminationMessage | None = None
    """What it said of itself."""
    last_lines: Sequence[str] = ()
    killed: bool = False
    """The launcher killed it."""


def is_victim(end: RankEnd) -> bool:
    """Whether it failed because another did: its own words are those of a broken connection."""
    if end.outcome and end.outcome.reason:
        return end.outcome.reason == Reason.RANK_FAILED and bool(_VICTIM.search(end.outcome.message))
    return end.code in (1, -signal.SIGABRT) and any(_VICTIM.search(line) for line in end.last_lines)


def describe(end: RankEnd, out_of_memory: bool) -> TerminationMessage:
    """One failed rank's message. `out_of_memory`: the kernel killed something in this pod for its memory."""
    if end.outcome and end.outcome.reason:
        said = end.outcome
        if out_of_memory and said.reason == Reason.RANK_FAILED and _KILLED in said.message:
            text = f"{said.message}: the pod's memory limit was reached"
            said = said.model_copy(update={"reason": Reason.HOST_OUT_OF_MEMORY, "message": text[:2048]})
        if is_victim(end):
            text = f"lost contact with another rank: {said.message}"[:2048]
            said = said.model_copy(update={"message": text, "victim": True})
        return said.model_copy(update={"rank": end.rank, "exit_code": end.code})
    step = end.outcome.step if end.outcome else None
    reason, last = Reason.RANK_FAILED, next(reversed(end.last_lines), "")
    if end.code < 0:
        text = f"rank {end.rank} was killed by signal {-end.code} ({_signal_name(-end.code)})"
        if end.code == -signal.SIGKILL and out_of_memory:
            reason = Reason.HOST_OUT_OF_MEMORY
            text = f"rank {end.rank} was killed by the kernel: the pod's memory limit was reached"
    else:
        reason = reason_of_exit_code(end.code)
        text = f"rank {end.rank} ended with exit code {end.code}" + (f": {last}" if last else "")
    return TerminationMessage(reason=reason, message=text[:2048], rank=end.rank, exit_code=end.code, step=step)


def judge(ends: Sequence[RankEnd], stopped_at: float | None, out_of_memory: bool = False) -> TerminationMessage:
    """The pod's message: success, with rank 0's result where rank 0 is here; else the first cause.

    `stopped_at`: when the pod was asked to end; what fails after that is the end that was asked for.
    """
    failed = [end for end in ends if end.code != 0]
    if not failed:
        own = next((end.outcome for end in ends if end.rank == 0 and end.outcome), None)
        return own or TerminationMessage(step=_last_step(ends))
    causes = [end for end in failed if not end.killed]
    if stopped_at is not None and not any(
        end.time < stopped_at and end.code != PREEMPTED_CODE and not is_victim(end) for end in causes
    ):
        return _preempted(ends)
    if not causes:
        return describe(failed[0], out_of_memory)
    first = min(causes, key=lambda end: (is_victim(end), end.time))
    return describe(first, out_of_memory)


def _preempted(ends: Sequence[RankEnd]) -> TerminationMessage:
    saved = [end for end in ends if end.outcome and end.outcome.reason == Reason.PREEMPTED]
    text = "the pod was asked to end"
    if saved and saved[0].outcome and saved[0].outcome.message:
        text = saved[0].outcome.message
    elif any(end.killed for end in ends):
        text += f"; ranks {', '.join(str(e.rank) for e in ends if e.killed)} did not end within the grace period"
    return TerminationMessage(reason=Reason.PREEMPTED, message=text, exit_code=PREEMPTED_CODE, step=_last_step(ends))


def _last_step(ends: Sequence[RankEnd]) -> int | None:
    return max((end.outcome.step for end in ends if end.outcome and end.outcome.step is not None), default=None)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
