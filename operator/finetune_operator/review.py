"""PURE. What an AdmissionReview asks, whose rights it needs, and the answer.

The object is what the API server would store: pruned, with the schema's defaults, past the CRD's rules. What is refused
here is what those cannot see: rules between a job and its profile, and what its author may use.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from pydantic import ValidationError

from finetune_api.budget import account
from finetune_api.defaults import with_defaults
from finetune_api.job import parse
from finetune_api.model import Path, Problem, problems_of
from finetune_api.policy import against_defaults, not_allowed
from finetune_api.profile import FineTuneProfile
from finetune_api.support import unsupported, unsupported_profile
from finetune_operator.accept import Refusal, select_profile

Object = Mapping[str, Any]
MAX_PROBLEMS = 16


class Malformed(Exception):
    """The body is no AdmissionReview that this webhook is registered for."""


@dataclass(frozen=True)
class Request:
    """The request of an AdmissionReview, as far as it is looked at."""

    uid: str
    kind: str
    """FineTuneJob or FineTuneProfile."""
    operation: str
    namespace: str
    name: str
    user: Object
    """authentication.k8s.io/v1 UserInfo: username, groups, uid, extra."""
    new: Object
    old: Object | None

    @classmethod
    def read(cls, body: Any) -> "Request":
        """Raises Malformed."""
        request = body.get("request") if isinstance(body, dict) else None
        if not isinstance(request, dict) or body.get("apiVersion") != "admission.k8s.io/v1":
            raise Malformed("the body must be an AdmissionReview of admission.k8s.io/v1 with a request")
        kind, new, user = request.get("kind"), request.get("object"), request.get("userInfo")
        name = kind.get("kind") if isinstance(kind, dict) else None
        if name not in ("FineTuneJob", "FineTuneProfile") or request.get("operation") not in ("CREATE", "UPDATE"):
            raise Malformed("only FineTuneJobs and FineTuneProfiles that are created or updated are reviewed")
        if not _is_object(new) or not isinstance(user, dict):
            raise Malformed("request.object and request.userInfo must be objects")
        old = request.get("oldObject")
        return cls(
            uid=str(request.get("uid", "")),
            kind=name,
            operation=request["operation"],
            namespace=str(request.get("namespace") or ""),
            name=str(request.get("name") or new["metadata"].get("name") or ""),
            user=user,
            new=new,
            old=old if _is_object(old) else None,
        )

    @property
    def spec(self) -> Object:
        spec = self.new.get("spec")
        return spec if isinstance(spec, dict) else {}

    @property
    def leaves(self) -> bool:
        """It is being deleted: nothing may hold that up."""
        return "deletionTimestamp" in self.new["metadata"]


def _is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and isinstance(value.get("metadata"), dict)


class Use(NamedTuple):
    """An object of the job's namespace that its author wants pods to use, and verbs one of which must be allowed."""

    path: Path
    resource: str
    name: str
    verbs: tuple[str, ...]

    def refusal(self, user: Object, namespace: str) -> Problem:
        verbs = " or ".join(self.verbs)
        return Problem(
            self.path,
            f"found {self.name!r}; {user.get('username', '')!r} may name only {self.resource} in {namespace!r} "
            f"on which it has the verb {verbs}",
        )


SECRET_VERBS = ("get", "use")
"""`use` grants a job the Secret and its author no sight of it."""
ACCOUNT_VERBS = ("impersonate", "use")
_SECRETS: tuple[Path, ...] = (
    ("credentials", "secretRef", "name"),
    ("tracking", "mlflow", "secretRef", "name"),
    ("tracking", "wandb", "secretRef", "name"),
)
_ACCOUNTS: tuple[Path, ...] = (("credentials", "serviceAccountName"),)


def uses(request: Request) -> Iterator[Use]:
    """What a job names that it did not name before."""
    if request.kind != "FineTuneJob":
        return
    old = (request.old or {}).get("spec") or {}
    for resource, paths, verbs in (("secrets", _SECRETS, SECRET_VERBS), ("serviceaccounts", _ACCOUNTS, ACCOUNT_VERBS)):
        for path in paths:
            name = _at(request.spec, path)
            if isinstance(name, str) and name != _at(old, path):
                yield Use(("spec", *path), resource, name, verbs)


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


