"""Tests, once a day and for each profile that wants NetworkPolicies, whether the cluster enforces them."""

import asyncio
import datetime
import logging
from typing import Protocol

from pydantic import ValidationError

from finetune_api.profile import FineTuneProfile, NetworkStatus
from finetune_operator import nettest
from finetune_operator.cluster import ApiError, Object
from finetune_operator.containment import Containment, named
from finetune_operator.reconcile import utc_now

logger = logging.getLogger(__name__)
LOOK_SECONDS = 30.0


class NettestCluster(Protocol):
    """What of a cluster the test needs; methods raise ApiError."""

    async def list_profiles(self) -> list[Object]: ...
    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None: ...
    async def create(self, manifest: Object) -> Object: ...
    async def delete(
        self, kind: str, namespace: str, name: str, uid: str, resource_version: str | None = None
    ) -> bool: ...
    async def list_labelled(self, kind: str, namespace: str, label: str) -> list[Object]: ...
    async def patch_profile_status(self, name: str, patch: Object) -> bool: ...


class NetworkTests:
    """`run` it where one operator acts; the pods of a test run in `namespace`, the operator's own."""

    def __init__(self, cluster: NettestCluster, namespace: str, contained: Containment | None = None) -> None:
        self._cluster, self._namespace = cluster, namespace
        self._contained = contained or Containment()

    async def run(self) -> None:
        while True:
            try:
                for raw in await self._cluster.list_profiles():
                    with self._contained.about("network-test", *named(raw)):
                        await self.step(raw, utc_now())
            except ApiError as error:
                logger.warning("the test of NetworkPolicies goes on later: %s", error)
            await asyncio.sleep(LOOK_SECONDS)

    async def step(self, raw: Object, now: datetime.datetime) -> None:
        """Begins the profile's test where it is due, and ends one that is over. Raises ApiError."""
        try:
            profile = FineTuneProfile.model_validate(raw)
        except ValidationError:
            # Jobs under it are told why it cannot be used.
            return
        if not profile.spec.network_policy or not nettest.due(profile, now):
            return
        name = nettest.name_of(profile.metadata.name)
        job = await self._cluster.get("Job", self._namespace, name)
        if job is None:
            await self._begin(profile)
        elif nettest.ended(job) and "deletionTimestamp" not in job["metadata"]:
            pods = await self._cluster.list_labelled("Pod", self._namespace, f"{nettest.LABEL}={name}")
            await self._tell(profile, nettest.verdict(pods, profile.metadata.generation, now))
            await self._clear(name)

    async def _begin(self, profile: FineTuneProfile) -> None:
        text = "pods try whether the cluster enforces NetworkPolicies"
        await self._tell(profile, NetworkStatus(enforced="Unknown", message=text))
        for manifest in nettest.objects(profile, self._namespace):
            try:
                await self._cluster.create(manifest)
            except ApiError as error:
                # Of an earlier try that was cut short: the same, but for the Job, which is never created over another.
                if error.reason != "AlreadyExists":
                    raise

    async def _tell(self, profile: FineTuneProfile, status: NetworkStatus) -> None:
        name = profile.metadata.name
        logger.info("FineTuneProfile %s: NetworkPolicies enforced: %s: %s", name, status.enforced, status.message)
        # null removes what an earlier test said and this one does not.
        members = {"testedTime": None, "generation": None} | status.to_json()
        await self._cluster.patch_profile_status(name, {"network": members})

    async def _clear(self, name: str) -> None:
        for kind in ("Service", "NetworkPolicy", "Job"):
            if found := await self._cluster.get(kind, self._namespace, name):
                await self._cluster.delete(kind, self._namespace, name, found["metadata"]["uid"])
