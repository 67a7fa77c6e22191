"""Who may report: every refusal, and how long a TokenReview is believed."""

import base64
import json
from typing import Any

import pytest

from finetune_operator.cluster import TokenUser
from finetune_operator.progress_auth import (
    Authenticator,
    CurrentAttempt,
    Identity,
    Refused,
    check_pod,
    current_attempt,
    expiry,
)
from finetune_operator.progress_state import JobKey

KEY = JobKey("team-a", "bot")
GOOD = TokenUser("system:serviceaccount:team-a:default", "bot-0-0-abcde", "pod-uid")


def token(expires: float = 10_000.0, name: str = "x") -> str:
    claims = base64.urlsafe_b64encode(json.dumps({"exp": expires, "sub": name}).encode()).decode().rstrip("=")
    return f"e30.{claims}.c2ln"


class Reviews:
    """Answers TokenReviews as it is told to, and counts them."""

    def __init__(self, user: TokenUser | None = GOOD) -> None:
        self.user = user
        self.asked: list[tuple[str, ...]] = []

    async def token_review(self, token: str, audiences: tuple[str, ...]) -> TokenUser | None:
        self.asked.append(audiences)
        return self.user

    async def get_pod(self, namespace: str, name: str) -> dict[str, Any] | None:
        raise AssertionError

    async def get_job(self, namespace: str, name: str) -> dict[str, Any] | None:
        raise AssertionError

    async def patch_trainer_status(
        self,
        namespace: str,
        name: str,
        uid: str,
        trainer_status: dict[str, Any],
        resource_version: str | None = None,
    ) -> bool:
        raise AssertionError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_review_is_believed_for_a_while_and_never_beyond_expiry() -> None:
    reviews, clock = Reviews(), Clock()
    authenticator = Authenticator(reviews, clock=clock, seconds=60.0)
    for now, count in ((0.0, 1), (59.0, 1), (60.0, 2)):
        clock.now = now
        assert await authenticator.identify(KEY, "job-uid", token()) == Identity("job-uid", GOOD.pod_name, GOOD.pod_uid)  # type: ignore[arg-type]
        assert len(reviews.asked) == count
    assert reviews.asked[0] == ("finetune.dev/progress/job-uid",)
    short = token(expires=70.0)
    await authenticator.identify(KEY, "job-uid", short)
    clock.now = 69.0
    assert authenticator.known(KEY, short)
    clock.now = 70.0
    assert authenticator.known(KEY, short) is None


async def test_a_token_that_was_once_good_is_no_strangers() -> None:
    """Its holder pays from the job's bucket also while it is reviewed again, so that strangers of its address cannot
    keep it from reporting."""
    clock = Clock()
    authenticator = Authenticator(Reviews(), clock=clock, seconds=60.0)
    good, expires = token(expires=200.0), 200.0
    assert not authenticator.familiar(KEY, good)
    await authenticator.identify(KEY, "job-uid", good)
    clock.now = 100.0
    assert authenticator.known(KEY, good) is None
    assert authenticator.familiar(KEY, good)
    assert not authenticator.familiar(JobKey("team-a", "other"), good)
    clock.now = expires
    assert not authenticator.familiar(KEY, good)


async def test_a_review_for_one_job_says_nothing_of_another() -> None:
    reviews = Reviews()
    authenticator = Authenticator(reviews, clock=Clock())
    await authenticator.identify(KEY, "job-uid", token())
    assert authenticator.known(JobKey("team-a", "other"), token()) is None
    await authenticator.identify(KEY, "its-successor", token())
    assert [audience for (audience,) in reviews.asked] == [
        "finetune.dev/progress/job-uid",
        "finetune.dev/progress/its-successor",
    ]


async def test_a_token_without_a_readable_expiry_is_reviewed_each_time() -> None:
    reviews = Reviews()
    authenticator = Authenticator(reviews, clock=Clock())
    for _ in range(3):
        await authenticator.identify(KEY, "job-uid", "opaque")
    assert len(reviews.asked) == 3
    assert len(authenticator) == 0


