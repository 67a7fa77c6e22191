"""Floods of objects under the chart's memory limit: the operator lives, stays small, and acts upon honest jobs."""

import pytest

from support.manifests import job_manifest
from support.object_floods import SHAPES, create_all, flooded, forged_job, forged_pod, touching
from support.operating import GROUP, Scene

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
FAT = 1_200_000
"""Bytes in the API server's store: its limit is 1.5 MiB."""
LONG, SHORT = 120.0, 3.0
"""Seconds of a flood that goes on."""


@pytest.mark.parametrize("shape", SHAPES)
async def test_large_jobs_that_carry_our_labels(scene: Scene, whole: bool, shape: str) -> None:
    """As many as filled one page of a LIST, before the operator starts, and while it runs."""
    count = 100 if whole or shape == "one long text" else 12
    path = scene.path("jobs")
    names = [f"fat-{number}" for number in range(count)]
    await create_all(scene, path, (forged_job(name, container=SHAPES[shape](FAT)) for name in names))
    async with flooded(scene) as state:
        await state.honest(3)
        # Now as of a FineTuneJob that exists.
        more = (forged_job(f"more-{name}", "honest-0", SHAPES[shape](FAT)) for name in names[: count // 5])
        await create_all(scene, path, more)
        await state.honest(3)
        await state.during(touching(scene, path, names), LONG if whole else SHORT)


@pytest.mark.parametrize("kind", ["pods", "jobs"])
async def test_thousands_of_small_objects_that_carry_our_labels(scene: Scene, whole: bool, kind: str) -> None:
    """Half of them as of a FineTuneJob that exists, half as of nobody's."""
    count = 10_000 if whole else 600
    forge = forged_pod if kind == "pods" else forged_job
    path = scene.path("pods", api="/api/v1") if kind == "pods" else scene.path("jobs")
    names = [f"forged-{number}" for number in range(count)]
    async with flooded(scene) as state:
        await state.honest()
        await create_all(scene, path, (forge(name, "honest-0") for name in names[: count // 2]))
        await state.honest(2)
        await create_all(scene, path, (forge(name) for name in names[count // 2 :]))
        await state.honest(2)
        await state.during(touching(scene, path, names), LONG if whole else SHORT)
    # Not while it runs, but when it starts.
    async with flooded(scene, first=100_000) as state:
        await state.honest(3)


async def test_large_finetunejobs(scene: Scene, whole: bool) -> None:
    """Annotations of 256 KiB are the most that an API server takes; labels have no bound but the object's."""
    count = 200 if whole else 12
    path = scene.path("finetunejobs", api=GROUP)

    def fat(number: int) -> dict[str, object]:
        job = job_manifest(f"fat-{number}", scene.namespace, profile=scene.profile)
        if number % 2:
            job["metadata"]["annotations"] = {"a": "x" * (256 * 1024 - 100)}
        else:
            job["metadata"]["labels"] = {f"l{key}": "" for key in range(20_000)}
        return job

    names = [f"fat-{number}" for number in range(count)]
    await create_all(scene, path, map(fat, range(count)))
    async with flooded(scene) as state:
        await state.honest(3)
        await state.during(touching(scene, path, names), LONG if whole else SHORT)
