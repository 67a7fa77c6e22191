"""What the webhook says of objects, by its pure part."""

import copy
import datetime
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator.review import Malformed, Request, Verdict, answer, judge_job, judge_profile, uses
from support.manifests import job_manifest
from support.world import make_profile

NOW = datetime.datetime(2026, 3, 10, tzinfo=datetime.UTC)
USER = {"username": "alice", "groups": ["team-a"]}


def review(new: Any, old: Any = None, **members: Any) -> dict[str, Any]:
    request = {
        "uid": "u-1",
        "kind": {"group": "finetune.dev", "version": "v1alpha1", "kind": new["kind"]},
        "operation": "UPDATE" if old else "CREATE",
        "namespace": new["metadata"].get("namespace", ""),
        "name": new["metadata"].get("name", ""),
        "userInfo": USER,
        "object": new,
        "oldObject": old,
        **members,
    }
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}


def request(new: Any, old: Any = None, **members: Any) -> Request:
    return Request.read(review(new, old, **members))


def profile(**spec: Any) -> dict[str, Any]:
    made = make_profile("small", default=True)
    return made | {"spec": made["spec"] | spec}


def job(**spec: Any) -> dict[str, Any]:
    return job_manifest("bot", "team-a", **spec)


def test_a_good_job_is_allowed() -> None:
    verdict = judge_job(request(job()), [profile()], NOW)
    assert verdict == Verdict()
    assert answer(request(job()), verdict)["response"] == {"uid": "u-1", "allowed": True}


def test_a_spec_that_cannot_run_is_refused_with_its_field() -> None:
    verdict = judge_job(request(job(baseModel={"uri": "hf://org/name"})), [profile()], NOW)
    status = answer(request(job()), verdict)["response"]["status"]
    assert (status["code"], status["reason"]) == (422, "Invalid")
    assert "spec.baseModel.uri: found 'hf://org/name'; this version supports s3:// only" in status["message"]


def test_what_the_profile_does_not_allow_is_forbidden_with_what_it_does() -> None:
    raw = job(distribution={"workers": 4})
    verdict = judge_job(request(raw), [profile(limits={"maxWorkers": 2})], NOW)
    status = answer(request(raw), verdict)["response"]["status"]
    assert (status["code"], status["reason"]) == (403, "Forbidden")
    assert "spec.distribution.workers: found 4; profile 'small' allows at most 2" in status["message"]


def test_a_job_is_judged_with_the_defaults_of_its_profile() -> None:
    locking = profile(defaults={"training": {"maxLength": 512}}, locked=["training.maxLength"])
    assert judge_job(request(job()), [locking], NOW) == Verdict()
    (problem,) = judge_job(request(job(training={"maxLength": 1024})), [locking], NOW).problems
    assert str(problem) == "spec.training.maxLength: found 1024; profile 'small' locks it to 512"
    gpus = profile(defaults={"distribution": {"workers": 3}})
    (problem,) = judge_job(request(job()), [gpus], NOW).problems
    assert str(problem).startswith("spec.training.globalBatchSize: found 16; it must be a multiple of the 3 processes")


def test_a_profile_that_comes_later_is_worth_a_warning() -> None:
    verdict = judge_job(request(job(profile="big")), [], NOW)
    assert verdict.problems == ()
    (warning,) = answer(request(job()), verdict)["response"]["warnings"]
    assert "'big' does not exist" in warning


def test_a_budget_that_is_spent_is_worth_a_warning() -> None:
    since = "2026-03-01T00:00:00Z"
    spent = {"since": since, "until": "2026-03-09T00:00:00Z", "gpuSeconds": 36_000}
    broke = profile(budget={"gpuHours": 10})
    assert judge_job(request(job()), [broke], NOW) == Verdict()
    (warning,) = judge_job(request(job()), [broke | {"status": {"usage": {"team-a": spent}}}], NOW).warnings
    assert "10 of 10 GPU-hours are spent; the job waits until 2026-04-01 00:00 UTC" in warning
    elsewhere = broke | {"status": {"usage": {"team-b": spent}}}
    assert judge_job(request(job()), [elsewhere], NOW) == Verdict()