@pytest.mark.parametrize(
    ("user", "code", "words"),
    [
        (None, 401, "not valid for audience finetune.dev/progress/job-uid"),
        (GOOD._replace(username="system:serviceaccount:team-b:default"), 403, "not a ServiceAccount of team-a"),
        (GOOD._replace(username="admin"), 403, "not a ServiceAccount of team-a"),
        (GOOD._replace(pod_name=None), 403, "bound to no pod"),
        (GOOD._replace(pod_uid=None), 403, "bound to no pod"),
    ],
)
async def test_refused_tokens(user: TokenUser | None, code: int, words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        await Authenticator(Reviews(user), clock=Clock()).identify(KEY, "job-uid", token())
    assert caught.value.code == code


async def test_a_refusal_is_remembered_for_some_seconds_and_does_not_push_out_the_accepted() -> None:
    reviews, clock = Reviews(), Clock()
    authenticator = Authenticator(reviews, clock=clock, limit=10)
    await authenticator.identify(KEY, "job-uid", token())
    reviews.user = None
    for number in range(100):
        for _ in range(2):
            with pytest.raises(Refused):
                await authenticator.identify(KEY, "job-uid", token(name=str(number)))
    assert len(reviews.asked) == 101
    assert len(authenticator) == 11
    assert authenticator.known(KEY, token())
    clock.now = 5.0
    reviews.user = GOOD
    await authenticator.identify(KEY, "job-uid", token(name="99"))


@pytest.mark.parametrize(
    "text", ["", "a.b", "a.b.c", "a.!!.c", "a.bnVsbA.c", "a.W10.c", "a.eyJleHAiOiJ4In0.c", "a.e30.c"]
)
def test_what_is_no_token_has_no_expiry(text: str) -> None:
    assert expiry(text) is None


def job(attempts: list[dict[str, Any]], **conditions: str) -> dict[str, Any]:
    found = [{"type": kind, "status": status} for kind, status in conditions.items()]
    status = {"attempts": attempts, "conditions": found}
    return {"metadata": {"name": "bot", "uid": "job-uid"}, "status": status}


ENDED = {"number": 0, "job": "bot-0", "uid": "zero", "outcome": "Retryable"}
RUNS = {"number": 1, "job": "bot-1", "uid": "one"}


def test_the_current_attempt_is_the_newest_that_runs() -> None:
    assert current_attempt(job([ENDED, RUNS])) == CurrentAttempt("job-uid", 1, "bot-1", "one")
    assert current_attempt(job([RUNS], Complete="False", Running="True")).number == 1


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (job([ENDED, RUNS], Complete="True"), "is finished"),
        (job([RUNS], Failed="True"), "is finished"),
        (job([ENDED]), "no attempt that runs"),
        (job([]), "no attempt that runs"),
        (job([{"number": 0, "job": "bot-0"}]), "no attempt that runs"),
        ({"metadata": {"name": "bot", "uid": "job-uid"}}, "no attempt that runs"),
    ],
)
def test_no_attempt_takes_reports(found: dict[str, Any], words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        current_attempt(found)
    assert caught.value.code == 409


def pod(**changes: Any) -> dict[str, Any]:
    metadata = {
        "name": "bot-1-0-abcde",
        "uid": "pod-uid",
        "labels": {"finetune.dev/job-name": "bot", "finetune.dev/attempt": "1"},
        "ownerReferences": [{"kind": "Job", "name": "bot-1", "uid": "one", "controller": True}],
    }
    phase = changes.pop("phase", "Running")
    return {"metadata": metadata | changes, "status": {"phase": phase}}


IDENTITY = Identity("job-uid", "bot-1-0-abcde", "pod-uid")
ATTEMPT = CurrentAttempt("job-uid", 1, "bot-1", "one")


def test_a_live_pod_of_the_attempt_may_report() -> None:
    check_pod(pod(), IDENTITY, ATTEMPT, "bot")
    check_pod(pod(phase="Pending"), IDENTITY, ATTEMPT, "bot")
    # It has been asked to stop, and saves its checkpoint.
    check_pod(pod(deletionTimestamp="2026-01-01T00:00:00Z"), IDENTITY, ATTEMPT, "bot")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "does not exist any more"),
        (pod(uid="another"), "does not exist any more"),
        (
            pod(labels={"finetune.dev/job-name": "bot", "finetune.dev/attempt": "0"}),
            "attempt 0 of bot; only pods of attempt 1",
        ),
        (pod(labels={"finetune.dev/job-name": "bot", "finetune.dev/attempt": "prepare"}), "attempt prepare of bot"),
        (pod(labels={"finetune.dev/job-name": "cat", "finetune.dev/attempt": "1"}), "attempt 1 of cat"),
        (pod(labels=None), "attempt None of None"),
        (pod(ownerReferences=[]), "not owned by Job bot-1"),
        (pod(ownerReferences=[{"kind": "Job", "uid": "one"}]), "not owned by Job bot-1"),
        (pod(ownerReferences=[{"kind": "Job", "uid": "zero", "controller": True}]), "not owned by Job bot-1"),
        (pod(ownerReferences=[{"kind": "ReplicaSet", "uid": "one", "controller": True}]), "not owned by Job bot-1"),
        (pod(phase="Failed"), "finished"),
        (pod(phase="Succeeded"), "finished"),
    ],
)
def test_other_pods_may_not(found: dict[str, Any] | None, words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        check_pod(found, IDENTITY, ATTEMPT, "bot")
    assert caught.value.code == 403
