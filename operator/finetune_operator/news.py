"""PURE. Which watch events are work: those that tell of something that no reconcile has decided upon.

An operator hears its own writes again, and most of what happens to a Job or a pod changes no decision. Whatever is
dropped here by mistake is found by the next resync.
"""

import json
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

from finetune_operator.manifests import ATTEMPT_LABEL, JOB_LABEL, PREPARE
from finetune_operator.observe import read_pod
from finetune_operator.status import pod_trouble

Object = Mapping[str, Any]
Key = tuple[str, str]
KEEP = 4
"""Versions of a job that may still be on their way when a later one is written."""


class Facts(NamedTuple):
    """What `plan` looks at in a child while it is not over (afterwards everything is read), and how that is where the
    child was just created: then there is nothing to do yet."""

    now: Hashable
    of_new: Hashable


class JobNews:
    """FineTuneJobs, by the fingerprints of the versions that were put on the queue, decided upon or written."""

    def __init__(self) -> None:
        self._known: dict[Key, tuple[int, ...]] = {}
        self._working: dict[Key, int | None] = {}
        """Jobs that are being reconciled, and the newest version that was heard of meanwhile."""

    def __contains__(self, key: object) -> bool:
        return key in self._known or key in self._working

    def heard(self, key: Key, version: int) -> bool:
        """A version was seen: is it work? While the job is being reconciled, `done` tells."""
        if key in self._working:
            self._working[key] = version
            return False
        return self._is_new(key, version)

    def begin(self, key: Key) -> None:
        self._working[key] = None

    def done(self, key: Key, version: int | None) -> bool:
        """The reconcile has ended, with everything decided for this version (None: with nothing decided). Whether what
        was heard meanwhile is work. A version that was heard before the last one needs no answer of its own: a status
        is only written over the version that was read, so that the last one contains it."""
        if version is not None:
            self._is_new(key, version)
        heard = self._working.pop(key, None)
        return heard is not None and self._is_new(key, heard)

    def forget(self, key: Key) -> None:
        self._known.pop(key, None)

    def _is_new(self, key: Key, version: int) -> bool:
        known = self._known.get(key, ())
        if version in known:
            return False
        self._known[key] = (*known, version)[-KEEP:]
        return True


class ChildNews:
    """Jobs and pods, by their `facts`. Only those of FineTuneJobs that exist are to be told."""

    def __init__(self) -> None:
        self._known: dict[Key, dict[str, int]] = {}

    def heard(self, raw: Object, facts: Facts, *, gone: bool = False) -> bool:
        """Is it work?"""
        meta = raw["metadata"]
        key = meta.get("namespace", ""), (meta.get("labels") or {}).get(JOB_LABEL, "")
        uid, known = meta["uid"], self._known.setdefault(key, {})
        before, now = known.get(uid, hash(facts.of_new)), hash(facts.now)
        if gone:
            known.pop(uid, None)
        else:
            known[uid] = now
        return before != now

    def forget(self, key: Key) -> None:
        """The FineTuneJob is gone, and what it had with it."""
        self._known.pop(key, None)


def job_fingerprint(raw: Object) -> int:
    """Equal for two versions of a FineTuneJob between which nothing changed but how far its training is."""
    meta, status = raw["metadata"], dict(raw.get("status") or {})
    trainer = status.pop("trainerStatus", None) or {}
    # What is about to be made is recorded in a write of its own, which tells of nothing to do.
    if not (status.get("prepare") or {}).get("uid"):
        status.pop("prepare", None)
    status["attempts"] = [a for a in status.get("attempts") or () if a.get("uid") or a.get("outcome")]
    said = [trainer.get(key) for key in ("attempt", "phase", "checkpoint", "warning")]
    # The UID: a job that was deleted and created anew. The annotations: whoever sets one is heard.
    known = [meta["uid"], meta.get("generation"), meta.get("deletionTimestamp"), meta.get("annotations"), status, said]
    return hash(json.dumps(known, sort_keys=True))


def job_facts(raw: Object, *, gone: bool = False) -> Facts:
    """Of a Job. Not how many of its pods run: those tell it themselves."""
    meta, status = raw["metadata"], raw.get("status") or {}
    last = (c["type"] for c in status.get("conditions") or () if c["status"] == "True")
    over = tuple(kind for kind in last if kind in ("Complete", "Failed"))
    # The generation counts changes of the spec, which for a Job is `suspend`.
    return Facts((meta.get("generation"), "deletionTimestamp" in meta, over, gone), (1, False, (), False))


def pod_facts(raw: Object, *, gone: bool = False) -> Facts:
    """Of a pod. Why it ended is read when its Job has ended."""
    pod = read_pod(raw)
    trouble = pod_trouble(pod)
    if prepares(raw):
        # The Job controller would try again, and a Job that tries again is no news.
        return Facts((trouble, pod.out_of_memory), (None, False))
    return Facts((trouble, pod.started, pod.deletion, gone), (None, None, None, False))


def prepares(raw: Object) -> bool:
    return bool(raw["metadata"]["labels"].get(ATTEMPT_LABEL) == PREPARE)
