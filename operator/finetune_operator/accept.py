"""PURE. May this job run, and under which profile? A refusal is one sentence that names the field."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune_api.bounds import parse_time
from finetune_api.defaults import with_defaults
from finetune_api.failures import Reason
from finetune_api.job import FineTuneJob, parse
from finetune_api.jobstatus import FineTuneJobStatus, PrepareStatus
from finetune_api.model import Problem, problems_of
from finetune_api.policy import against_defaults, not_allowed
from finetune_api.profile import DEFAULT_ANNOTATION, FineTuneProfile
from finetune_api.support import unsupported, unsupported_profile

Object = Mapping[str, Any]
MANAGER = "finetune.dev/operator"


@dataclass(frozen=True)
class Refusal:
    reason: Reason
    message: str


@dataclass(frozen=True)
class Subject:
    """The FineTuneJob that a plan is made for: what is needed even where its spec cannot be read."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    created: datetime.datetime
    deleting: bool
    foreign: bool
    """Another controller's, by runPolicy.managedBy."""
    ttl_seconds: int | None
    """Also of a job that cannot be read otherwise."""
    status: FineTuneJobStatus
    job: FineTuneJob | Refusal

    @classmethod
    def read(cls, raw: Object) -> "Subject":
        """Raises ValidationError where the *status* is not ours: then nothing can be known, and nothing may be done."""
        meta = raw["metadata"]
        policy = (raw.get("spec") or {}).get("runPolicy") or {}
        ttl = policy.get("ttlSecondsAfterFinished")
        return cls(
            namespace=meta["namespace"],
            name=meta["name"],
            uid=meta["uid"],
            generation=meta.get("generation", 0),
            resource_version=meta["resourceVersion"],
            created=parse_time(meta["creationTimestamp"]),
            deleting="deletionTimestamp" in meta,
            foreign=policy.get("managedBy", MANAGER) != MANAGER,
            ttl_seconds=ttl if isinstance(ttl, int) and 0 <= ttl < 2**31 else None,
            status=FineTuneJobStatus.model_validate(raw.get("status") or {}),
            job=_read_spec(raw),
        )


def _read_spec(raw: Object) -> FineTuneJob | Refusal:
    try:
        return parse({key: value for key, value in raw.items() if key != "status"})
    except ValidationError as error:
        return _invalid(problems_of(error))


def _invalid(problems: Sequence[Problem]) -> Refusal:
    rest = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return Refusal(Reason.INVALID_SPEC, "; ".join(map(str, problems[:5]))[:2048] + rest)


def select_profile(wanted: str | None, profiles: Sequence[Object]) -> FineTuneProfile | Refusal:
    """The profile that the job names, else the default one. A refusal is not for ever: profiles come and change."""
    if wanted:
        found = [p for p in profiles if p["metadata"]["name"] == wanted]
        hint = f"FineTuneProfile {wanted!r} does not exist"
    else:
        found = [
            p for p in profiles if (p["metadata"].get("annotations") or {}).get(DEFAULT_ANNOTATION, "false") == "true"
        ]
        hint = f"is absent, and no FineTuneProfile has the annotation {DEFAULT_ANNOTATION}: 'true'"
    if not found:
        return Refusal(Reason.PROFILE_NOT_FOUND, f"spec.profile: {hint}; the job starts when there is one")
    # Several defaults are a mistake of the platform's; the choice must still be the same each time.
    raw = min(found, key=lambda p: str(p["metadata"]["name"]))
    try:
        profile = FineTuneProfile.model_validate(raw)
        problems = unsupported_profile(profile.spec)
    except ValidationError as error:
        problems = problems_of(error)
    if problems:
        text = "; ".join(map(str, problems[:5]))
        name = raw["metadata"]["name"]
        return Refusal(Reason.PROFILE_NOT_FOUND, f"FineTuneProfile {name!r} cannot be used: {text}"[:2048])
    return profile


def as_begun(profile: FineTuneProfile | Refusal, before: PrepareStatus | None) -> FineTuneProfile | Refusal:
    """With the defaults that the job began under: its data were prepared for them, and its checkpoints are of them."""
    if before is None or isinstance(profile, Refusal):
        return profile
    return profile.model_copy(update={"spec": profile.spec.model_copy(update={"defaults": before.defaults})})


def complete(job: FineTuneJob, profile: FineTuneProfile | None, before: PrepareStatus | None) -> FineTuneJob | Refusal:
    """The job with its profile's defaults, as `as_begun` gives them. `profile` None: it has none any more."""
    defaults = profile.spec.defaults if profile else before.defaults if before else None
    try:
        return with_defaults(job, defaults)
    except ValidationError as error:
        return _invalid(against_defaults(error, profile.metadata.name if profile else ""))


def check(job: FineTuneJob, profile: FineTuneProfile) -> Refusal | None:
    """What this version cannot do, or what the profile does not allow this job, which has the profile's defaults."""
    if problems := unsupported(job.spec):
        return _invalid(problems)
    problems = not_allowed(job, profile)
    return Refusal(Reason.NOT_ALLOWED_BY_PROFILE, "; ".join(map(str, problems))[:4096]) if problems else None
