"""Why an attempt ended, from what its pods left behind."""

import dataclasses
import datetime
from typing import Any

import pytest

from finetune_api.failures import EXIT_CODES, Reason, TerminationMessage
from finetune_operator.classify import Ending, ending, first_cause
from finetune_operator.observe import Child, ContainerEnd, Pod
from support.world import RESULT, START


def child(finished: Any = "Failed", message: str = "") -> Child:
    return Child("j-0", "u", 0, START, 2, False, False, finished, START, message)


def pod(
    index: int, code: int | None = None, after: float = 0, said: TerminationMessage | None = None, **more: Any
) -> Pod:
    finished = START + datetime.timedelta(seconds=after)
    end = None
    if code is not None:
        text = said.encode().decode() if said else more.pop("text", "")
        end = ContainerEnd(code, more.pop("oom", False), finished, text)
    facts: dict[str, Any] = {
        "name": f"j-0-{index}",
        "owner": "u",
        "index": index,
        "phase": "Succeeded" if code == 0 else "Failed",
        "created": START,
        "deletion": None,
        "node": f"node-{index}",
        "started": START,
        "end": end,
        "waiting": None,
        "unschedulable": None,
        "disruption": None,
        "evicted": None,
    }
    return Pod(**(facts | more))


def says(reason: Reason, message: str = "", **more: Any) -> TerminationMessage:
    return TerminationMessage(reason=reason, message=message, **more)


def failed(*pods: Pod, message: str = "") -> Ending:
    found = ending(child(message=message), pods, START)
    assert found
    return found


@pytest.mark.parametrize("reason", list(EXIT_CODES))
def test_a_message_and_an_exit_code_alone_mean_the_same(reason: Reason) -> None:
    told, untold = failed(pod(0, EXIT_CODES[reason], said=says(reason, "why"))), failed(pod(0, EXIT_CODES[reason]))
    assert (told.reason, told.outcome) == (untold.reason, untold.outcome) == (reason, told.outcome)
    assert told.message.startswith("why")
    assert untold.message.startswith("j-0-0: ended with exit code")


@pytest.mark.parametrize(
    ("pods", "reason", "outcome", "words"),
    [
        ([pod(0, 137, oom=True)], Reason.HOST_OUT_OF_MEMORY, "Permanent", "more memory than its limit"),
        ([pod(0, 137)], Reason.RANK_FAILED, "Retryable", "exit code 137 (signal 9)"),
        ([pod(0, 1, text="Traceback\nKeyError: 'x'\n")], Reason.RANK_FAILED, "Retryable", "KeyError: 'x'"),
        (
            [pod(0, 143, disruption=("PreemptionByScheduler", "made room"))],
            Reason.PREEMPTED,
            "Preempted",
            "PreemptionByScheduler: made room",
        ),
        ([pod(0, None, disruption=("DeletionByPodGC", "node is gone"))], Reason.NODE_LOST, "Retryable", "node is gone"),
        (
            [pod(0, 137, evicted="ephemeral-storage", disruption=("TerminationByKubelet", ""))],
            Reason.NODE_LOST,
            "Retryable",
            "evicted: ephemeral-storage",
        ),
        ([pod(0, None)], Reason.NODE_LOST, "Retryable", "without a word"),
    ],
)
def test_what_no_message_of_ours_tells(pods: list[Pod], reason: Reason, outcome: str, words: str) -> None:
    found = failed(*pods)
    assert (found.reason, found.outcome) == (reason, outcome)
    assert words in found.message


