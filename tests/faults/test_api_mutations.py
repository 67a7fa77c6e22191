"""Manifests that were changed somewhere, by the CRD's own schema: what is not refused has an effect, and what was put
back is as it was."""

import copy
import json
from typing import TYPE_CHECKING, Any

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings

from finetune_api import job
from finetune_api.failures import Reason
from finetune_api.job import FineTuneJobSpec
from finetune_cli.lint import problems
from support.api import Answer
from support.manifests import job_manifest
from support.mutating import Mutation, mutations
from support.operating import GROUP, Scene
from support.playing import at_rest, nudged
from support.scenarios import create, difference, left
from support.world import World, make_profile

if TYPE_CHECKING:
    from support.playing import Theatre
    from support.tally import Tally

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
DATA = [{"name": "tickets", "uri": "s3://data/tickets.jsonl", "columns": {"prompt": "q", "completion": "a"}}]
SEEDS: dict[str, dict[str, Any]] = {
    "plain": job_manifest(runPolicy={"maxAttempts": 2}),
    "full": job_manifest(
        datasets=DATA,
        profile="laptop",
        validation={"fraction": 0.1},
        tuning={"type": "LoRA", "lora": {"rank": 8, "alpha": 16}},
        training={"epochs": 2, "learningRate": 1e-4, "globalBatchSize": 16},
        evaluation={"gates": [{"metric": "evalLoss", "operator": "AtMost", "value": 3}]},
        checkpoint={"interval": {"type": "Steps", "steps": 10}, "keep": 3},
        distribution={"workers": 2},
        credentials={"secretRef": {"name": "s3"}},
        queue={"name": "team-a"},
        runPolicy={"maxAttempts": 2, "activeDeadlineSeconds": 5000, "ttlSecondsAfterFinished": 50},
    ),
    "staged": job_manifest(
        datasets=DATA,
        stages=[{"name": "one", "training": {"epochs": 1}}, {"name": "two", "datasets": DATA}],
        runPolicy={"maxAttempts": 2},
    ),
}


def refusal(manifest: dict[str, Any]) -> str:
    """What the models say against it; empty: nothing."""
    try:
        job.parse(manifest)
    except pydantic.ValidationError as error:
        return str(error)
    return ""


async def life(manifest: dict[str, Any]) -> list[Any]:
    """Everything that an operator makes of a job, in a life with a failure, a suspend, and time that goes by. Its last
    member says why, where it was refused."""
    raw = copy.deepcopy(manifest)
    raw["metadata"] |= {
        "uid": "job-uid",
        "generation": 1,
        "resourceVersion": "1",
        "creationTimestamp": "2026-03-01T12:00:00Z",
    }
    world = World(raw, [make_profile()])
    told: list[Any] = []

    async def settle() -> None:
        after = await world.settle()
        objects = [world.objects[key] for key in sorted(world.objects) if key[0] != "Pod"]
        told.append([world.gone, None if world.gone else raw_status(world), after, without_hash(objects)])

    await settle()
    if "support-bot-prepare" in world.names("Job"):
        world.run("support-bot-prepare")
        world.prepared()
        await settle()
    number = 0
    while f"support-bot-{number}" in world.names("Job") and number < 3:
        world.run(f"support-bot-{number}")
        await settle()
        if number == 2:
            world.complete("support-bot-2")
        else:
            world.fail(f"support-bot-{number}", Reason.HUNG)
        await settle()
        world.later(60)
        await settle()
        number += 1
    return told


def raw_status(world: World) -> Any:
    return json.loads(json.dumps(world.job.get("status", {})))


def without_hash(objects: list[Any]) -> Any:
    """The hash of the spec changes with it: that alone is no effect."""
    kept = copy.deepcopy(objects)
    for item in kept:
        for key, text in (item.get("data") or {}).items():
            config = json.loads(text) if text[:1] == "{" else {}
            config.pop("specSha256", None)
            item["data"][key] = config or text
    return kept


async def judge(seed: dict[str, Any], changed: Mutation) -> str:
    """What is wrong with how the change was taken; empty: nothing."""
    if said := refusal(changed.manifest):
        return "" if said else "refused without a word"
    if job.parse(changed.manifest).spec == job.parse(seed).spec:
        return ""  # It says the same in other words.
    before, after = await life(seed), await life(changed.manifest)
    if before == after:
        return f"{changed}: neither refused nor of any effect"
    status = after[0][1]
    if status and status.get("state") == "Failed" and "spec." not in status["message"]:
        return f"{changed}: refused without naming its field: {status['message']}"
    return ""


