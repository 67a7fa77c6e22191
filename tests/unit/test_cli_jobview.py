"""What `list`, `get` and `run` print of a job."""

from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_cli import jobview

NOW = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)


def job(name: str = "bot", **status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "team-a", "creationTimestamp": "2026-01-02T11:00:00Z"},
        "spec": {
            "baseModel": {"uri": "s3://models/small/"},
            "datasets": [{"name": "a", "uri": "s3://data/a/"}],
            "method": {"type": "SFT"},
            "tuning": {"type": "LoRA"},
            "distribution": {"workers": 2, "gpusPerWorker": 1},
        },
        "status": status,
    }


def condition(kind: str, reason: str = "R", message: str = "") -> dict[str, Any]:
    changed = "2026-01-02T11:59:18Z"
    return {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": changed}


TRAINER = {
    "progressPercentage": 16,
    "estimatedRemainingSeconds": 190,
    "step": 40,
    "totalSteps": 250,
    "metrics": [{"name": "loss", "value": "3.21456"}],
}
RESULT = {
    "uri": "s3://out/bot/uid/",
    "manifestSHA256": "0" * 64,
    "sizeBytes": 2048,
    "metrics": {"evalLoss": 2.5, "evalLossBefore": 4.25},
}
RUNNING = job(state="Running", attempts=[{"number": 0}], trainerStatus=TRAINER)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ({}, "Pending"),
        ({"state": "Preparing", "message": "reads the data"}, "Preparing  reads the data"),
        (RUNNING["status"], "Running  step 40/250  (16 %)  loss 3.215  ETA 3m10s"),
        # What the attempt before has reported is not this one's progress.
        (
            {"state": "Running", "attempts": [{"number": 1}], "trainerStatus": {**TRAINER, "attempt": 0}},
            "Running  attempt 2",
        ),
        (
            {"state": "Retrying", "attempts": [{"number": 0}], "trainerStatus": TRAINER, "message": "lost"},
            "Retrying  lost",
        ),
        ({"state": "Failed", "message": "no"}, "Failed  no"),
        ({"state": "Running", "trainerStatus": {"metrics": [{"name": "loss", "value": "nan?"}]}}, "Running  loss nan?"),
    ],
)
def test_a_line_says_what_is_known_now(status: dict[str, Any], text: str) -> None:
    assert jobview.snapshot(job(**status)).text() == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.9, "59s"), (190, "3m10s"), (7500, "2h05m"), (400_000, "4d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert jobview.duration(seconds) == text


def test_list_aligns_columns_and_leaves_unknown_cells_empty() -> None:
    rows = jobview.job_rows([RUNNING, job("new-one"), job("old", state="Complete")], NOW, with_namespace=True)
    assert jobview.table(rows) == [
        "NAMESPACE   NAME      STATE      PROGRESS   LOSS    ETA     ATTEMPTS   AGE",
        "team-a      bot       Running    16 %       3.215   3m10s   1          1h00m",
        "team-a      new-one   Pending                               0          1h00m",
        "team-a      old       Complete   100 %                      0          1h00m",
    ]


def test_get_shows_conditions_attempts_and_result() -> None:
    attempt = {"number": 0, "job": "bot-0", "outcome": "Retryable", "reason": "RankFailed", "exitCode": 76, "rank": 1}
    text = "\n".join(
        jobview.describe(
            job(state="Complete", conditions=[condition("Complete", "Published")], attempts=[attempt], result=RESULT),
            NOW,
        )
    )
    for part in (
        "team-a/bot: Complete",
        "Base model   s3://models/small/",
        "Complete   True     Published   42s",
        "0        Retryable   RankFailed   76     1",
        "bot is complete after 1 attempt",
        "Adapter          s3://out/bot/uid/",
        "evalLossBefore   4.25",
    ):
        assert part in text


def test_a_failed_job_ends_with_reason_and_message() -> None:
    failed = job(conditions=[condition("Failed", "DataInvalid", "data.jsonl line 3: is no JSON")], attemptCount=0)
    assert jobview.outcome(failed) == "Failed"
    assert jobview.result(failed) == ["bot failed after 0 attempts: DataInvalid: data.jsonl line 3: is no JSON"]


def test_a_condition_that_is_not_true_is_no_end() -> None:
    assert jobview.outcome(job(conditions=[{**condition("Complete"), "status": "False"}])) is None


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB")])
def test_sizes(count: int, text: str) -> None:
    assert jobview.size(count) == text


def test_a_job_that_failed_at_a_gate_shows_why_and_what_it_published() -> None:
    why = condition("Failed", "GateNotMet", "evaluation.gates[0]: evalLoss is 2.5; at most 2 is wanted")
    lines = jobview.result(job(state="Failed", conditions=[why], attemptCount=1, result=RESULT))
    assert lines[0] == (
        "bot failed after 1 attempt: GateNotMet: evaluation.gates[0]: evalLoss is 2.5; at most 2 is wanted"
    )
    assert "Adapter          s3://out/bot/uid/" in lines
    assert "evalLoss         2.5" in lines


def test_what_a_user_left_out_is_told_as_such() -> None:
    raw = job()
    raw["spec"] = {"baseModel": {"uri": "s3://models/small/"}, "datasets": [], "distribution": {"workers": 2}}
    lines = "\n".join(jobview.describe(raw, NOW))
    assert "(default) / (default)" in lines
    assert "2 x (default)" in lines
