"""Budgets of GPU-hours: what was spent is read from all jobs at each look at them, and written to profiles' status."""

import datetime
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from finetune_api.bounds import parse_time
from finetune_api.budget import Account, account, current
from finetune_api.profile import FineTuneProfile, Usage
from finetune_operator.cluster import Cluster
from finetune_operator.containment import Containment, named
from finetune_operator.meter import Key, Run, by_namespace, change, clamped, runs, with_usage

Object = Mapping[str, Any]


class Budgets:
    """`begin` a look at all jobs, `look` at each, then `settle`. Nothing is done where no profile has a budget."""

    def __init__(self, cluster: Cluster, contained: Containment | None = None) -> None:
        self._cluster = cluster
        self._contained = contained or Containment()
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
            with self._contained.about("budgets", *named(raw)):
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
        with self._contained.about("budgets", *named(raw)):
            if self._profiles and not self._counted(raw, now):
                self._runs += [run for run in runs(raw) if run.profile in self._profiles]

    def gone(self, raw: Object, now: datetime.datetime) -> None:
        """A FineTuneJob as it was when it was deleted: what ran of it ends now."""
        with self._contained.about("budgets", *named(raw)):
            if self._profiles:
                self._gone += [run._replace(end=run.end or now, expected=0.0) for run in runs(raw)]

    async def settle(self, now: datetime.datetime) -> list[Key]:
        """Writes what was spent until now. Jobs that run and have to end, since their namespace has spent all. Raises
        ApiError where the API server is away; what was not written is counted the next time."""
        over: list[Key] = []
        for name, profile in self._profiles.items():
            with self._contained.about("budgets", "", _of(name)):
                over += await self._settle(name, profile, now)
        self._gone = [run for run in self._gone if run.profile in self._profiles]
        return over

    async def _settle(self, name: str, profile: FineTuneProfile, now: datetime.datetime) -> list[Key]:
        assert profile.spec.budget
        runs = by_namespace(profile.status.usage, (r for r in (*self._runs, *self._gone) if r.profile == name))
        changed: dict[str, Usage | None] = {}
        settled: set[str] = set()
        for namespace, own in runs.items():
            with self._contained.about("budgets", namespace, _of(name)):
                new, usage = change(profile.status.usage.get(namespace), profile.spec.budget, own, now)
                if new:
                    changed[namespace] = usage
                settled.add(namespace)
                if clamped(usage):
                    error = OverflowError("more GPU-seconds than a status holds; as many as it holds are written")
                    self._contained.tell("budgets", namespace, _of(name), error)
        refused = await self._write(name, changed)
        settled -= refused
        self._gone = [run for run in self._gone if run.profile != name or run.key[0] not in settled]
        written = {namespace: usage for namespace, usage in changed.items() if namespace in settled}
        known = self._known[name] = with_usage(profile, written)
        over = []
        for namespace in settled:
            found = account(known, namespace, now)
            if found and found.spent >= found.allowed:
                over += [run.key for run in runs[namespace] if run.end is None]
        return over

    async def _write(self, name: str, changed: Mapping[str, Usage | None]) -> set[str]:
        """Writes what changed of a profile; the namespaces whose figures were not taken. All at once, and one by one
        where that is refused: one namespace's figures must not keep the others' from being written."""
        if not changed:
            return set()
        usage = {namespace: value and value.to_json() for namespace, value in changed.items()}
        with self._contained.about("budgets", "", _of(name)) as whole:
            # What is gone needs no figures.
            if not await self._cluster.patch_profile_status(name, {"usage": usage}):
                return set(changed)
        if whole.error is None:
            return set()
        refused = set()
        for namespace, value in usage.items():
            with self._contained.about("budgets", namespace, _of(name)) as one:
                await self._cluster.patch_profile_status(name, {"usage": {namespace: value}})
            if one.error:
                refused.add(namespace)
        return refused

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
        return parse_time(ended) <= min(until)


def _of(profile: str) -> str:
    """As a log line names it: a namespace's figures under a profile have no name of their own."""
    return f"FineTuneProfile {profile}"
