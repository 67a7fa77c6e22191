"""read -> plan -> apply -> status -> Events, for one key. Everything that decides anything is in `plan`."""

import datetime
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from finetune_api import API_VERSION
from finetune_operator.accept import Subject
from finetune_operator.cluster import FIELD_MANAGER, ApiError, Cluster, Object
from finetune_operator.manifests import Context
from finetune_operator.observe import Observed, controller_uid, observe
from finetune_operator.plan import Plan, collision, plan, with_uids
from finetune_operator.status import Note, finished, patch

logger = logging.getLogger("finetune_operator.reconcile")
Key = tuple[str, str]
"""Namespace and name of a FineTuneJob."""


class Collision(Exception):
    """A child's name belongs to an object of somebody else's."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"{kind} {name}")
        self.kind = kind
        self.name = name


class NotYet(Exception):
    """What is in the way goes by itself: try again soon."""


def utc_now() -> datetime.datetime:
    """Whole seconds: the API server keeps no fractions, and what was read back must compare equal."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


async def reconcile(
    cluster: Cluster, key: Key, context: Context, clock: Callable[[], datetime.datetime] = utc_now
) -> tuple[float | None, str | None]:
    """Brings one job a step further. When to look again, in seconds, and the job's state; None: nothing is to come.

    Raises ApiError where the server refuses or cannot be reached; the caller tries again.
    """
    raw = await cluster.get("FineTuneJob", *key)
    if raw is None:
        return None, None
    subject = Subject.read(raw)
    if subject.deleting or subject.foreign:
        return None, subject.status.state
    observed = await _observe(cluster, subject)
    decided = plan(subject, await _profiles(cluster, subject, raw), observed, clock(), context)
    try:
        created = [await _create(cluster, subject, manifest) for manifest in decided.create]
    except Collision as error:
        created, decided = [], collision(subject, error.kind, error.name, clock())
    change = patch(subject.status, with_uids(decided.status, created))
    if change and not await cluster.patch_status(*key, subject.uid, change, subject.resource_version):
        # Whatever is to be deleted or told must be recorded first.
        raise NotYet("the job changed meanwhile")
    for kind, name, uid, version in decided.delete:
        await cluster.delete(kind, key[0], name, uid, version)
    await _tell(cluster, subject, decided, clock())
    return decided.requeue_after, decided.status.state


async def _observe(cluster: Cluster, subject: Subject) -> Observed:
    jobs = await cluster.list_children("Job", subject.namespace, subject.name)
    idle = finished(subject.status) or not (jobs or subject.status.attempts)
    pods = [] if idle else await cluster.list_children("Pod", subject.namespace, subject.name)
    return observe(subject.uid, jobs, pods)


async def _profiles(cluster: Cluster, subject: Subject, raw: Object) -> Sequence[Object]:
    """What `select_profile` chooses from."""
    if finished(subject.status):
        return []
    if wanted := (raw.get("spec") or {}).get("profile"):
        profile = await cluster.get("FineTuneProfile", None, wanted)
        return [profile] if profile else []
    return await cluster.list_profiles()


async def _create(cluster: Cluster, subject: Subject, manifest: Object) -> Object:
    """The object as created now, or by an earlier try of ours. Raises Collision, NotYet."""
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    try:
        return {**await cluster.create(manifest), "kind": kind}
    except ApiError as error:
        if error.reason != "AlreadyExists":
            raise
    found = await cluster.get(kind, subject.namespace, name)
    if found is None or "deletionTimestamp" in found["metadata"]:
        raise NotYet(f"{kind} {name} is being deleted")
    if controller_uid(found) != subject.uid:
        if _of_namesake(found, subject):
            raise NotYet(f"{kind} {name} is of an earlier FineTuneJob and waits for garbage collection")
        raise Collision(kind, name)
    if kind == "ConfigMap" and found.get("data") != manifest["data"]:
        # Left by a try that was cut short under another profile; no Job refers to it yet.
        await cluster.delete(kind, subject.namespace, name, found["metadata"]["uid"])
        raise NotYet(f"{kind} {name} is out of date")
    return {**found, "kind": kind}


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
            await cluster.post_event(event(subject, note, now))
        except ApiError as error:
            logger.warning("Event %s was not posted: %s", note.reason, error, extra=extra)


def event(subject: Subject, note: Note, now: datetime.datetime) -> Object:
    """A core/v1 Event. Its name says what it tells of, so that telling it again counts up instead of adding another."""
    time = now.isoformat().replace("+00:00", "Z")
    digest = hashlib.sha256("\0".join((subject.uid, *note)).encode()).hexdigest()[:16]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{subject.name}.{digest}", "namespace": subject.namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": "FineTuneJob",
            "namespace": subject.namespace,
            "name": subject.name,
            "uid": subject.uid,
        },
        "type": note.type,
        "reason": note.reason,
        "message": note.message[:1024],
        "source": {"component": FIELD_MANAGER},
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }
