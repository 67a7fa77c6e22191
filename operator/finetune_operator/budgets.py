"""Budgets of GPU-hours: what was spent is read from all jobs at each look at them, and written to profiles' status."""

import datetime
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from finetune_api.budget import Account, account, current
from finetune_api.profile import FineTuneProfile
from finetune_operator.cluster import Cluster
from finetune_operator.meter import Key, Run, count, runs, with_usage

logger = logging.getLogger(__name__)
Object = Mapping[str, Any]


class Budgets:
    """`begin` a look at all jobs, `look` at each, then `settle`. Nothing is done where no profile has a budget."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._profiles: dict[str, FineTuneProfile] = {}
        """Those that have a budget."""
        self._known: dict[str, FineTuneProfile] = {}
        """The same with what was spent by the last look."""
        self._runs: list[Run] = []
        self._gone: list[Run] = []
        """Of jobs that were deleted since the last look."""

    async def begin(self) -> None:
        """Raises ApiError."""
        listed, found = await self._cluster.list_profiles(), {}
        for raw in listed:
            try:
                profile = FineTuneProfile.model_validate(raw)
            except ValidationError:
                continue  # No job runs under it; the jobs that name it say why.
            if profile.spec.budget:
                found[profile.metadata.name] = profile
        self._runs, self._profiles = [], found
        self._known = {name: self._known.get(name, profile) for name, profile in found.items()}

    def look(self, raw: Object, now: datetime.datetime) -> None:
        """A FineTuneJob as it was listed."""
        if self._profiles and not self._counted(raw, now):
            self._runs += [run for run in runs(raw) if run.profile in self._profiles]

    def gone(self, raw: Object, now: datetime.datetime) -> None:
        """A FineTuneJob as it was when it was deleted: what ran of it ends now."""
        if self._profiles:
            self._gone += [run._replace(end=run.end or now, expected=0.0) for run in runs(raw)]

    async def settle(self, now: datetime.datetime) -> list[Key]:
        """Writes what was spent until now. Jobs that run and have to end, since their namespace has spent all. Raises
        ApiError; what was not written is counted the next time."""
        over: list[Key] = []
        for name, profile in self._profiles.items():
            assert profile.spec.budget
            own = [run for run in (*self._runs, *self._gone) if run.profile == name]
            changed = count(profile.status.usage, profile.spec.budget, own, now)
            if changed:
                usage = {namespace: value and value.to_json() for namespace, value in changed.items()}
                if not await self._cluster.patch_profile_status(name, {"usage": usage}):
                    continue
            self._gone = [run for run in self._gone if run.profile != name]
            known = self._known[name] = with_usage(profile, changed)
            for run in own:
                found = account(known, run.key[0], now)
                if run.end is None and found and found.spent >= found.allowed:
                    over.append(run.key)
        self._gone = [run for run in self._gone if run.profile in self._profiles]
        return over

    def accounts(self, now: datetime.datetime) -> Iterator[tuple[str, str, Account]]:
        """Profile, namespace, and what that has spent; of namespaces that have spent something."""
        for name, profile in self._known.items():
            for namespace in profile.status.usage:
                if found := account(profile, namespace, now):
                    yield name, namespace, found

    def _counted(self, raw: Object, now: datetime.datetime) -> bool:
        """Whether all of it was counted before; most jobs are over for long."""
        ended = (raw.get("status") or {}).get("completionTime")
        if not ended:
            return False
        namespace = raw["metadata"]["namespace"]
        until = (
            current(profile.status.usage.get(namespace), profile.spec.budget, now).until
            for profile in self._profiles.values()
            if profile.spec.budget
        )
        return datetime.datetime.fromisoformat(ended) <= min(until)
