"""read -> plan -> apply -> status -> Events, for one key. Everything that decides anything is in `plan`."""

import datetime
import hashlib
import logging
from asyncio import gather
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from finetune_api import API_VERSION
from finetune_api.jobstatus import FineTuneJobStatus
from finetune_operator.accept import MANAGER, Subject
from finetune_operator.attempts import made
from finetune_operator.clock import utc_now as utc_now
from finetune_operator.cluster import FIELD_MANAGER, ApiError, Cluster, Object
from finetune_operator.kueue import Queue, admitted, told
from finetune_operator.manifests import Context
from finetune_operator.news import job_fingerprint
from finetune_operator.observe import Census, Child, Observed, controller_uid, expected_names, observe
from finetune_operator.plan import Deletion, Plan, collision, plan, to_record, with_uids
from finetune_operator.profiles import Profiles
from finetune_operator.sameness import is_same_job
from finetune_operator.stalling import stalled
from finetune_operator.status import Note, finished, patch
from finetune_operator.turns import Line

logger = logging.getLogger("finetune_operator.reconcile")
Key = tuple[str, str]
"""Namespace and name of a FineTuneJob."""


_DECIDED = {"ConfigMap": ("data", "immutable"), "NetworkPolicy": ("spec",)}
"""What of a child depends on the profile, and is not told by its name."""


