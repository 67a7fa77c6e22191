"""A profile's defaults and locks: what they fill, what they give way to, and what a job may not say otherwise."""

from typing import Any

import pytest

from finetune_api.defaults import with_defaults
from finetune_api.failures import Reason
from finetune_api.job import parse
from finetune_api.policy import judge
from finetune_api.profile import FineTuneProfile, FineTuneProfileSpec
from finetune_api.support import unsupported_profile
from support.manifests import job_manifest
from support.world import World, make_job, make_profile, started


def filled(defaults: dict[str, Any], **spec: Any) -> Any:
    return with_defaults(parse(job_manifest(**spec)), defaults).spec


@pytest.mark.parametrize(
    ("defaults", "said", "expected"),
    [
        ({"training": {"maxLength": 4096}}, {}, {"training": {"maxLength": 4096}}),
        ({"training": {"seed": 7}}, {"training": {"epochs": 2}}, {"training": {"epochs": 2, "seed": 7}}),
        # What is said holds, though it is what the API would assume anyway.
        ({"training": {"maxLength": 4096}}, {"training": {"maxLength": 2048}}, {"training": {"maxLength": 2048}}),
        ({"training": {"maxSteps": 100}}, {"training": {"epochs": 3}}, {"training": {"epochs": 3}}),
        ({"training": {"epochs": None, "seed": 7}}, {}, {"training": {"seed": 7}}),
        ({"validation": {"fraction": 0.05}}, {}, {"validation": {"fraction": 0.05}}),
        (
            {"validation": {"fraction": 0.05}},
            {"validation": {"datasets": [{"name": "v", "uri": "s3://data/v"}]}},
            {"validation": {"datasets": [{"name": "v", "uri": "s3://data/v"}]}},
        ),
        (
            {"credentials": {"serviceAccountName": "tuner"}},
            {"credentials": {"secretRef": {"name": "s"}}},
            {"credentials": {"secretRef": {"name": "s"}}},
        ),
        ({"tuning": {"type": "QLoRA", "lora": {"rank": 8}}}, {}, {"tuning": {"type": "QLoRA", "lora": {"rank": 8}}}),
        (
            {"tuning": {"type": "QLoRA", "lora": {"rank": 8}}},
            {"tuning": {"type": "DoRA", "lora": {"alpha": 4}}},
            {"tuning": {"type": "DoRA", "lora": {"rank": 8, "alpha": 4}}},
        ),
        ({"tuning": {"lora": {"rank": 8}}}, {"tuning": {"type": "Full"}}, {"tuning": {"type": "Full"}}),
        # Who writes `lora` means LoRA: the API server fills that in, too.
        ({"tuning": {"type": "Freeze"}}, {"tuning": {"lora": {"rank": 4}}}, {"tuning": {"lora": {"rank": 4}}}),
        ({"checkpoint": {"keep": 5}}, {"checkpoint": {"keep": 2}}, {"checkpoint": {"keep": 2}}),
        ({"evaluation": {"metrics": ["Loss"]}}, {"evaluation": {"metrics": []}}, {"evaluation": {"metrics": []}}),
        (
            {"queue": {"name": "all"}},
            {"queue": {"priorityClassName": "low"}},
            {"queue": {"name": "all", "priorityClassName": "low"}},
        ),
    ],
)
def test_a_job_has_what_it_leaves_out(defaults: dict[str, Any], said: dict[str, Any], expected: dict[str, Any]) -> None:
    assert filled(defaults, **said) == parse(job_manifest(**expected)).spec


LENGTH = {"locked": ["training.maxLength"], "defaults": {"training": {"maxLength": 4096}}}
RANK = {"locked": ["tuning.lora.rank"], "defaults": {"tuning": {"lora": {"rank": 8}}}}
STAGES = [{"name": "a"}, {"name": "b", "training": {"maxLength": 64}}]


