"""The base of every type: frozen, camelCase in JSON, strict about unknown fields, with rules that say why."""

import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Strict,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.config import JsonDict
from pydantic.json_schema import JsonSchemaValue
from pydantic_core.core_schema import CoreSchema

from finetune_api.bounds import MOST, bound, shown

Path = tuple[str | int, ...]


class Rule(NamedTuple):
    """One cross-field rule in both of its forms: `cel` for the API server, `check` for Python.

    A contract test holds them equal.
    """

    cel: str
    message: str
    check: Callable[[Any], bool]
    field: str | None = None
    """The member that the API server's error shall name, in JSON's spelling."""

    def to_cel(self) -> dict[str, str]:
        """The rule as an entry of x-kubernetes-validations."""
        entry = {"rule": self.cel, "message": self.message}
        return entry | {"fieldPath": f".{self.field}"} if self.field else entry


class Problem(NamedTuple):
    """What is wrong with one field of an object: `path` from the object's root, `message` one sentence."""

    path: Path
    message: str

    def __str__(self) -> str:
        return f"{format_path(self.path)}: {self.message}" if self.path else self.message


class ApiModel(BaseModel):
    """A frozen value of the API.

    `rules` are checked here and rendered as CEL in the CRD. `union` maps each value of `type` to the one member that it
    may carry, by its attribute: `{"LoRA": "lora"}`; the others must be absent.
    """

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )
    rules: ClassVar[tuple[Rule, ...]] = ()
    union: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def all_rules(cls) -> tuple[Rule, ...]:
        """The rules as written, then one for each member of the union."""
        return cls.rules + tuple(_member_rule(member, cls.union) for member in dict.fromkeys(cls.union.values()))

    @model_validator(mode="before")
    @classmethod
    def _prune_nulls(cls, data: Any) -> Any:
        """`null` is as good as nothing, as for the API server, which prunes it before it fills in defaults."""
        if not isinstance(data, dict):
            return data
        known = _members(cls)
        return {key: value for key, value in data.items() if value is not None or key not in known}

    @model_validator(mode="after")
    def _hold_rules(self) -> Self:
        for rule in _rules(type(self)):
            if not rule.check(self):
                raise ValueError(rule.message)
        return self

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        """Whole numbers of at most 2^53 and times of some centuries, in every field of every model."""
        schema = handler(source)
        bound(handler.resolve_ref_schema(schema))
        return schema

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The JSON schema with the rules in it, as the API server reads them."""
        described = handler.resolve_ref_schema(handler(schema))
        if rules := cls.all_rules():
            described["x-kubernetes-validations"] = [rule.to_cel() for rule in rules]
        return described

    def to_json(self) -> dict[str, Any]:
        """The JSON object in API form: camelCase, absent instead of null."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


@cache
def _members(model: type[ApiModel]) -> frozenset[str | None]:
    """The names of its fields, in both spellings."""
    return frozenset(name for field, info in model.model_fields.items() for name in (field, info.alias))


@cache
def _rules(model: type[ApiModel]) -> tuple[Rule, ...]:
    return model.all_rules()


def _member_rule(member: str, union: Mapping[str, str]) -> Rule:
    owners = [owner for owner, name in union.items() if name == member]
    return Rule(
        cel=f"!has(self.{to_camel(member)}) || self.type in [{', '.join(repr(o) for o in owners)}]",
        message=f"{to_camel(member)} is allowed only where type is {' or '.join(owners)}",
        check=lambda self: getattr(self, member) is None or self.type in owners,
        field=to_camel(member),
    )


def problems_of(error: ValidationError, root: Path = ()) -> list[Problem]:
    """pydantic's findings as problems, in the words of someone who writes YAML."""
    return [
        Problem(root + tuple(entry["loc"]), _sentence(entry["type"], entry["msg"], entry.get("input")))
        for entry in error.errors(include_url=False)
    ]


def _sentence(kind: str, message: str, found: Any) -> str:
    if kind == "extra_forbidden":
        return "this field does not exist"
    if kind == "missing":
        return "is required"
    text = message.removeprefix("Value error, ")
    if isinstance(found, str | int | float | bool):
        return f"found {shown(found)}; {text[0].lower()}{text[1:]}"
    return text