class Collision(Exception):
    """A child's name belongs to an object of somebody else's."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"{kind} {name}")
        self.kind = kind
        self.name = name


class NotYet(Exception):
    """What is in the way goes by itself: try again soon."""


class Result(NamedTuple):
    after: float | None = None
    """When to look again, in seconds; None: the next watch event is soon enough."""
    state: str | None = None
    """None: there is no such job."""
    job: Object | None = None
    """The FineTuneJob as it is now, by what was read and written: for this version of it everything is decided."""


async def reconcile(
    cluster: Cluster,
    key: Key,
    context: Context,
    clock: Callable[[], datetime.datetime] = utc_now,
    *,
    profiles: Profiles | None = None,
    prepare_pod: str | None = None,
    line: Line | None = None,
) -> Result:
    """Brings one job a step further. `prepare_pod`: name of a pod that is said to have ended well; it is read, if so.
    `line`: what other jobs hold and wait for; it is told how this one stands then.

    Raises ApiError where the server refuses or cannot be reached; the caller tries again.
    """
    line = line or Line()
    raw = await cluster.get("FineTuneJob", *key)
    if raw is None:
        line.note(key, None)
        return Result()
    subject = Subject.read(raw)
    if subject.deleting or subject.foreign:
        line.note(key, None)
        return Result(None, subject.status.state, raw)
    wanted = (raw.get("spec") or {}).get("profile")
    choice = [] if finished(subject.status) else await (profiles or Profiles(cluster)).choice(wanted)
    recorded, unrecorded = _names(subject)
    jobs = await _jobs(cluster, subject, recorded)
    if _lacks_a_gang(subject, jobs):
        # Deleted, most likely. That its attempt has ended cannot be taken back, so another way to read it must agree.
        jobs = await _jobs(cluster, subject, None)
    observed = await _observe(cluster, subject, jobs, prepare_pod, clock())
    decided = plan(subject, choice, observed, clock(), context, line)
    # A try that was cut short may have left a Job whose UID no status tells. Creating it anew would show that, by 409.
    if not decided.create and (left := await _jobs(cluster, subject, unrecorded)):
        observed = await _observe(cluster, subject, [*jobs, *left], prepare_pod, clock())
        decided = plan(subject, choice, observed, clock(), context, line)
    if decided.delete and recorded is not None:
        # What is deleted is gone for good, so another way to read must agree that it is to go.
        jobs = await _jobs(cluster, subject, None)
        observed = await _observe(cluster, subject, jobs, prepare_pod, clock())
        decided = plan(subject, choice, observed, clock(), context, line)
    # Nothing was awaited since the line was asked, if a gang is to be created.
    line.note(key, decided.claim)
    lacking = _lacks_a_gang(subject, jobs) or len(jobs) < len(recorded or ())
    if decided.create and lacking and not await _exists(cluster, subject):
        # It was deleted after it was read, and garbage collection takes its Jobs: they are not to come back.
        line.note(key, None)
        return Result()
    return await _carry_out(cluster, subject, raw, decided, clock)


async def _exists(cluster: Cluster, subject: Subject) -> bool:
    found = await cluster.get("FineTuneJob", subject.namespace, subject.name)
    return found is not None and found["metadata"]["uid"] == subject.uid


async def glance(raw: Object, census: Census, context: Context, profiles: Profiles, line: Line) -> Result | None:
    """Where there is nothing to do for this job, by what was listed: when there may be. None: it is to be reconciled.

    Raises ApiError and ValidationError.
    """
    subject = Subject.read(raw)
    if subject.deleting or subject.foreign:
        return Result(None, subject.status.state, raw)
    observed = census.of(subject.uid, subject.namespace, subject.name, subject.status)
    choice = [] if finished(subject.status) else await profiles.choice((raw.get("spec") or {}).get("profile"))
    decided = plan(subject, choice, observed, utc_now(), context, line)
    # What is to be created holds nothing yet, and all others are to be heard of before it does.
    claim = decided.claim
    line.note((subject.namespace, subject.name), claim._replace(holds=False) if claim and decided.create else claim)
    if decided.create or decided.delete or patch(subject.status, decided.status):
        return None
    return Result(decided.requeue_after, subject.status.state, raw)


async def stall(cluster: Cluster, key: Key, told: Note, now: datetime.datetime, *, first: bool) -> int | None:
    """Writes that the operator fails on a job where its status does not say so already, and tells it in an Event.

    Returns the fingerprint of what was written. `first`: it was not told before, so tell it even if the status cannot.
    Raises ApiError.
    """
    raw = await cluster.get("FineTuneJob", *key)
    if raw is None or ((raw.get("spec") or {}).get("runPolicy") or {}).get("managedBy", MANAGER) != MANAGER:
        return None
    meta, change = raw["metadata"], stalled(raw, told, now)
    if not change:
        return None
    try:
        written = await cluster.patch_status(*key, meta["uid"], change, meta["resourceVersion"])
    except ApiError:
        if first:
            await cluster.post_event(event(*key, meta["uid"], told, now))
        raise
    if written is None:
        return None
    await cluster.post_event(event(*key, meta["uid"], told, now))
    return job_fingerprint(written)


async def _carry_out(
    cluster: Cluster, subject: Subject, raw: Object, decided: Plan, clock: Callable[[], datetime.datetime]
) -> Result:
    created: list[Object] = []
    status, existed = subject.status, False
    if decided.create:
        status = to_record(subject.status, decided.status)
        raw = await _write(cluster, subject, raw, subject.status, status)
    try:
        for manifest in decided.create:
            child, was_there = await _create(cluster, subject, manifest)
            created.append(child)
            existed |= was_there
    except Collision as error:
        created, decided = [], collision(subject, error.kind, error.name, clock())
    raw = await _write(cluster, subject, raw, status, with_uids(decided.status, created))
    await _delete(cluster, subject, decided.delete)
    await _tell(cluster, subject, decided, clock())
    # What was there already may have come further than a new one, and was not looked at.
    return Result(0.0 if existed else decided.requeue_after, decided.status.state, raw)


async def _write(
    cluster: Cluster, subject: Subject, raw: Object, old: FineTuneJobStatus, new: FineTuneJobStatus
) -> Object:
    """The job with the new status in place of the old one, which `raw` has. Raises NotYet where it is not there now."""
    change = patch(old, new)
    if not change:
        return raw
    version = raw["metadata"]["resourceVersion"]
    written = await cluster.patch_status(subject.namespace, subject.name, subject.uid, change, version)
    if written is None:
        # Whatever is to be made, deleted or told must be recorded first.
        raise NotYet("the job changed meanwhile")
    return written


def _names(subject: Subject) -> tuple[list[str] | None, list[str]]:
    """Of the Jobs that the status tells of, None where they are many; and of those that there may be besides."""
    names = expected_names(subject.name, subject.status)
    if subject.status.state is None:
        return [], names
    if len(subject.status.attempts) > 2:
        return None, []
    return names[:-1], names[-1:]


async def _jobs(cluster: Cluster, subject: Subject, names: Iterable[str] | None) -> list[Object]:
    """Read one by one: a LIST by label makes the server look at every Job of the namespace."""
    if names is None:
        return await cluster.list_children("Job", subject.namespace, subject.name)
    found = await gather(*(cluster.get("Job", subject.namespace, name) for name in names))
    return [job for job in found if job is not None]


def _lacks_a_gang(subject: Subject, jobs: Sequence[Object]) -> bool:
    uids = {job["metadata"]["uid"] for job in jobs}
    return any(attempt.outcome is None and attempt.uid not in uids for attempt in made(subject.status.attempts))


async def _observe(
    cluster: Cluster, subject: Subject, jobs: Sequence[Object], prepare_pod: str | None, now: datetime.datetime
) -> Observed:
    """Raises NotYet where a Job has just ended, and nothing is seen yet of why."""
    known = subject.uid, subject.name, subject.status
    if finished(subject.status) or not (jobs or subject.status.attempts):
        return observe(*known, jobs, [])
    if prepare_pod and len(jobs) == 1 and not subject.status.attempts:
        # Nothing but `prepare` has ever been: where it succeeded, only what its pod said counts.
        pod = await cluster.get("Pod", subject.namespace, prepare_pod)
        observed = observe(*known, jobs, [pod] if pod else [])
        if observed.prepared_by:
            return observed
    pods = await cluster.list_children("Pod", subject.namespace, subject.name)
    observed = observe(*known, jobs, pods)
    recorded = {attempt.number for attempt in subject.status.attempts if attempt.outcome}
    if child := observed.unexplained(recorded, now):
        raise NotYet(f"Job {child.name} has ended, and none of its pods")
    return replace(observed, queue=await _of_queue(cluster, subject, observed.queued))


async def _of_queue(cluster: Cluster, subject: Subject, queued: Child | None) -> Queue | None:
    if queued is None:
        return None
    try:
        workloads = await cluster.list_workloads(subject.namespace, queued.uid)
    except ApiError as error:
        if error.status != 403:
            raise
        # An operator without this right says so, and goes on: the queue does its work all the same.
        return Queue(f"its Workload cannot be read: {error}", None)
    return Queue(told(workloads), admitted(workloads))


async def _create(cluster: Cluster, subject: Subject, manifest: Object) -> tuple[Object, bool]:
    """The object as created now, or one that is there and is the same: then True. Raises Collision, NotYet."""
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    try:
        return {**await cluster.create(manifest), "kind": kind}, False
    except ApiError as error:
        if error.reason != "AlreadyExists":
            raise
    found = await cluster.get_whole(kind, subject.namespace, name)
    if found is None or "deletionTimestamp" in found["metadata"]:
        raise NotYet(f"{kind} {name} is being deleted")
    if controller_uid(found) != subject.uid:
        if _of_namesake(found, subject):
            raise NotYet(f"{kind} {name} is of an earlier FineTuneJob and waits for garbage collection")
        raise Collision(kind, name)
    same = all(found.get(part) == manifest[part] for part in _DECIDED.get(kind, ()))
    if not (is_same_job(manifest, found) if kind == "Job" else same):
        # Left by a try that was cut short, under another profile; or put there by somebody to be taken for ours.
        await cluster.delete(kind, subject.namespace, name, found["metadata"]["uid"])
        raise NotYet(f"{kind} {name} is not what is to be made; it is deleted and made anew")
    return {**found, "kind": kind}, True


async def _delete(cluster: Cluster, subject: Subject, deletions: Iterable[Deletion]) -> None:
    """Raises NotYet where a part of a gang is still there: once the gang's Job is gone, nobody looks for it."""
    parts: list[Deletion] = []
    for kind, name, uid, version in deletions:
        if uid is None:
            parts.append(Deletion(kind, name, uid))
            uid = await _own(cluster, subject, kind, name)
        elif parts:
            # That something is not there has been said of what was: by a cache, or something else on the way.
            if left := [part async for part in _left(cluster, subject, parts)]:
                raise NotYet(f"{left[0].kind} {left[0].name} is still there")
            parts = []
        if uid is not None:
            await cluster.delete(kind, subject.namespace, name, uid, version)