def test_an_update_is_refused_only_for_what_it_makes_wrong() -> None:
    stricter = [profile(limits={"maxWorkers": 2, "maxActiveDeadlineSeconds": 100})]
    old = job(distribution={"workers": 4})
    suspended = job(distribution={"workers": 4}, runPolicy={"suspend": True})
    assert judge_job(request(suspended, old), stricter, NOW).problems == ()
    longer = job(distribution={"workers": 4}, runPolicy={"activeDeadlineSeconds": 101})
    (problem,) = judge_job(request(longer, old), stricter, NOW).problems
    assert str(problem) == "spec.runPolicy.activeDeadlineSeconds: found 101; profile 'small' allows at most 100"


def test_an_update_of_what_was_invalid_before_is_allowed() -> None:
    old = job(baseModel={"uri": "hf://org/name"})
    new = job(baseModel={"uri": "hf://org/name"}, runPolicy={"suspend": True})
    assert judge_job(request(new, old), [profile()], NOW).problems == ()


def test_an_object_that_goes_is_not_held_up() -> None:
    raw = job()
    raw["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:00Z"}
    assert request(raw, job()).leaves
    assert not request(job()).leaves


def test_names_that_the_server_makes_are_no_problem() -> None:
    raw = job()
    del raw["metadata"]["name"]
    raw["metadata"]["generateName"] = "bot-"
    assert judge_job(request(raw), [profile()], NOW).problems == ()


def test_what_a_job_names_is_asked_for_once() -> None:
    tracking = {"wandb": {"project": "p", "secretRef": {"name": "w"}}, "mlflow": {"uri": "https://m"}}
    raw = job(credentials={"secretRef": {"name": "keys"}}, tracking=tracking)
    assert [(use.resource, use.name, use.verbs) for use in uses(request(raw))] == [
        ("secrets", "keys", ("get", "use")),
        ("secrets", "w", ("get", "use")),
    ]
    assert list(uses(request(raw, raw))) == []
    (use,) = uses(request(job(credentials={"serviceAccountName": "tuner"})))
    assert (use.resource, use.verbs) == ("serviceaccounts", ("impersonate", "use"))
    assert str(use.refusal(USER, "team-a")) == (
        "spec.credentials.serviceAccountName: found 'tuner'; 'alice' may name only serviceaccounts in 'team-a' on "
        "which it has the verb impersonate or use"
    )


def test_a_profile_is_judged_by_itself() -> None:
    assert judge_profile(request(profile())) == Verdict()
    (problem,) = judge_profile(request(profile(image=""))).problems
    assert str(problem).startswith("spec.image: found ''")
    # What was wrong before may be changed elsewhere.
    assert judge_profile(request(profile(image="", dataCache="1Gi"), profile(image=""))).problems == ()


def test_many_problems_are_counted() -> None:
    raw = job()
    raw["spec"] |= {f"x{number}": 1 for number in range(40)}
    status = answer(request(raw), judge_job(request(raw), [], NOW))["response"]["status"]
    assert status["message"].count("does not exist") == 16
    assert status["message"].endswith("(and 24 more)")


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"apiVersion": "admission.k8s.io/v1", "request": None},
        {"apiVersion": "admission.k8s.io/v1beta1", "request": review(job())["request"]},
        review(job(), operation="DELETE"),
        review(job(), kind={"kind": "Pod"}),
        review(job(), kind="FineTuneJob"),
        review(job(), object=None),
        review(job(), object={"metadata": None}),
        review(job(), userInfo=None),
    ],
)
def test_what_is_no_review_is_malformed(body: Any) -> None:
    with pytest.raises(Malformed):
        Request.read(body)


@pytest.mark.parametrize("spec", [None, [], "x", {"profile": []}, {"credentials": "x"}])
def test_a_spec_of_no_shape_is_refused_and_breaks_nothing(spec: Any) -> None:
    raw = job() | {"spec": spec}
    verdict = judge_job(request(raw), [profile()], NOW)
    assert verdict.problems
    assert list(uses(request(raw))) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*path, key))


WHOLE = review(job(credentials={"secretRef": {"name": "keys"}}, profile="small"), job())
PLACES = [path for path in places(WHOLE) if path]


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(PLACES), value=JSON)
def test_a_review_with_anything_anywhere_is_answered_or_malformed(path: tuple[Any, ...], value: Any) -> None:
    body = copy.deepcopy(WHOLE)
    parent = body
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    try:
        asked = Request.read(body)
    except Malformed:
        return
    verdict = judge_profile(asked) if asked.kind == "FineTuneProfile" else judge_job(asked, [profile()], NOW)
    list(uses(asked))
    json.dumps(answer(asked, verdict))