def format_path(path: Path) -> str:
    """`("spec", "datasets", 0, "uri")` -> `spec.datasets[0].uri`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def no_traversal(uri: str) -> str:
    if any(part in ("..", ".") for part in uri.split("://", 1)[-1].split("/")):
        raise ValueError("a URI must not contain '.' or '..' as a path segment")
    return uri


NO_TRAVERSAL: JsonDict = {
    "x-kubernetes-validations": [
        {
            "rule": "!self.matches('(^|/)[.][.]?(/|$)')",
            "message": "a URI must not contain '.' or '..' as a path segment",
        }
    ]
}

_ADDRESS = "^s3://[0-9]+([.][0-9]+){3}(/|$)"


def _no_address(uri: str) -> str:
    if re.search(_ADDRESS, uri):
        raise ValueError("a bucket must not be named like an address")
    return uri


_URI_RULES: JsonDict = {
    "x-kubernetes-validations": [
        *NO_TRAVERSAL["x-kubernetes-validations"],  # type: ignore[misc]
        {"rule": f"!self.matches('{_ADDRESS}')", "message": "a bucket must not be named like an address"},
    ]
}

S3_URI = r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9!_.*'()/=+@:,& -]*)?$"
S3Uri = Annotated[
    str,
    StringConstraints(pattern=S3_URI, max_length=1024),
    Field(json_schema_extra=_URI_RULES),
    AfterValidator(no_traversal),
    AfterValidator(_no_address),
]
"""`s3://bucket/key-or-prefix`."""

DATA_URI = (
    r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9!_.*'()/=+@:,& -]*)?|stage://[a-z0-9]([-a-z0-9]*[a-z0-9])?)$"
)
DataUri = Annotated[
    str,
    StringConstraints(pattern=DATA_URI, max_length=1024),
    Field(json_schema_extra=_URI_RULES),
    AfterValidator(no_traversal),
    AfterValidator(_no_address),
]
"""`s3://bucket/key-or-prefix`, or `stage://name`: the rows that an earlier stage of the job wrote."""

MODEL_URI = (
    r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9!_.*'()/=+@:,& -]*)?"
    r"|hf://[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+(@[A-Za-z0-9_./-]+)?"
    r"|pvc://[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/[A-Za-z0-9_./-]*)$"
)
ModelUri = Annotated[
    str,
    StringConstraints(pattern=MODEL_URI, max_length=1024),
    Field(json_schema_extra=_URI_RULES),
    AfterValidator(no_traversal),
    AfterValidator(_no_address),
]
"""`s3://bucket/prefix/`, `hf://org/name@revision` or `pvc://claim/path`."""

Label = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
"""An RFC 1123 label."""
Subdomain = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=253)]
"""An RFC 1123 subdomain: the name of a Secret, a ServiceAccount, a profile."""
Flag = Annotated[bool, Strict()]
"""The API server takes no `"yes"` for a boolean."""
Figures = Annotated[
    dict[str, float],
    BeforeValidator(lambda told: _finite(told) if isinstance(told, dict) else told),
]
"""Figures by name, without those that are infinite or no number: JSON has no word for them."""
ShortText = Annotated[str, StringConstraints(max_length=253)]
LongText = Annotated[str, StringConstraints(max_length=4096)]


def _finite(told: dict[Any, Any]) -> dict[Any, Any]:
    return {name: value for name, value in told.items() if not isinstance(value, float) or math.isfinite(value)}


def _bounded_quantity(text: str) -> str:
    if quantity(text) > MOST:
        raise ValueError("it must be at most 8Pi")
    return text


Quantity = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$", max_length=32),
    AfterValidator(_bounded_quantity),
]
"""A Kubernetes quantity of at most 2^53, always written as a string."""
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

_UNITS = {"m": 1e-3, "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15} | {
    f"{prefix}i": 1024 ** (power + 1) for power, prefix in enumerate("KMGTP")
}


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number: bytes, cores or a count. `"2Gi"` -> 2147483648."""
    number = text.rstrip("mkKMGTPi")
    return float(number) * float(_UNITS[text[len(number) :]])
