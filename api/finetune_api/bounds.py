"""Bounds of numbers and times that come from outside: within them no arithmetic of ours overflows."""

import datetime
from typing import Any

from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

MOST = 2**53
"""The largest whole number that every JSON parser keeps exactly."""
EARLIEST = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
LATEST = datetime.datetime(3000, 1, 1, tzinfo=datetime.UTC)
_NESTED = ("schema", "items_schema", "values_schema", "keys_schema")


def instant(time: datetime.datetime) -> datetime.datetime:
    """The time in UTC, which is also what a time without a zone is taken for. Raises ValueError where it is out of
    bounds."""
    # Compared before it is converted: the first and the last day of all cannot be converted to every zone.
    plain = time.replace(tzinfo=datetime.UTC)
    if not EARLIEST <= plain <= LATEST:
        raise ValueError(f"it must lie between the years {EARLIEST.year} and {LATEST.year}")
    return plain if time.tzinfo is None else time.astimezone(datetime.UTC)


def parse_time(text: str) -> datetime.datetime:
    """An RFC 3339 time, moved to the nearest bound where it lies beyond. Raises ValueError where it is not one."""
    time = datetime.datetime.fromisoformat(text)
    try:
        return instant(time)
    except ValueError:
        return EARLIEST if time.year < EARLIEST.year else LATEST


def later(time: datetime.datetime, seconds: float) -> datetime.datetime:
    """So many seconds after the time, but not after LATEST; `seconds` may be infinite."""
    left = LATEST - time
    return LATEST if seconds >= left.total_seconds() else time + min(left, datetime.timedelta(seconds=seconds))


def whole(value: Any) -> int:
    """A count as JSON has it. Raises ValueError where it is none, or is larger than MOST."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST:
        raise ValueError(f"it must be a whole number of 0 to 2^53; found {shown(value)}")
    return value


def shown(value: Any) -> str:
    """The value as a message quotes it. Python writes no number of more than 4,300 digits."""
    if isinstance(value, int) and abs(value) > MOST:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:299]}…"


def bound(schema: Any) -> None:
    """Adds the bounds to every number and time of a model's schema, in place; narrower ones of a field stay."""
    if not isinstance(schema, dict):
        return
    match schema.get("type"):
        case "int":
            schema["le"] = min(schema.get("le", MOST), MOST)
            schema["ge"] = max(schema.get("ge", -MOST), -MOST)
        case "model-fields":
            for field in schema["fields"].values():
                _bound_member(field, "schema")
        case "union":
            for choice in schema["choices"]:
                bound(choice)
    for member in _NESTED:
        _bound_member(schema, member)


def _bound_member(schema: dict[str, Any], member: str) -> None:
    inner: CoreSchema | None = schema.get(member)
    if inner is not None and inner["type"] == "datetime":
        schema[member] = no_info_after_validator_function(instant, inner)
    elif not (inner is not None and inner.get("function", {}).get("function") is instant):
        bound(inner)