def changes(seed: dict[str, Any], count: int) -> list[Mutation]:
    """The same ones in every run."""
    chosen: list[Mutation] = []

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(seed))
    def collect(changed: Mutation) -> None:
        chosen.append(changed)

    collect()
    return list({str(changed): changed for changed in chosen}.values())


@pytest.mark.parametrize("name", SEEDS)
async def test_what_is_not_refused_has_an_effect(tally: "Tally", whole: bool, name: str) -> None:
    seed = SEEDS[name]
    results = {str(changed): await judge(seed, changed) for changed in changes(seed, 800 if whole else 15)}
    tally.count("a property of a manifest changed", results)


@pytest.mark.parametrize("name", SEEDS)
async def test_the_server_and_the_models_refuse_the_same(
    theatre: "Theatre", tally: "Tally", whole: bool, name: str
) -> None:
    results: dict[str, str] = {}
    async with theatre.scene() as scene:
        path = scene.path("finetunejobs", api=GROUP)
        for changed in changes(SEEDS[name], 800 if whole else 25):
            manifest = copy.deepcopy(changed.manifest)
            del manifest["metadata"]["namespace"]
            answer = await scene.api.create(path, manifest, dryRun="All")
            # What the server takes the operator must read; what the server refuses `finetune lint` must know.
            refused, said = answer.status in (400, 422), refusal(manifest)
            fits = bool(problems(manifest)) if refused else answer.status == 201 and not said
            results[str(changed)] = "" if fits else f"{answer.status} {answer.body}, and the models: {said or 'good'}"
    tally.count("a property of a manifest changed", results)


async def test_a_running_job_changed_and_put_back(theatre: "Theatre", tally: "Tally", whole: bool) -> None:
    """Only what may change does, and what was put back leaves everything as it was."""
    results: dict[str, str] = {}
    async with theatre.scene() as scene:
        await scene.operator.start()
        await create(scene, maxAttempts=2, activeDeadlineSeconds=50_000)
        before, work = await at_rest(scene), dict(scene.proxy.work)
        known = (await scene.api.get(scene.job_path())).must(200)
        seed = job_manifest("j", **known["spec"])
        for changed in changes(seed, 600 if whole else 25):
            spec = changed.manifest["spec"]
            if (spec.get("runPolicy") or {}).get("suspend") is True:
                continue  # The scenarios `suspend` and `resume` are about that.
            answer = await replace_spec(scene, spec)
            results[str(changed)] = what_changed(known["spec"], answer)
            if answer.status == 200:
                (await replace_spec(scene, known["spec"])).must(200)
        await nudged(scene)
        assert difference(before, await without_generation(scene, before)) == []
        assert dict(scene.proxy.work) == work
    tally.count("a property of a manifest changed", results)


async def replace_spec(scene: Scene, spec: dict[str, Any]) -> Answer:
    return await scene.api.patch(scene.job_path(), [{"op": "replace", "path": "/spec", "value": spec}], "json")


def what_changed(spec: dict[str, Any], answer: Answer) -> str:
    if answer.status != 200:
        return "" if answer.status in (400, 422) else f"{answer.status} {answer.body}"
    mutable = [(group, name) for group, names in FineTuneJobSpec.mutable.items() for name in names]
    found = copy.deepcopy(answer.body["spec"])
    for group, name in mutable:
        for each in (found, spec := copy.deepcopy(spec)):
            (each.get(group) or {}).pop(name, None)
            if not each.get(group):
                each.pop(group, None)
    lines = difference(spec, found)
    return f"changed, though it may not: {lines}" if lines else ""


async def without_generation(scene: Scene, before: dict[str, Any]) -> dict[str, Any]:
    """What is left, with the generations that were counted up meanwhile as they were."""
    now = await left(scene)
    kept, found = before["finetunejobs/j"]["status"], now["finetunejobs/j"]["status"]
    found["observedGeneration"] = kept["observedGeneration"]
    for one, other in zip(found["conditions"], kept["conditions"], strict=True):
        one["observedGeneration"] = other["observedGeneration"]
    return now