@pytest.mark.parametrize(
    ("profile", "said", "problem"),
    [
        (LENGTH, {}, None),
        (LENGTH, {"training": {"maxLength": 4096, "epochs": 2}}, None),
        (
            LENGTH,
            {"training": {"maxLength": 8192}},
            "spec.training.maxLength: found 8192; profile 'p' locks it to 4096",
        ),
        (LENGTH, {"stages": STAGES}, "spec.stages[1].training.maxLength: found 64; profile 'p' locks it to 4096"),
        # Without a default it is the API's own.
        ({"locked": ["training.seed"]}, {"training": {"seed": 1}}, "found 1; profile 'p' locks it to 42"),
        ({"locked": ["test"]}, {"test": {"fraction": 0.1}}, "locks it to nothing: leave it out"),
        (
            {"locked": ["training.maxSteps"], "defaults": {"training": {"maxSteps": 9}}},
            {"training": {"epochs": 3}},
            "spec.training.maxSteps: found nothing; profile 'p' locks it to 9",
        ),
        (RANK, {"tuning": {"type": "DoRA"}}, None),
        (RANK, {"tuning": {"type": "Full"}}, None),
        (RANK, {"tuning": {"type": "QLoRA", "lora": {"rank": 9}}}, "spec.tuning.lora.rank: found 9"),
        ({"locked": ["tuning.type"]}, {"tuning": {"type": "Full"}}, 'found "Full"; profile \'p\' locks it to "LoRA"'),
        ({"locked": ["distribution"]}, {"distribution": {"workers": 1}}, None),
        ({"locked": ["distribution"]}, {"distribution": {"workers": 2}}, 'spec.distribution: found {"workers": 2,'),
    ],
)
def test_a_locked_field_is_what_the_profile_says(profile: dict[str, Any], said: Any, problem: str | None) -> None:
    found = judge(parse(job_manifest(**said)), FineTuneProfile.model_validate(make_profile("p", **profile)))
    assert len(found) == (problem is not None)
    assert problem is None or problem in str(found[0])


@pytest.mark.parametrize(
    ("profile", "problem"),
    [
        ({"defaults": {"training": {"maxLenght": 1}}}, "spec.defaults.training.maxLenght: this field does not exist"),
        ({"defaults": {"training": {"maxLength": 1}}}, "spec.defaults.training.maxLength: found 1"),
        ({"defaults": {"tuning": {"type": "Full", "lora": {}}}}, "spec.defaults.tuning: lora is allowed only where"),
        ({"defaults": {"profile": "other"}}, "spec.defaults.profile: found 'other'; it is a job's own"),
        ({"defaults": {"runPolicy": {"suspend": True}}}, "spec.defaults.runPolicy.suspend: found True"),
        ({"defaults": {"datasets": [{"name": "d", "uri": "s3://d-d/", "template": "x" * 4000}] * 9}}, "at most 32768"),
        ({"locked": ["training.maxLenght"]}, "spec.locked[0]: found 'training.maxLenght'; it must be a path"),
        ({"locked": ["datasets.uri"]}, "datasets has no members that can be locked"),
        ({"locked": ["output.uri"]}, "every job must say it: give it a value in defaults"),
        ({"locked": ["runPolicy.suspend"]}, "it is a job's own"),
    ],
)
def test_a_profile_that_cannot_be_meant_is_refused(profile: dict[str, Any], problem: str) -> None:
    found = unsupported_profile(FineTuneProfileSpec.model_validate({"image": "i", **profile}))
    assert len(found) == 1
    assert problem in str(found[0])


def run_config(world: World, name: str) -> str:
    text: str = world.objects["ConfigMap", name]["data"]["run.json"]
    return text


async def test_pods_get_the_defaults_and_keep_them_when_the_profile_changes() -> None:
    """Data were prepared for them, and checkpoints are resumed only under the same spec."""
    world = World(make_job().build())
    world.profiles = [make_profile(defaults={"training": {"maxLength": 64}, "runPolicy": {"maxAttempts": 9}})]
    await started(world)
    [attempt] = world.status.attempts
    assert (attempt.profile, attempt.profile_generation, attempt.gpus) == ("laptop", 1, 1)
    before = world.status
    world.profiles = [
        make_profile(
            defaults={"training": {"maxLength": 128}, "runPolicy": {"maxAttempts": 1}},
            locked=["training.maxLength"],
            limits={"maxActiveDeadlineSeconds": 1},
            image="registry.example/trainer:2",
        )
    ]
    world.profiles[0]["metadata"]["generation"] = 2
    world.later(60)
    await world.settle()
    # What runs is not altered, not even by a shorter deadline.
    assert world.status == before
    world.fail("support-bot-0", Reason.NODE_LOST)
    world.profiles[0]["spec"]["limits"] = {}
    await world.settle()
    world.later(60)
    await world.settle()
    assert [(a.number, a.profile_generation) for a in world.status.attempts] == [(0, 1), (1, 2)]
    for name in ("support-bot-prepare", "support-bot-0", "support-bot-1"):
        assert '"maxLength": 64' in run_config(world, name)
    assert '"registry.example/trainer:2"' in run_config(world, "support-bot-1")


async def test_defaults_that_do_not_go_with_a_job_refuse_it() -> None:
    world = World(make_job().with_spec(distribution={"workers": 1}).build())
    world.profiles = [make_profile(defaults={"distribution": {"minWorkers": 2, "workers": 2}})]
    await world.settle()
    text = "minWorkers must not be larger than workers; this is with the defaults of profile 'laptop'"
    assert (world.state, world.created) == ("Failed", [])
    assert text in (world.status.message or "")
