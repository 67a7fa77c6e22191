"""An error about one object stays with it: what the job says, what is logged and counted, and that all else goes on."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from finetune_api.budget import account
from finetune_api.profile import FineTuneProfile
from finetune_operator import nettest
from finetune_operator.budgets import Budgets
from finetune_operator.cluster import ApiError
from finetune_operator.containment import Containment, named, of_everybody
from finetune_operator.nettesting import NetworkTests
from finetune_operator.tls import TlsError
from finetune_operator.workqueue import Schedule
from support.poison import Stage, put, wrecked
from support.town import Operator, Town, honest, stages
from support.world import START, make_job, make_profile, merge

Object = dict[str, Any]


async def stage(name: str) -> Stage:
    return next(one for one in await stages() if one.name == name)


async def town(name: str, *path: str | int, value: object = None) -> Town:
    """A sound neighbour, and a job at this time of its life with one value of its status replaced."""
    made = wrecked(await stage(name), [])
    made["FineTuneJob"][0] = put(made["FineTuneJob"][0], path, value) if path else made["FineTuneJob"][0]
    return Town(made, wrecked(await honest(), []))


def condition(town: Town, kind: str, namespace: str = "team-a") -> Object:
    job = town.objects["FineTuneJob", namespace, "bot"]
    return next(c for c in job["status"]["conditions"] if c["type"] == kind)


async def test_a_job_that_cannot_be_read_says_so_and_goes_on_when_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = await town("runs", "status", "attempts", 0, "gpus", value=10**40)
    operator, job = Operator(place, tmp_path), place.objects["FineTuneJob", "team-a", "bot"]
    before = [c for c in job["status"]["conditions"] if c["type"] != "Stalled"]
    for _ in range(3):
        await operator.hear()
        await operator.look()
        await operator.work()
    stalled = condition(place, "Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "InternalError")
    assert "attempts[0].gpus: found a number of 133 bits" in stalled["message"]
    assert "goes on when the cause is gone" in stalled["message"]
    assert job["status"]["message"] == stalled["message"]
    assert job["status"]["state"] == "Running"
    assert [c for c in job["status"]["conditions"] if c["type"] != "Stalled"] == before
    [event] = place.events
    assert (event["reason"], event["type"], event["message"]) == ("InternalError", "Warning", stalled["message"])
    errors = [r for r in caplog.records if r.exc_info and getattr(r, "job", "") == "bot" and "reconcile" in r.message]
    assert len(errors) == 1, "the stack is told once"
    assert 'finetune_operator_internal_errors_total{where="reconcile"}' in operator.scraped()
    # Somebody mends it.
    job["status"]["attempts"][0]["gpus"] = 1
    await operator.look()
    await operator.work()
    assert condition(place, "Stalled")["status"] == "False"
    assert "goes on when the cause is gone" not in job["status"]["message"]
    assert condition(place, "Stalled", "honest")["status"] == "False"


async def test_a_status_that_takes_no_change_is_told_in_an_event_and_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Strict(Town):
        async def patch_status(self, namespace: str, *args: Any) -> Object | None:
            if namespace == "team-a":
                raise ApiError(422, "Invalid", "status.attempts[0].gpus: Invalid value")
            return await super().patch_status(namespace, *args)

    place = await town("runs", "status", "attempts", 0, "gpus", value=10**40)
    place.__class__ = Strict
    operator = Operator(place, tmp_path)
    for _ in range(3):
        await operator.look()
        await operator.work()
    assert [event["reason"] for event in place.events] == ["InternalError"]
    assert "InternalError is not in the job's status: 422 Invalid" in caplog.text


def test_a_key_that_fails_comes_back_later_each_time_and_others_do_not_wait_for_it() -> None:
    queue: Schedule[str] = Schedule(jitter=lambda: 1.0)
    pauses = []
    for _ in range(12):
        queue.add("bad")
        assert queue.take(0.0) == "bad"
        pauses.append(queue.done("bad", 0.0, failed=True))
    assert pauses[:4] == [1, 2, 4, 8]
    assert pauses[-1] == 300
    queue.add("good")
    assert queue.take(0.5) == "good"


async def test_children_that_cannot_be_read_are_no_proof_that_there_is_nothing_to_do(tmp_path: Path) -> None:
    made = wrecked(await stage("runs"), [])
    [pod] = [one for one in made["Pod"] if one["metadata"]["name"].startswith("bot-0")]
    pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"] = "0000-01-01T00:00:00Z"
    place = Town(made, wrecked(await honest(), []))
    operator = Operator(place, tmp_path)
    await operator.look()
    assert len(operator.controller._queue) == 1
    await operator.work()
    assert condition(place, "Stalled")["reason"] == "InternalError"


@pytest.mark.parametrize("raw", [{}, {"metadata": None}, {"metadata": {"name": 1}}, {"metadata": []}, None, [], "x"])
async def test_handlers_take_whatever_they_are_given(raw: Any, tmp_path: Path) -> None:
    operator = Operator(await town("new"), tmp_path)
    assert named(raw) == ("", "")
    for handler in (operator.controller.on_job, operator.controller.on_child, operator.controller.on_pod):
        for kind in (None, "ADDED", "DELETED"):
            handler(kind, raw)


@pytest.mark.parametrize(
    ("error", "whose"),
    [
        (ApiError(0, "Unreachable", ""), True),
        (ApiError(403, "Forbidden", ""), True),
        (ApiError(503, "ServiceUnavailable", ""), True),
        (TlsError("no key"), True),
        (FileNotFoundError("ca.crt"), True),
        (ApiError(422, "Invalid", ""), False),
        (OverflowError(), False),
        (RecursionError(), False),
    ],
)
def test_what_is_about_everybody_passes_and_the_rest_stays(error: Exception, whose: bool) -> None:
    assert of_everybody(error) is whose
    heard: list[str] = []
    contained = Containment(heard.append)
    if whose:
        with pytest.raises(type(error)), contained.about("resync", "n", "j"):
            raise error
        assert heard == []
        return
    with contained.about("resync", "n", "j") as outcome:
        raise error
    assert (outcome.error, heard) == (error, ["resync"])


def test_what_ends_the_process_is_never_kept_from_it() -> None:
    with pytest.raises(asyncio.CancelledError), Containment().about("watch", "n", "j"):
        raise asyncio.CancelledError


class Ledger:
    """Profiles, and a server that takes no figure of some namespaces."""

    def __init__(self, *names: str) -> None:
        self.profiles = {name: make_profile(name, budget={"gpuHours": 10}) for name in names}
        self.refused: set[str] = set()
        self.asked = 0

    async def list_profiles(self) -> list[Object]:
        return list(self.profiles.values())

    async def patch_profile_status(self, name: str, patch: Object) -> bool:
        self.asked += 1
        if self.refused & {name, *patch["usage"]}:
            raise ApiError(422, "Invalid", "status.usage: Invalid value")
        assert all(0 <= one["gpuSeconds"] < 2**63 for one in patch["usage"].values())
        self.profiles[name]["status"] = merge(self.profiles[name].get("status", {}), patch)
        return True

    def spent(self, profile: str, namespace: str) -> int | None:
        usage = self.profiles[profile].get("status", {}).get("usage", {}).get(namespace)
        return usage and usage["gpuSeconds"]


def run_of(namespace: str, profile: str, gpus: int, remaining: int | None = None) -> Object:
    attempt = {"number": 0, "job": "j-0", "profile": profile, "gpus": gpus, "startTime": "2026-03-01T12:00:00Z"}
    told = {"attempt": 0} | ({} if remaining is None else {"estimatedRemainingSeconds": remaining})
    return make_job("j").with_meta(namespace=namespace).build() | {
        "status": {"attempts": [attempt], "trainerStatus": told}
    }


async def settled(ledger: Ledger, budgets: Budgets, *jobs: Object) -> list[tuple[str, str]]:
    now = START.replace(hour=13)
    await budgets.begin()
    for job in jobs:
        budgets.look(job, now)
    return await budgets.settle(now)


async def test_a_figure_that_no_status_holds_is_clamped_and_told_and_the_others_are_written() -> None:
    ledger, heard = Ledger("p", "q"), list[str]()
    budgets = Budgets(ledger, Containment(heard.append))  # type: ignore[arg-type]
    jobs = run_of("bad", "p", 10**15, 2**53), run_of("good", "p", 2), run_of("good", "q", 3)
    over = await settled(ledger, budgets, *jobs)
    assert ledger.spent("p", "bad") == 2**53
    assert (ledger.spent("p", "good"), ledger.spent("q", "good")) == (7200, 10800)
    assert heard == ["budgets"]
    assert over == [("bad", "j")]
    # It stays so: the next look reads what this one wrote.
    await settled(ledger, budgets, *jobs)
    assert ledger.spent("p", "bad") == 2**53
    found = account(FineTuneProfile.model_validate(ledger.profiles["p"]), "bad", START)
    assert found
    assert found.spent > found.allowed


async def test_a_namespace_whose_figures_are_refused_keeps_no_other_from_being_written() -> None:
    ledger = Ledger("p", "q")
    ledger.refused = {"bad"}
    budgets = Budgets(ledger)  # type: ignore[arg-type]
    jobs = [run_of(name, profile, 2) for name in ("a", "bad", "c") for profile in ("p", "q")]
    assert await settled(ledger, budgets, *jobs) == []
    assert [ledger.spent(profile, name) for profile in "pq" for name in ("a", "bad", "c")] == [7200, None, 7200] * 2
    # What was not written of a job that is gone since is counted when it can be.
    budgets.gone(jobs[2], START.replace(hour=13))
    ledger.refused = set()
    await settled(ledger, budgets)
    assert ledger.spent("p", "bad") == 7200


async def test_a_profile_that_takes_nothing_keeps_no_other_from_being_settled() -> None:
    ledger = Ledger("a", "b", "c")
    ledger.refused = {"b"}
    budgets = Budgets(ledger)  # type: ignore[arg-type]
    await settled(ledger, budgets, *(run_of("n", name, 1) for name in "abc"))
    assert [ledger.spent(name, "n") for name in "abc"] == [3600, None, 3600]


async def test_a_job_that_cannot_be_read_keeps_no_other_from_being_counted() -> None:
    ledger = Ledger("p")
    broken = run_of("bad", "p", 1) | {"status": {"completionTime": "yesterday", "attempts": 7}}
    await settled(ledger, Budgets(ledger), broken, {"metadata": None}, run_of("good", "p", 1))  # type: ignore[arg-type]
    assert ledger.spent("p", "good") == 3600


async def test_a_profile_whose_network_test_fails_keeps_no_other_from_its_own() -> None:
    asked: list[str] = []
    both = asyncio.Event()

    class Cluster:
        async def list_profiles(self) -> list[Object]:
            return [make_profile(name, networkPolicy=True) for name in ("bad", "good")]

        async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
            asked.append(name)
            if name == nettest.name_of("bad"):
                return {"metadata": {}, "status": {"conditions": 7}}
            both.set()
            return {"metadata": {}}

    tests = NetworkTests(Cluster(), "finetune-system")  # type: ignore[arg-type]
    running = asyncio.create_task(tests.run())
    await asyncio.wait_for(both.wait(), 30)
    assert asked[:2] == [nettest.name_of("bad"), nettest.name_of("good")]
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_an_authority_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    operator = Operator(await town("new"), tmp_path)
    (tmp_path / "ca.crt").write_bytes(b"\xff\xfe")
    with pytest.raises(TlsError, match="must be PEM"):
        await operator.controller._read_authority()