async def _left(cluster: Cluster, subject: Subject, parts: Iterable[Deletion]) -> AsyncIterator[Deletion]:
    """Those that a LIST still shows as the job's own."""
    for part in parts:
        for found in await cluster.list_children(part.kind, subject.namespace, subject.name):
            own = found["metadata"]["name"] == part.name and controller_uid(found) == subject.uid
            if own and "deletionTimestamp" not in found["metadata"]:
                yield part


async def _own(cluster: Cluster, subject: Subject, kind: str, name: str) -> str | None:
    """UID of the object of this name; None where it is gone, or somebody else's."""
    found = await cluster.get(kind, subject.namespace, name)
    uid: str | None = found["metadata"]["uid"] if found and controller_uid(found) == subject.uid else None
    return uid


def _of_namesake(found: Object, subject: Subject) -> bool:
    owners: list[dict[str, Any]] = found["metadata"].get("ownerReferences") or []
    identity = (API_VERSION, "FineTuneJob", subject.name)
    return any((o["apiVersion"], o["kind"], o["name"]) == identity and o.get("controller") for o in owners)


async def _tell(cluster: Cluster, subject: Subject, decided: Plan, now: datetime.datetime) -> None:
    """The transitions as Events: worth a log line where they cannot be posted, and never the job's progress."""
    for note in decided.events:
        extra = {"namespace": subject.namespace, "job": subject.name}
        logger.log(logging.WARNING if note.type == "Warning" else logging.INFO, "%s: %s", *note[1:], extra=extra)
        try:
            await cluster.post_event(event(subject.namespace, subject.name, subject.uid, note, now))
        except ApiError as error:
            logger.warning("Event %s was not posted: %s", note.reason, error, extra=extra)


def event(namespace: str, name: str, uid: str, note: Note, now: datetime.datetime) -> Object:
    """A core/v1 Event of a FineTuneJob. Its name says what it tells of: telling it again counts up."""
    time = now.isoformat().replace("+00:00", "Z")
    digest = hashlib.sha256("\0".join((uid, *note)).encode(errors="replace")).hexdigest()[:16]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{name}.{digest}", "namespace": namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": "FineTuneJob",
            "namespace": namespace,
            "name": name,
            "uid": uid,
        },
        "type": note.type,
        "reason": note.reason,
        "message": note.message[:1024],
        "source": {"component": FIELD_MANAGER},
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }
