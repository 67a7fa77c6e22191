"""A profile's defaults and locks: what they fill of a job's spec, and what a job may not say otherwise."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.alias_generators import to_camel

from finetune_api.dataset import Holdout
from finetune_api.job import Credentials, FineTuneJob, FineTuneJobSpec
from finetune_api.model import ApiModel, Path, Problem, problems_of
from finetune_api.profile import FineTuneProfile, FineTuneProfileSpec
from finetune_api.stages import effective
from finetune_api.training import Training

Json = Mapping[str, Any]
MAX_BYTES = 32_768
"""Of defaults as JSON: they are written beside each attempt."""
NOT_FOR_PROFILES = (
    "profile",
    "runPolicy.suspend",
    "runPolicy.ttlSecondsAfterFinished",
    "runPolicy.managedBy",
)
"""What says which profile it is, may change while a job runs, or is needed where no profile can be read."""
OF_STAGES = ("method", "tuning", "datasets", "training")
ALTERNATIVES: Mapping[type[ApiModel], tuple[tuple[str, ...], ...]] = {
    Holdout: (("fraction", "datasets"),),
    Credentials: (("secretRef", "serviceAccountName"),),
    Training: (("epochs", "maxSteps"),),
}
"""Members of which a job says one, and then means no other."""
_SMALLEST: Json = {
    "baseModel": {"uri": "s3://any/"},
    "datasets": [{"name": "any", "uri": "s3://any/"}],
    "output": {"uri": "s3://any/"},
}
"""Beside it every default can be checked by itself."""


def with_defaults(job: FineTuneJob, defaults: Json | None) -> FineTuneJob:
    """The job with what it leaves out. Raises ValidationError where what it says does not go with that."""
    if not defaults:
        return job
    said = job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    spec = FineTuneJobSpec.model_validate(merged(defaults, said, FineTuneJobSpec))
    return job.model_copy(update={"spec": spec})


def merged(defaults: Json, said: Json, model: type[ApiModel] | None) -> dict[str, Any]:
    """`said` over `defaults`, member by member; lists are taken whole. What excludes a member that is said, or belongs
    to another `type`, is left out of the defaults."""
    kept = {key: value for key, value in defaults.items() if value is not None and not _excluded(key, said, model)}
    result = kept | dict(said)
    for key, value in said.items():
        if isinstance(value, dict) and isinstance(kept.get(key), dict):
            result[key] = merged(kept[key], value, _model_at(model, key))
    return result


def _excluded(key: str, said: Json, model: type[ApiModel] | None) -> bool:
    if model is None:
        return False
    # As the API server fills it in: who writes `lora` means LoRA, whatever a profile's default is.
    kind = said.get("type", model.model_fields["type"].default) if "type" in model.model_fields else None
    if kind and model.union and (key == "type" or key in map(to_camel, model.union.values())):
        return key == "type" or to_camel(model.union.get(kind, "")) != key
    return any(key in group and any(other in said for other in group) for group in ALTERNATIVES.get(model, ()))


def locked(job: FineTuneJob, profile: FineTuneProfile) -> Iterator[Problem]:
    """Where a job, its defaults filled in, says otherwise than the profile locks it to."""
    wanted = FineTuneJobSpec.model_validate(merged(_SMALLEST, profile.spec.defaults or {}, FineTuneJobSpec))
    for text in profile.spec.locked:
        names = text.split(".")
        expected = _at(wanted, names)
        for path, spec in _places(job.spec, names[0]):
            found = _at(spec, names)
            if found not in (_NOT_OF_THIS_TYPE, expected):
                said = "nothing" if found is None else _short(found)
                allowed = "nothing: leave it out" if expected is None else _short(expected)
                message = f"found {said}; profile {profile.metadata.name!r} locks it to {allowed}"
                yield Problem((*path, *names[1:]), message)


def _places(spec: FineTuneJobSpec, field: str) -> Iterator[tuple[Path, FineTuneJobSpec]]:
    """Every spec in which a field holds, with where the user wrote it."""
    if field not in OF_STAGES or not spec.stages:
        yield ("spec", field), spec
        return
    for stage in effective(spec):
        if not (stage.generate and field == "method"):
            yield stage.path(field), stage.spec


class _Nothing:
    """A member of a union's other type."""


_NOT_OF_THIS_TYPE = _Nothing()


def _at(value: Any, names: list[str]) -> Any:
    """The value at a path as JSON, an absent object as its defaults are; None where there is none."""
    for name in names:
        field = next(n for n, f in type(value).model_fields.items() if (f.alias or n) == name)
        if field in value.union.values() and value.union.get(value.type) != field:
            return _NOT_OF_THIS_TYPE
        model = _model_at(type(value), name)
        value = getattr(value, field)
        if value is None and model is not None:
            value = _empty(model)
        if value is None:
            return None
    if isinstance(value, ApiModel):
        return value.to_json()
    return (
        [item.to_json() if isinstance(item, ApiModel) else item for item in value] if isinstance(value, list) else value
    )


def _empty(model: type[ApiModel]) -> ApiModel | None:
    try:
        return model()
    except ValidationError:
        return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "…"


def problems(spec: FineTuneProfileSpec) -> Iterator[Problem]:
    """What is wrong with a profile's own defaults and locks."""
    defaults = spec.defaults or {}
    size = len(json.dumps(defaults).encode())
    if size > MAX_BYTES:
        yield Problem(("spec", "defaults"), f"found {size} bytes of JSON; at most {MAX_BYTES} are allowed")
    for text in NOT_FOR_PROFILES:
        if (value := _said(defaults, text.split("."))) is not None:
            path = ("spec", "defaults", *text.split("."))
            yield Problem(path, f"found {value!r}; it is a job's own, and has no default")
    try:
        FineTuneJobSpec.model_validate(merged(_SMALLEST, defaults, FineTuneJobSpec))
    except ValidationError as error:
        for problem in problems_of(error):
            yield Problem(("spec", "defaults", *problem.path), problem.message)
    for index, text in enumerate(spec.locked):
        if why := _unlockable(text.split("."), defaults):
            yield Problem(("spec", "locked", index), f"found {text!r}; {why}")


def _said(value: Any, names: list[str]) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _unlockable(names: list[str], defaults: Json) -> str | None:
    model: type[ApiModel] | None = FineTuneJobSpec
    for depth, name in enumerate(names):
        if model is None:
            return f"{'.'.join(names[:depth])} has no members that can be locked by themselves"
        if name not in {field.alias or key for key, field in model.model_fields.items()}:
            return f"it must be a path of a FineTuneJob's spec, such as training.maxLength; there is no {name}"
        model = _model_at(model, name)
    if ".".join(names) in (*NOT_FOR_PROFILES, "runPolicy", "stages"):
        return "it is a job's own"
    if _said(_SMALLEST, names) is not None and _said(defaults, names) is None:
        return "every job must say it: give it a value in defaults"
    return None


def _model_at(model: type[ApiModel] | None, name: str) -> type[ApiModel] | None:
    """The type of an object's member; None where that is a scalar, a list or a map."""
    if model is None:
        return None
    found = next((field.annotation for key, field in model.model_fields.items() if (field.alias or key) == name), None)
    options = () if get_origin(found) in (list, dict) else (found, *get_args(found))
    return next((o for o in options if isinstance(o, type) and issubclass(o, ApiModel)), None)
