"""What was read may be of an earlier time, or be missing by mistake: nothing is concluded that cannot be taken back."""

from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_operator.reconcile import NotYet
from support.world import Object, World, make_job, make_profile, started


class Deleted(World):
    """The FineTuneJob goes once it was read, and its Jobs with it."""

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        found = await super().get(kind, namespace, name)
        if kind == "FineTuneJob" and self.deleting:
            self.gone = True
            self.objects.clear()
        return found

    deleting = False


class Forgetful(World):
    """`forgotten`: names of objects that the next GET of each does not find, though LISTs do."""

    forgotten: tuple[str, ...] = ()

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        if name in self.forgotten:
            self.forgotten = tuple(other for other in self.forgotten if other != name)
            return None
        return await super().get(kind, namespace, name)


async def test_a_gang_that_is_not_found_is_looked_for_in_another_way_too() -> None:
    world = Forgetful(make_job().build())
    await started(world)
    world.forgotten = ("support-bot-0",)
    await world.settle()
    assert (world.state, [a.outcome for a in world.status.attempts]) == ("Running", [None])


@pytest.mark.parametrize("hidden", [{}, {"phase": "Running"}])
async def test_what_the_pods_of_a_failed_gang_say_is_waited_for(hidden: dict[str, Any]) -> None:
    world = await started(World(make_job().build()))
    world.fail("support-bot-0", Reason.DIVERGED, "the loss is NaN since step 7")
    key = ("Pod", "support-bot-0-0-x")
    seen = world.objects.pop(key)
    if hidden:
        world.objects[key] = {**seen, "status": hidden}
    with pytest.raises(NotYet, match="Job support-bot-0 has ended, and none of its pods"):
        await world.settle()
    world.objects[key] = seen
    world.later(3)
    await world.settle()
    assert (world.state, world.status.message) == ("Failed", "the loss is NaN since step 7")


async def test_but_not_for_ever() -> None:
    world = await started(World(make_job().build()))
    world.fail("support-bot-0", Reason.DIVERGED)
    world.sweep("support-bot-0")
    world.later(10)
    await world.settle()
    assert world.status.attempts[0].outcome is not None


async def test_the_children_of_a_job_that_is_deleted_meanwhile_do_not_come_back() -> None:
    world = Deleted(make_job().build())
    await started(world)
    world.deleting = True
    before = list(world.created)
    assert (await world.reconcile()) is None
    assert world.created == before


async def test_what_an_earlier_job_of_the_name_prepared_is_not_used() -> None:
    world = World(make_job().build())
    await world.settle()
    world.prepared()
    # The second one has a status already: it waited for a profile.
    world.job, world.profiles = make_job().with_meta(uid="another").build(), []
    await world.settle()
    world.profiles = [make_profile()]
    with pytest.raises(NotYet, match="of an earlier FineTuneJob"):
        await world.reconcile()
    assert "support-bot-0" not in world.names("Job")
