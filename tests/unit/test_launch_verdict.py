"""Why a pod ended, from how its ranks did."""

import signal
from pathlib import Path

import pytest

from finetune_api.failures import Reason, TerminationMessage, TrainingResult
from finetune_trainer.launch import Layout, cores, oom_kills
from finetune_trainer.outcome import read_outcome, write_outcome
from finetune_trainer.verdict import RankEnd, judge


def said(reason: Reason, message: str = "", step: int | None = None) -> TerminationMessage:
    return TerminationMessage(reason=reason, message=message, step=step)


def make_end(rank: int, code: int, time: float, outcome: TerminationMessage | None = None, **more: object) -> RankEnd:
    return RankEnd(rank, code, time, outcome, **more)  # type: ignore[arg-type]


LOST = said(Reason.RANK_FAILED, "DistBackendError: NCCL communicator was aborted on rank 0")
OWN = said(Reason.RANK_FAILED, "ValueError: bad")
NAN = said(Reason.DIVERGED, "loss is nan")
SAVED = said(Reason.PREEMPTED, "saved", 3)

CASES = {
    "the earlier of two causes": ([make_end(0, 76, 2, OWN), make_end(1, 74, 1, NAN)], None, Reason.DIVERGED, 1),
    "a victim that was earlier": ([make_end(0, 76, 1, LOST), make_end(1, 74, 2, NAN)], None, Reason.DIVERGED, 1),
    "a cause that left no message": (
        [make_end(0, 76, 1, LOST), make_end(1, -signal.SIGKILL, 2)], None, Reason.RANK_FAILED, 1),
    "victims only": ([make_end(0, 76, 2, LOST), make_end(1, 76, 1, LOST)], None, Reason.RANK_FAILED, 1),
    "an aborted victim by its last lines": (
        [make_end(0, -signal.SIGABRT, 1, None, last_lines=("x", "Connection reset by peer")), make_end(1, 76, 2, OWN)],
        None, Reason.RANK_FAILED, 1),
    "killed by the launcher is no cause": (
        [make_end(0, -signal.SIGKILL, 1, None, killed=True), make_end(1, 76, 2, OWN)], None, Reason.RANK_FAILED, 1),
    "preempted, the signal came to another pod": (
        [make_end(0, 77, 1, SAVED), make_end(1, 77, 2, SAVED)], None, Reason.PREEMPTED, 0),
    "asked to end before torch was loaded": ([make_end(0, -signal.SIGTERM, 6)], 5.0, Reason.PREEMPTED, None),
    "failed, then asked to end": (
        [make_end(0, 76, 4, OWN), make_end(1, -signal.SIGTERM, 6)], 5.0, Reason.RANK_FAILED, 0),
    "asked to end, then failed": ([make_end(0, 71, 6, said(Reason.STORAGE_UNAVAILABLE))], 5.0, Reason.PREEMPTED, None),
    "a code of ours without a message": ([make_end(0, 72, 1)], None, Reason.OUT_OF_MEMORY, 0),
}  # fmt: skip


@pytest.mark.parametrize(("ends", "stopped_at", "reason", "rank"), CASES.values(), ids=CASES.keys())
def test_the_cause(ends: list[RankEnd], stopped_at: float | None, reason: Reason, rank: int | None) -> None:
    message = judge(ends, stopped_at)
    assert message.reason == reason
    if reason != Reason.PREEMPTED:
        assert message.rank == rank


def test_an_uploader_that_was_killed_for_memory_is_told_from_one_that_was_not() -> None:
    lost = said(Reason.RANK_FAILED, "the process that stores checkpoints was killed by signal 9")
    assert judge([make_end(0, 76, 1, lost)], None).reason == Reason.RANK_FAILED
    message = judge([make_end(0, 76, 1, lost)], None, out_of_memory=True)
    assert (message.reason, message.rank) == (Reason.HOST_OUT_OF_MEMORY, 0)
    assert message.message.endswith("the pod's memory limit was reached")


def test_success_is_rank_0s_own_message() -> None:
    result = TerminationMessage(step=9)
    assert judge([make_end(0, 0, 1, result), make_end(1, 0, 1)], None) == result
    assert judge([make_end(2, 0, 1, result)], None) == TerminationMessage(step=9)


def test_a_victim_alone_says_that_it_is_one() -> None:
    message = judge([make_end(3, 76, 1, LOST)], None)
    assert message.message.startswith("lost contact with another rank: ")
    assert message.victim


@pytest.mark.parametrize(("cores_of_pod", "processes", "threads"), [(8, 2, "4"), (1, 4, "1"), (7, 2, "3")])
def test_each_rank_gets_its_share_of_the_cores(cores_of_pod: int, processes: int, threads: str) -> None:
    layout = Layout(1, 2, processes, "10.0.0.1", "29500", cores_of_pod)
    assert layout.environment(0)["OMP_NUM_THREADS"] == threads
    assert layout.environment(1)["RANK"] == str(processes + 1)


@pytest.mark.parametrize(
    ("text", "expected"), [("100000 100000", 1), ("50000 100000", 1), ("nonsense", None), ("max 100000", None)]
)
def test_cores_follow_the_quota(tmp_path: Path, text: str, expected: int | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cores(tmp_path) == (expected or cores(tmp_path / "none"))


def test_kills_for_memory_are_read_from_both_kinds_of_cgroup(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) == 0
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert oom_kills(tmp_path) == 2
    (tmp_path / "memory.events").write_text("oom 5\noom_kill 4\n")
    assert oom_kills(tmp_path) == 4


def test_the_first_failure_that_a_rank_reports_stays(tmp_path: Path) -> None:
    path = tmp_path / "outcomes" / "rank-0.json"
    assert read_outcome(path) is None
    write_outcome(path, TerminationMessage(step=1))
    write_outcome(path, said(Reason.DIVERGED, "nan"))
    write_outcome(path, said(Reason.RANK_FAILED, "teardown"))
    outcome = read_outcome(path)
    assert outcome is not None
    assert outcome.message.reason == Reason.DIVERGED
    path.write_text("{half")
    assert read_outcome(path) is None


def test_a_gate_that_is_not_met_is_told_with_the_result(tmp_path: Path) -> None:
    """Rank 0 alone knows of it; the others have ended well."""
    result = TrainingResult(uri="s3://bucket/k/", manifest_sha256="a" * 64, size_bytes=1, metrics={"evalLoss": 2.0})
    gate = TerminationMessage(reason=Reason.GATE_NOT_MET, message="evalLoss is 2", exit_code=78, result=result)
    write_outcome(tmp_path / "rank-0.json", gate)
    written = read_outcome(tmp_path / "rank-0.json")
    assert written
    message = judge([make_end(0, 78, 1, written.message), make_end(1, 0, 1, TerminationMessage(step=8))], None)
    assert (message.reason, message.message, message.rank) == (Reason.GATE_NOT_MET, "evalLoss is 2", 0)
    assert message.result == result
