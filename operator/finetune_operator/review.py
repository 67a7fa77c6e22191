"""PURE. What an AdmissionReview asks, whose rights it needs, and the answer.

The object is what the API server would store: pruned, with the schema's defaults, past the CRD's rules. What is refused
here is what those cannot see: rules between a job and its profile, and what its author may use.
"""

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from finetune_api.budget import account
from finetune_api.defaults import with_defaults
from finetune_api.job import parse
from finetune_api.model import Label, Path, Problem, Subdomain, problems_of
from finetune_api.policy import against_defaults, not_allowed
from finetune_api.profile import FineTuneProfile
from finetune_api.support import unsupported, unsupported_profile
from finetune_operator.accept import Refusal, select_profile

Object = Mapping[str, Any]
MAX_PROBLEMS = 16


def _with_metadata(value: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value.get("metadata"), dict):
        raise ValueError("it must have metadata")
    return value


class _Part(BaseModel):
    """A part of an AdmissionReview; an API server may send more than is looked at."""

    model_config = ConfigDict(extra="ignore", alias_generator=to_camel, strict=True)


class _Kind(_Part):
    kind: Literal["FineTuneJob", "FineTuneProfile"]


class _UserInfo(_Part):
    """authentication.k8s.io/v1 UserInfo."""

    username: str
    uid: str | None = None
    groups: list[str] | None = None
    extra: dict[str, list[str]] | None = None


class _Request(_Part):
    uid: Annotated[str, Field(max_length=128)] = ""
    kind: _Kind
    operation: Literal["CREATE", "UPDATE"]
    namespace: Label | Literal[""] = ""
    name: Subdomain | Literal[""] = ""
    user_info: _UserInfo
    object: Annotated[dict[str, Any], AfterValidator(_with_metadata)]
    old_object: Annotated[dict[str, Any], AfterValidator(_with_metadata)] | None = None


class _Review(_Part):
    api_version: Literal["admission.k8s.io/v1"]
    request: _Request


_NAME = TypeAdapter(Subdomain)


def is_name(value: object) -> bool:
    """Whether this can be an object's name, and so a part of a path."""
    try:
        _NAME.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


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
        """Raises Malformed. Nothing of a review is used for anything before all of it was read here."""
        try:
            request = _Review.model_validate(body).request
        except ValidationError as error:
            raise Malformed("; ".join(map(str, problems_of(error)[:4]))[:1024]) from None
        new, old = request.object, request.old_object
        name = request.name or new["metadata"].get("name") or ""
        return cls(
            uid=request.uid,
            kind=request.kind.kind,
            operation=request.operation,
            namespace=request.namespace,
            name=name if is_name(name) else "",
            user=request.user_info.model_dump(exclude_none=True),
            new=new,
            old=old,
        )

    @property
    def spec(self) -> Object:
        spec = self.new.get("spec")
        return spec if isinstance(spec, dict) else {}

    @property
    def leaves(self) -> bool:
        """It is being deleted: nothing may hold that up."""
        return "deletionTimestamp" in self.new["metadata"]


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


def reads_as_job(request: Request) -> bool:
    """Whether the object is a FineTuneJob by its own rules, so that what it names can be looked up."""
    try:
        parse(_named(request.new, request.namespace))
    except ValidationError:
        return False
    return True


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
