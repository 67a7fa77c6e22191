"""What the node reports: phases, conditions, termination states."""

from pathlib import Path
from typing import Any

import pytest

from finetune_sandbox.container import final_message, terminated
from finetune_sandbox.logs import tail_offset
from finetune_sandbox.node import lost_status
from finetune_sandbox.podstatus import Container, PodFacts, phase, pod_status

NOW = "2030-01-01T00:00:00Z"
WAITING = {"waiting": {"reason": "ContainerCreating"}}
RUNNING = {"running": {"startedAt": NOW}}
DONE = {"terminated": {"exitCode": 0, "reason": "Completed"}}
FAILED = {"terminated": {"exitCode": 1, "reason": "Error"}}


def facts(
    *states: dict[str, Any], init: tuple[dict[str, Any], ...] = (), policy: str = "Never", **more: Any
) -> PodFacts:
    containers = [Container(f"i{n}", "x", init=True, state=state) for n, state in enumerate(init)]
    containers += [Container(f"c{n}", "x", state=state) for n, state in enumerate(states)]
    return PodFacts(containers, policy, NOW, "127.0.0.1", "127.1.0.1", **more)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (facts(WAITING), "Pending"),
        (facts(WAITING, init=(RUNNING,)), "Pending"),
        (facts(WAITING, init=(FAILED,)), "Failed"),
        (facts(WAITING, init=(FAILED,), policy="OnFailure"), "Pending"),
        (facts(RUNNING, init=(DONE,)), "Running"),
        (facts(RUNNING, WAITING), "Running"),
        (facts(RUNNING, FAILED), "Running"),
        (facts(DONE), "Succeeded"),
        (facts(DONE, FAILED), "Failed"),
        (facts(DONE, policy="Always"), "Running"),
        (facts(FAILED, policy="OnFailure"), "Running"),
        (facts(DONE, policy="OnFailure"), "Succeeded"),
        (facts(FAILED, policy="Always", stopped=True), "Failed"),
        (facts(DONE, policy="Always", stopped=True), "Succeeded"),
        (facts(WAITING, stopped=True), "Failed"),
        (facts(RUNNING, verdict=("DeadlineExceeded", "m")), "Running"),
        (facts(DONE, verdict=("DeadlineExceeded", "m")), "Failed"),
    ],
)
def test_phase(given: PodFacts, expected: str) -> None:
    assert phase(given) == expected


def conditions(given: PodFacts, old: dict[str, Any] | None = None) -> dict[str, tuple[str, str]]:
    return {c["type"]: (c["status"], c["reason"]) for c in pod_status(given, old or {}, NOW)["conditions"]}


def test_conditions() -> None:
    assert conditions(facts(WAITING, init=(RUNNING,), prepared=True)) == {
        "PodReadyToStartContainers": ("True", ""),
        "Initialized": ("False", "ContainersNotInitialized"),
        "Ready": ("False", "ContainersNotReady"),
        "ContainersReady": ("False", "ContainersNotReady"),
        "PodScheduled": ("True", ""),
    }
    assert conditions(facts(RUNNING, prepared=True))["Ready"] == ("True", "")
    assert conditions(facts(DONE, prepared=True)) == {
        "PodReadyToStartContainers": ("False", ""),
        "Initialized": ("True", "PodCompleted"),
        "Ready": ("False", "PodCompleted"),
        "ContainersReady": ("False", "PodCompleted"),
        "PodScheduled": ("True", ""),
    }
    assert conditions(facts(FAILED))["Ready"] == ("False", "PodFailed")


def test_a_condition_keeps_its_time_until_it_changes() -> None:
    first = pod_status(facts(WAITING), {}, "t1")
    second = pod_status(facts(RUNNING), first, "t2")
    times = {c["type"]: c["lastTransitionTime"] for c in second["conditions"]}
    assert times == {
        "PodReadyToStartContainers": "t1",
        "Initialized": "t1",
        "Ready": "t2",
        "ContainersReady": "t2",
        "PodScheduled": "t1",
    }


def test_a_verdict_is_told_when_the_containers_have_ended() -> None:
    verdict = ("DeadlineExceeded", "too long")
    assert "reason" not in pod_status(facts(RUNNING, verdict=verdict), {}, NOW)
    status = pod_status(facts(FAILED, verdict=verdict), {}, NOW)
    assert (status["phase"], status["reason"], status["message"]) == ("Failed", *verdict)


@pytest.mark.parametrize(
    ("code", "out_of_memory", "state"),
    [
        (0, False, {"exitCode": 0, "reason": "Completed"}),
        (0, True, {"exitCode": 0, "reason": "Completed"}),
        (3, False, {"exitCode": 3, "reason": "Error"}),
        (-9, False, {"exitCode": 137, "signal": 9, "reason": "Error"}),
        (-15, False, {"exitCode": 143, "signal": 15, "reason": "Error"}),
        (-9, True, {"exitCode": 137, "signal": 9, "reason": "OOMKilled"}),
        (1, True, {"exitCode": 1, "reason": "OOMKilled"}),
    ],
)
def test_termination_states(code: int, out_of_memory: bool, state: dict[str, Any]) -> None:
    assert terminated(code, out_of_memory) == state


@pytest.mark.parametrize(
    ("message", "policy", "failed", "expected"),
    [
        ("said", "File", False, "said"),
        ("", "File", True, ""),
        ("", "FallbackToLogsOnError", True, "last line\n"),
        ("said", "FallbackToLogsOnError", True, "said"),
        ("", "FallbackToLogsOnError", False, ""),
        ("x" * 5000, "File", True, "x" * 4096),
    ],
)
def test_termination_message(tmp_path: Path, message: str, policy: str, failed: bool, expected: str) -> None:
    (tmp_path / "message").write_text(message)
    (tmp_path / "log").write_text("last line\n")
    assert final_message(tmp_path / "message", tmp_path / "log", policy, failed) == expected


def test_the_end_of_a_log_is_at_most_80_lines_and_2048_bytes(tmp_path: Path) -> None:
    (tmp_path / "message").touch()
    for line, expected in (("ab\n", 80 * 3), ("x" * 99 + "\n", 2048)):
        (tmp_path / "log").write_text(line * 1000)
        found = final_message(tmp_path / "message", tmp_path / "log", "FallbackToLogsOnError", True)
        assert len(found) == expected


@pytest.mark.parametrize(
    ("lines", "rest"), [(None, b"1\n2\n3\n"), (0, b""), (1, b"3\n"), (2, b"2\n3\n"), (9, b"1\n2\n3\n")]
)
def test_tail(tmp_path: Path, lines: int | None, rest: bytes) -> None:
    (tmp_path / "log").write_bytes(b"1\n2\n3\n")
    assert (tmp_path / "log").read_bytes()[tail_offset(tmp_path / "log", lines) :] == rest


def test_tail_of_long_lines(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"a" * 200_000 + b"\n" + b"b" * 200_000)
    assert tail_offset(tmp_path / "log", 1) == 200_001


def test_a_pod_of_a_restarted_node_is_failed_and_keeps_what_was_known() -> None:
    records = [{"name": "a", "ready": True, "state": RUNNING}, {"name": "b", "ready": False, "state": FAILED}]
    status = lost_status({"status": {"phase": "Running", "containerStatuses": records}}, NOW)
    assert (status["phase"], status["reason"]) == ("Failed", "NodeLost")
    first, second = status["containerStatuses"]
    assert first["state"]["terminated"]["exitCode"] == 137
    assert first["state"]["terminated"]["reason"] == "ContainerStatusUnknown"
    assert first["ready"] is False
    assert second["state"] == FAILED