@pytest.mark.parametrize(
    ("pods", "first"),
    [
        # The rank that was killed, though pod 0 reports its lost connection in the same second.
        (
            [
                pod(0, 76, 0, says(Reason.RANK_FAILED, exit_code=1)),
                pod(1, 76, 0, says(Reason.RANK_FAILED, exit_code=-9)),
            ],
            1,
        ),
        # What comes much later is a victim, whatever it says.
        ([pod(0, 76, 0, says(Reason.RANK_FAILED, exit_code=1)), pod(1, 72, 60, says(Reason.OUT_OF_MEMORY))], 0),
        # Within the clocks' error the one that says most.
        ([pod(0, 75, 0, says(Reason.HUNG)), pod(1, 72, 2, says(Reason.OUT_OF_MEMORY))], 1),
        ([pod(0, 77, 0, says(Reason.PREEMPTED)), pod(1, 74, 1, says(Reason.DIVERGED))], 1),
        ([pod(0, 72, 0, says(Reason.OUT_OF_MEMORY)), pod(1, 137, 1, oom=True)], 1),
        (
            [
                pod(0, 76, 1, says(Reason.RANK_FAILED, exit_code=1)),
                pod(1, 143, 0, disruption=("EvictionByEvictionAPI", "")),
            ],
            1,
        ),
        # A worker that ended well is no cause.
        ([pod(0, 0, 0), pod(1, 74, 30, says(Reason.DIVERGED))], 1),
    ],
)
def test_the_first_cause_wins_over_its_victims(pods: list[Pod], first: int) -> None:
    for order in (pods, pods[::-1]):
        cause = first_cause(order)
        assert cause
        assert cause.pod.index == first


def test_a_victim_that_ends_long_before_the_cause_is_not_it() -> None:
    victim = says(Reason.RANK_FAILED, "lost contact", rank=0, exit_code=76, victim=True)
    killed = says(Reason.RANK_FAILED, "rank 1 was killed by signal 9", rank=1, exit_code=-9)
    assert failed(pod(0, 76, after=0, said=victim), pod(1, 76, after=30, said=killed)).rank == 1
    assert failed(pod(0, 76, said=victim)).rank == 0


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "Container trainer for pod ns/j-0-1-x failed with exit code 74 matching FailJob rule at index 1",
            Reason.DIVERGED,
        ),
        ("Pod ns/j-0-1-x has condition DisruptionTarget matching FailJob rule at index 0", Reason.PREEMPTED),
        ("", Reason.NODE_LOST),
    ],
)
def test_where_no_pod_is_left_the_jobs_condition_is_read(message: str, reason: Reason) -> None:
    assert failed(message=message).reason is reason


def test_success_is_told_by_worker_0() -> None:
    found = ending(child("Complete"), [pod(1, 0), pod(0, 0, said=TerminationMessage(result=RESULT))], START)
    assert found
    assert (found.outcome, found.result, found.reason) == ("Succeeded", RESULT, None)
    lost = ending(child("Complete"), [], START)
    assert lost
    assert (lost.outcome, lost.result, lost.told) == ("Succeeded", None, False)


def test_a_helper_that_was_killed_for_its_memory_is_no_cause() -> None:
    found = failed(pod(0, 0, oom=True), pod(1, 74, 30, says(Reason.DIVERGED)))
    assert found.reason is Reason.DIVERGED


@pytest.mark.parametrize(
    ("attempt", "field"), [(0, "FineTuneProfile's spec.resources"), (None, "FineTuneProfile's spec.prepare")]
)
def test_what_ran_out_of_host_memory_is_told_what_to_change(attempt: int | None, field: str) -> None:
    job = dataclasses.replace(child(), attempt=attempt)
    code = EXIT_CODES[Reason.HOST_OUT_OF_MEMORY]
    for pods in ([pod(0, 137, oom=True)], [pod(0, code, said=says(Reason.HOST_OUT_OF_MEMORY, "x" * 2048))], []):
        told = dataclasses.replace(job, message=f"Container trainer failed with exit code {code} matching FailJob rule")
        found = ending(told, pods, START)
        assert found
        assert (found.reason, found.outcome) == (Reason.HOST_OUT_OF_MEMORY, "Permanent")
        assert field in found.message
        assert len(found.message) <= 2048


def test_a_rank_that_hangs_is_told_of_with_its_own_node() -> None:
    assert failed(pod(0, 75, said=says(Reason.HUNG, rank=3, node="node-7"))).node == "node-7"


def test_a_job_that_runs_has_no_end() -> None:
    assert ending(child(None), [pod(0, 74)], START) is None


def test_rank_node_and_step_are_kept() -> None:
    found = failed(pod(1, 76, said=says(Reason.RANK_FAILED, "boom", rank=5, exit_code=-11, resumed_from_step=200)))
    assert (found.rank, found.exit_code, found.node, found.resumed_from_step) == (5, -11, "node-1", 200)