@dataclass(frozen=True)
class Verdict:
    """Allowed where there is no problem. `forbidden`: somebody else could do it, the object as such is fine."""

    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    forbidden: bool = False


def judge_profile(request: Request) -> Verdict:
    """A FineTuneProfile by itself."""
    return Verdict(_added(_profile_problems(request.new), _profile_problems(request.old)))


def _profile_problems(raw: Object | None) -> list[Problem]:
    if raw is None:
        return []
    try:
        return unsupported_profile(FineTuneProfile.model_validate(raw).spec)
    except ValidationError as error:
        return problems_of(error)


def judge_job(request: Request, profiles: Sequence[Object], now: datetime.datetime) -> Verdict:
    """A FineTuneJob under its profile. `profiles`: what `select_profile` chooses from."""
    found = _under_profile(request.new, request.namespace, profiles, now)
    before = _under_profile(request.old, request.namespace, profiles, now) if request.old else _Found()
    invalid = _added(found.invalid, before.invalid)
    forbidden = () if invalid else _added(found.forbidden, before.forbidden)
    return Verdict(invalid + forbidden, found.warnings, forbidden=bool(forbidden))


def _added(now: Sequence[Problem], before: Sequence[Problem]) -> tuple[Problem, ...]:
    """An update is refused for what it makes wrong: a profile that has become stricter must not keep a job from being
    suspended."""
    return tuple(problem for problem in dict.fromkeys(now) if problem not in before)


class _Found(NamedTuple):
    invalid: Sequence[Problem] = ()
    """What nobody could run."""
    forbidden: Sequence[Problem] = ()
    """What the profile does not allow."""
    warnings: tuple[str, ...] = ()


def _under_profile(raw: Object, namespace: str, profiles: Sequence[Object], now: datetime.datetime) -> _Found:
    try:
        job = parse(_named(raw, namespace))
    except ValidationError as error:
        return _Found(problems_of(error))
    profile = select_profile(job.spec.profile, profiles)
    if isinstance(profile, Refusal):
        # It may come later than the job, which waits for it.
        return _Found(unsupported(job.spec), (), (profile.message,))
    try:
        whole = with_defaults(job, profile.spec.defaults)
    except ValidationError as error:
        return _Found(against_defaults(error, profile.metadata.name))
    return _Found(unsupported(whole.spec), not_allowed(whole, profile), _of_budget(profile, namespace, now))


def _of_budget(profile: FineTuneProfile, namespace: str, now: datetime.datetime) -> tuple[str, ...]:
    """A job that its namespace's budget does not bear now is not refused: it waits for the next period."""
    found = account(profile, namespace, now)
    if found is None or found.spent < found.allowed:
        return ()
    until = f"{found.ends:%Y-%m-%d %H:%M} UTC"
    return (f"profile {profile.metadata.name!r}, namespace {namespace!r}: {found}; the job waits until {until}",)


def _named(raw: Object, namespace: str) -> dict[str, Any]:
    """Without its status, and with a name also where the server is still to make one."""
    meta = {key: value for key, value in raw["metadata"].items() if key != "managedFields"}
    name = {"name": meta.get("name") or f"{meta.get('generateName', '')}x"}
    return {key: value for key, value in raw.items() if key != "status"} | {
        "metadata": meta | name | {"namespace": namespace}
    }


def answer(request: Request, verdict: Verdict) -> dict[str, Any]:
    """The AdmissionReview that goes back."""
    response: dict[str, Any] = {"uid": request.uid, "allowed": not verdict.problems}
    if verdict.problems:
        response["status"] = _status(request, verdict)
    if verdict.warnings:
        # A client shows 256 characters of each, and the API server drops what is beyond 4096 in all.
        response["warnings"] = [text[:256] for text in verdict.warnings[:8]]
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}


def _status(request: Request, verdict: Verdict) -> dict[str, Any]:
    shown = verdict.problems[:MAX_PROBLEMS]
    rest = len(verdict.problems) - len(shown)
    text = "; ".join(map(str, shown)) + (f" (and {rest} more)" if rest else "")
    code, reason = (403, "Forbidden") if verdict.forbidden else (422, "Invalid")
    return {"code": code, "reason": reason, "message": f"{request.kind} {request.name!r}: {text}"[:4096]}
