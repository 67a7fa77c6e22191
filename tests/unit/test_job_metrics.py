"""What Prometheus is told of jobs: what is counted, when series go, and how many there can be."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.budget import Account
from finetune_api.failures import TerminationMessage
from finetune_operator.jobmetrics import ACCOUNTS, DIRECTIONS
from finetune_operator.ledger import FORGET_AFTER
from finetune_operator.manifests import CONTAINER
from support.scraped import BORN, Board, Told, at, failed, run, trainer
from support.world import START, Object


def test_jobs_are_counted_by_state_and_reason_and_by_namespace() -> None:
    board = Board()
    board.tell(Told("a"), "Running")
    board.tell(Told("b"), "Failed", conditions=failed("OutOfMemory"), completionTime=at(1))
    unplaced = {"type": "Running", "status": "False", "reason": "Unschedulable", "message": ""}
    board.tell(Told("c", "team-b"), "Starting", conditions=[unplaced])
    board.tell(Told("d", "team-b"), None)
    assert board.value("jobs", state="Running", reason="") == 1
    assert board.value("jobs", state="Failed", reason="OutOfMemory") == 1
    assert board.value("jobs", state="Starting", reason="Unschedulable") == 1
    assert board.value("jobs", state="Starting", reason="") == 0
    assert board.value("namespace_jobs", job_namespace="team-b", state="Pending") == 1
    board.metrics.forget(("team-b", "c"))
    assert board.value("jobs", state="Starting", reason="Unschedulable") is None
    assert board.value("namespace_jobs", job_namespace="team-b", state="Starting") is None


def test_another_controllers_jobs_are_not_counted() -> None:
    board, raw = Board(), Told().raw(None, 1, {})
    raw["spec"]["runPolicy"] = {"managedBy": "kueue.x-k8s.io/multikueue"}
    board.metrics.note(raw)
    assert board.value("jobs", state="Pending", reason="") == 0


def test_series_of_a_job_go_when_its_gang_ends() -> None:
    board, job = Board(), Told()
    before = board.series("job_")
    board.tell(job, "Running", attempts=[run(started=5)], trainerStatus=trainer(1))
    assert board.value("job_info", job_namespace="team-a", job_name="bot", profile="", state="Running") == 1
    board.tell(job, "Complete", attempts=[run(started=5, ended=9, outcome="Succeeded")], completionTime=at(9))
    assert board.series("job_") == before
    other = Told("other")
    board.tell(other, "Running", attempts=[run(started=5)])
    assert board.series("job_") > before
    board.metrics.forget(("team-a", "other"))
    assert board.series("job_") == before


def test_series_of_a_namespace_go_some_time_after_its_last_job() -> None:
    board = Board()
    before = board.series()
    board.tell(Told(), "Running")
    board.metrics.forget(("team-a", "bot"))
    assert board.value("gpu_hours_total", job_namespace="team-a") == 0
    board.now = FORGET_AFTER + 1
    assert board.series() == before


def test_ten_thousand_jobs_have_a_bounded_number_of_series() -> None:
    board = Board(namespaces=10, jobs=30, jobs_of_namespace=5)
    for number in range(10_000):
        job = Told(f"job-{number}", f"team-{number % 100}")
        board.tell(job, "Running", attempts=[run(started=number)], trainerStatus=trainer(1, metrics={"loss": "1"}))
    assert board.value("jobs", state="Running", reason="") == 10_000
    assert board.value("namespace_jobs", job_namespace="team-3", state="Running") == 100
    assert board.value("namespace_jobs", job_namespace="other", state="Running") == 9_000
    assert board.value("jobs_without_series") == 9_970
    assert board.series("job_loss") == 30
    assert board.series() < 1000
    for number in range(10_000):
        board.metrics.forget((f"team-{number % 100}", f"job-{number}"))
    board.now = FORGET_AFTER + 1
    assert board.value("jobs", state="Running", reason="") == 0
    assert board.series("namespace_jobs") == board.series("job_loss") == 0


def test_a_tenant_with_many_queued_jobs_takes_nobodys_place() -> None:
    board = Board(jobs=2, jobs_of_namespace=1)
    for number in range(50):
        board.tell(Told(f"q-{number}", "crowd"), "Queued")
    board.tell(Told("second", "crowd"), "Running", attempts=[run(started=2)])
    board.tell(Told("first", "crowd"), "Running", attempts=[run(started=1)])
    board.tell(Told("only", "quiet"), "Running", attempts=[run(started=3)])
    assert board.value("job_gpus", job_namespace="crowd", job_name="first") == 8
    assert board.value("job_gpus", job_namespace="crowd", job_name="second") is None
    assert board.value("job_gpus", job_namespace="quiet", job_name="only") == 8
    assert board.value("jobs_without_series") == 1


def test_names_of_figures_that_a_trainer_makes_up_become_no_series() -> None:
    board = Board()
    metrics = {f"figure_{number}": "1.0" for number in range(60)} | {"loss": "0.25", "tokens_per_second": "n/a"}
    board.tell(Told(), "Running", attempts=[run(started=1)], trainerStatus=trainer(3, metrics=metrics))
    assert board.value("job_loss", job_namespace="team-a", job_name="bot") == 0.25
    assert board.value("job_tokens_per_second", job_namespace="team-a", job_name="bot") is None
    assert board.series("job_") < 15


def test_what_a_trainer_reports_is_told() -> None:
    board, job = Board(), Told()
    labels = {"job_namespace": "team-a", "job_name": "bot"}
    checkpoint = {"uri": "s3://b/k", "step": 20, "time": at(40)}
    board.now = 50
    told = trainer(25, progressPercentage=25, estimatedRemainingSeconds=150, lastUpdatedTime=at(49))
    board.tell(job, "Running", attempts=[run(started=10)], trainerStatus=told, checkpoint=checkpoint)
    assert board.value("job_progress_ratio", **labels) == 0.25
    assert board.value("job_remaining_seconds", **labels) == 150
    assert board.value("job_step", **labels) == 25
    assert board.value("job_steps", **labels) == 100
    assert board.value("job_report_timestamp_seconds", **labels) == BORN + 49
    assert board.value("job_checkpoint_timestamp_seconds", **labels) == BORN + 40
    assert board.value("job_attempts", **labels) == 1


def test_a_step_that_does_not_rise_is_seen_though_reports_come() -> None:
    board, job = Board(), Told()
    for now, step in ((10, 1), (20, 2), (30, 2), (40, 2)):
        board.now = now
        board.tell(job, "Running", attempts=[run(started=1)], trainerStatus=trainer(step))
    assert board.value("job_step_timestamp_seconds", job_namespace="team-a", job_name="bot") == BORN + 20


def test_gpu_hours_grow_while_a_gang_runs_and_stop_with_it() -> None:
    board, job = Board(), Told()
    board.tell(job, None)
    board.tell(job, "Running", attempts=[run(started=100)])
    board.now = 1900
    assert board.value("gpu_hours_total", job_namespace="team-a") == 4.0
    assert board.value("gpus", job_namespace="team-a") == 8
    over = run(started=100, ended=3700, outcome="Retryable", reason="NodeLost")
    board.now = 9000
    board.tell(job, "Retrying", attempts=[over])
    assert board.value("gpu_hours_total", job_namespace="team-a") == 8.0
    assert board.value("gpus", job_namespace="team-a") == 0
    assert board.value("gpus_wanted", job_namespace="team-a") == 8
    again = run(1, started=9000, ended=12600, outcome="Succeeded")
    board.tell(job, "Complete", attempts=[over, again], completionTime=at(12600))
    # An older version that comes late, and the same one once more, count nothing.
    board.tell(job, "Running", 2, attempts=[run(started=100)])
    board.tell(job, "Complete", attempts=[over, again], completionTime=at(12600))
    assert board.value("gpu_hours_total", job_namespace="team-a") == 16.0
    assert board.value("attempts_ended_total", outcome="Retryable", reason="NodeLost") == 1
    assert board.value("attempts_ended_total", outcome="Succeeded", reason="") == 1
    assert board.value("jobs_ended_total", job_namespace="team-a", state="Complete") == 1
    board.metrics.forget(("team-a", "bot"))
    assert board.value("gpu_hours_total", job_namespace="team-a") == 16.0


def test_what_was_before_the_operator_is_not_counted_again() -> None:
    board = Board(now=0)
    old = Told("old", created=-9000)
    over = run(started=-7200, ended=-3600, outcome="Retryable", reason="Hung")
    board.tell(old, "Running", attempts=[over, run(1, started=-1800)])
    board.tell(Told("older", created=-9000), "Failed", conditions=failed("Diverged"), completionTime=at(-100))
    assert board.value("gpu_hours_total", job_namespace="team-a") == 0
    assert board.value("jobs_ended_total", job_namespace="team-a", state="Failed") == 0
    board.now = 1800
    assert board.value("gpu_hours_total", job_namespace="team-a") == 4.0
    assert board.value("attempts_ended_total", outcome="Retryable", reason="Hung") == 0


def test_what_another_operator_has_counted_is_not_counted_again() -> None:
    board = Board(now=500)
    board.metrics.begin()
    over = {"conditions": failed("Diverged"), "completionTime": at(400), "attempts": [run(started=1, ended=400)]}
    board.tell(Told("old", created=100), "Failed", **over)
    board.metrics.note_pod(ended_pod("a", 1000, 50, finished=400, job="old"))
    board.tell(Told("new", created=501), "Failed", conditions=failed("Diverged"), completionTime=at(502))
    assert board.value("jobs_ended_total", job_namespace="team-a", state="Failed") == 1
    assert board.value("storage_bytes_total", job_namespace="team-a", direction="read") == 0


def test_failures_are_counted_by_reason_once_from_zero() -> None:
    board, job = Board(), Told()
    board.tell(job, None)
    assert board.value("jobs_ended_total", job_namespace="team-a", state="Failed") == 0
    assert board.value("jobs_failed_total", reason="DataInvalid") == 0
    for _ in range(2):
        board.tell(job, "Failed", conditions=failed("DataInvalid"), completionTime=at(3))
    assert board.value("jobs_ended_total", job_namespace="team-a", state="Failed") == 1
    assert board.value("jobs_failed_total", reason="DataInvalid") == 1


def test_the_phases_of_a_start_and_the_wait_in_a_queue() -> None:
    board, job = Board(), Told()
    steps: list[tuple[float, str | None, Object]] = [
        (1, None, {}),
        (2, "Preparing", {}),
        (32, "Queued", {"attempts": [run()]}),
        (632, "Starting", {"attempts": [run()]}),
        (652, "Running", {"attempts": [run(started=650)]}),
        (655, "Running", {"attempts": [run(started=650)], "trainerStatus": trainer(phase="Loading")}),
        (700, "Running", {"attempts": [run(started=650)], "trainerStatus": trainer(1)}),
        (900, "Evaluating", {"attempts": [run(started=650)], "trainerStatus": trainer(90, phase="Evaluating")}),
    ]
    for now, state, status in steps:
        board.now = now
        board.tell(job, state, **status)
    sums = {p: board.value("startup_seconds_sum", phase=p) for p in ("Pending", "Preparing", "Queued", "Starting")}
    assert sums == {"Pending": 2, "Preparing": 30, "Queued": 600, "Starting": 20}
    assert board.value("startup_seconds_sum", phase="Loading") == 48
    assert board.value("startup_seconds_count", phase="Loading") == 1
    assert board.value("queue_wait_seconds_sum", job_namespace="team-a") == 600
    assert board.value("queue_wait_seconds_count", job_namespace="team-a") == 1


def test_how_long_the_longest_in_a_state_is_there_survives_a_restart() -> None:
    board = Board(now=0)
    board.tell(Told("a", created=-5000), "Preparing", startTime=at(-4000))
    board.tell(Told("b", created=-5000), "Preparing", startTime=at(-3000))
    board.tell(Told("c", created=-9000), "Complete", completionTime=at(-1))
    assert board.value("oldest_timestamp_seconds", job_namespace="team-a", state="Preparing") == BORN - 4000
    assert board.value("oldest_timestamp_seconds", job_namespace="team-a", state="Complete") is None


def test_a_job_of_the_same_name_is_another_one() -> None:
    board = Board()
    board.tell(Told(uid="first"), "Failed", conditions=failed("Hung"), completionTime=at(3))
    board.tell(Told(uid="second", created=10), "Running", attempts=[run(started=11)])
    assert board.value("jobs", state="Failed", reason="Hung") is None
    assert board.value("job_info", job_namespace="team-a", job_name="bot", profile="", state="Running") == 1
    assert board.value("namespace_jobs", job_namespace="team-a", state="Running") == 1


def ended_pod(
    uid: str, read: int, written: int, *, finished: float = 50, owner: str = "uid-0", job: str = "bot"
) -> Object:
    said = TerminationMessage(read_bytes=read, written_bytes=written).encode().decode()
    ended = {"exitCode": 0, "startedAt": at(1), "finishedAt": at(finished), "message": said}
    meta = {
        "name": uid,
        "namespace": "team-a",
        "uid": uid,
        "creationTimestamp": at(0),
        "labels": {"finetune.dev/job-name": job},
        "ownerReferences": [{"kind": "Job", "uid": owner, "controller": True}],
    }
    status = {"phase": "Succeeded", "containerStatuses": [{"name": CONTAINER, "state": {"terminated": ended}}]}
    return {"metadata": meta, "status": status}


def test_bytes_are_counted_once_for_each_pod() -> None:
    board, job = Board(), Told()
    board.tell(job, "Running", attempts=[run(started=1)])
    for _ in range(2):
        board.metrics.note_pod(ended_pod("a", 1000, 50))
    board.metrics.note_pod(ended_pod("b", 700, 0))
    board.metrics.note_pod(ended_pod("of an earlier operator", 9000, 9000, finished=-5))
    board.metrics.note_pod(ended_pod("of a job that is gone", 3, 4, job="gone"))
    board.metrics.note_pod(ended_pod("of a Job that somebody else made", 2**53, 2**53, owner="forged"))
    result = {"uri": "s3://b/k/", "manifestSHA256": "", "sizeBytes": 300}
    board.tell(job, "Complete", attempts=[run(started=1)], result=result, completionTime=at(9))
    told = {d: board.value("storage_bytes_total", job_namespace="team-a", direction=d) for d in DIRECTIONS}
    assert told == {"read": 1700, "written": 50, "published": 300}
    assert board.value("storage_bytes_total", job_namespace="other", direction="written") is None


def test_a_pod_that_runs_or_was_killed_tells_no_bytes() -> None:
    board = Board()
    board.tell(Told(), "Running", attempts=[run(started=1)])
    running, killed = ended_pod("a", 1, 1), ended_pod("b", 1, 1)
    running["status"]["containerStatuses"][0]["state"] = {"running": {"startedAt": at(1)}}
    killed["status"]["containerStatuses"][0]["state"]["terminated"]["message"] = ""
    for pod in (running, killed):
        board.metrics.note_pod(pod)
    assert board.value("storage_bytes_total", job_namespace="team-a", direction="read") == 0


def test_of_many_budgets_those_are_told_of_which_most_is_spent() -> None:
    board = Board()
    accounts = [("p", f"team-{number}", Account(1000.0, float(number), 1.0, START)) for number in range(1000)]
    board.metrics.accounts = lambda: accounts
    assert board.value("budget_spent_gpu_hours", profile="p", job_namespace="team-999") == 999
    assert board.value("budget_gpu_hours", profile="p", job_namespace="team-999") == 1000
    assert board.value("budget_expected_gpu_hours", profile="p", job_namespace="team-999") == 1
    assert board.value("budget_spent_gpu_hours", profile="p", job_namespace="team-0") is None
    assert board.series("budget_") == 3 * ACCOUNTS
    board.metrics.accounts = list
    assert board.series("budget_") == 0


ODD: list[Object] = [
    {"state": "Running", "attempts": [{"job": "no number"}]},
    {"state": "Running", "attempts": [run(startTime="yesterday")]},
    {"state": "Running", "attempts": [run(gpus="many", startTime=at(1))]},
    {"state": "Complete", "completionTime": "0000-00-00T00:00:00Z"},
    {"state": "Failed", "conditions": [{"status": "True"}]},
    {"state": "Running", "trainerStatus": {"metrics": [{"name": "loss"}]}},
    {"state": "Running", "trainerStatus": "fine"},
    {"state": ["Running"]},
]


@pytest.mark.parametrize("status", ODD)
def test_a_status_of_somebody_elses_making_is_not_counted_and_disturbs_nobody(status: Object) -> None:
    board = Board()
    odd = Told("odd").raw("Running", 1, {})
    odd["status"] = status
    board.metrics.note(odd)
    board.tell(Told("fine"), "Running", attempts=[run(started=1)])
    assert board.value("jobs", state="Running", reason="") == 1


def test_words_that_are_not_ours_become_one_label() -> None:
    board = Board()
    before = board.series()
    for number in range(100):
        ended = run(started=1, ended=2, outcome=f"Outcome{number}", reason=f"Reason{number}")
        conditions = [{"type": "Running", "status": "False", "reason": f"Reason{number}", "message": ""}]
        board.tell(Told(f"j-{number}"), f"State{number}", attempts=[ended], conditions=conditions)
    assert board.value("jobs", state="other", reason="") == 100
    assert board.value("attempts_ended_total", outcome="other", reason="") == 100
    assert board.series() - before < 20


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["state", "attempts", "trainerStatus", "conditions", "number", "startTime", "metrics"]),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_no_status_ends_the_look_at_everybodys(status: Any) -> None:
    raw = Told().raw("Running", 1, {})
    raw["status"] = status
    board = Board()
    board.metrics.note(raw)
    board.tell(Told("fine"), "Running")
    assert board.value("jobs", state="Running", reason="") is not None
