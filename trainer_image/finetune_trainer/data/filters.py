"""The filters, methods and functions that templates have: those of Jinja that are bounded, and bounded ones of our own.

What is replaced here would make a long text, a long list or a great number out of a short one.
"""

import datetime
import json
import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import TemplateError, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS as JINJA
from jinja2.filters import do_indent, make_attrgetter
from jinja2.utils import Namespace
from markupsafe import Markup

from finetune_trainer.data.budget import budget

FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items", "last",
    "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select", "selectattr",
    "sort", "string", "title", "trim", "truncate", "unique", "upper", "wordcount",
)  # fmt: skip
"""Filters of Jinja that are taken as they are: each makes at most some times as much as it is given."""
INDENT_LIMIT = 64
_JSON_INDENT = 16
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_ESCAPED = 6
"""Characters that escaping makes of one."""


class PlainNamespace(Namespace):
    """`namespace()`, as transformers has it: without names that begin with `_`."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}; names are texts that do not begin with `_`")


def raise_exception(message: Any) -> None:
    """Ends a rendering, in the template's own words."""
    raise TemplateError(str(message))


def strftime_now(form: str) -> str:
    """A day that never changes: the same data give the same tokens on every day."""
    if re.search(r"%(?!-?[A-Za-z%])", str(form)) or len(form) > 256:
        raise SecurityError("`strftime_now` takes a format of at most 256 characters, without widths")
    return datetime.datetime(2025, 1, 1).strftime(form)


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if not -16 <= precision <= 16:
        raise SecurityError("`round` takes -16 to 16 digits")
    return JINJA["round"](value, precision, method)


@pass_environment
def _sum(environment: Any, values: Any, attribute: Any = None, start: Any = 0) -> Any:
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    for value in values:
        if not isinstance(start, int | float) or not isinstance(value, int | float):
            raise SecurityError("`sum` adds numbers only")
        start = budget().value(start + value)
    return start


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    """The filter, which takes what is no text as its text."""
    return _replaced(str(text), str(old), str(new), -1 if count is None else count)


def _replaced(text: str, old: str, new: str, count: int = -1) -> str:
    """The method."""
    times = text.count(old) if count < 0 else min(count, text.count(old))
    wide = _ESCAPED if isinstance(text, Markup) else 1
    budget().text(len(text) + times * max(0, wide * len(new) - len(old)))
    return text.replace(old, new, count)


@pass_environment
def _join(environment: Any, values: Any, d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    return _joined(str(d), map(str, values))


def _joined(text: str, values: Any) -> str:
    """The method."""
    parts, length = [], 0
    wide = _ESCAPED if isinstance(text, Markup) else 1
    for part in budget().each(values):
        parts.append(part)
        length += len(text) + wide * len(part)
        budget().text(length) if length > 2**20 else None
    budget().text(length)
    return text.join(parts)


def _split(text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    return text.split(sep, _parts(maxsplit))


def _rsplit(text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    return text.rsplit(sep, _parts(maxsplit))


def _parts(wanted: int) -> int:
    """No more than can be paid for: one more part than that ends the rendering."""
    most = budget().left + 1
    return most if wanted < 0 else min(wanted, most)


def _splitlines(text: str, keepends: bool = False) -> list[str]:
    budget().spend(sum(text.count(end) for end in _LINE_ENDS))
    return text.splitlines(keepends)


def _format(text: str, *args: Any, **kwargs: Any) -> str:
    pieces: list[str] = []
    place = length = 0
    for literal, field, spec, conversion in string.Formatter().parse(text):
        pieces.append(literal)
        if field is not None:
            if spec or conversion or not re.fullmatch(r"\w*", field):
                raise SecurityError("`format` takes plain fields, such as {} and {name}, without a width or attribute")
            value = kwargs[field] if field and not field.isdecimal() else args[int(field or place)]
            place += not field
            pieces.append(str(budget().value(value)))
            length += len(pieces[-1])
        budget().text(length + len(literal))
    return "".join(pieces)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Raises SecurityError where the width is the template's way to write more than it was given."""
    if (isinstance(width, str) and len(width) > INDENT_LIMIT) or (
        not isinstance(width, str) and not 0 <= width <= INDENT_LIMIT
    ):
        raise SecurityError(f"`indent` takes a width from 0 to {INDENT_LIMIT}")
    text = text if isinstance(text, str) else str(text)
    budget().text(len(text) + (1 + text.count("\n")) * (len(width) if isinstance(width, str) else width))
    return do_indent(text, width, first, blank)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | str | None = None, separators: Any = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """As transformers has it: without the escapes that HTML needs."""
    if indent is not None and (len(indent) if isinstance(indent, str) else indent) > _JSON_INDENT:
        raise SecurityError(f"`tojson` takes an indent of at most {_JSON_INDENT}")
    if separators is not None and any(len(separator) > _JSON_INDENT for separator in separators):
        raise SecurityError(f"`tojson` takes separators of at most {_JSON_INDENT} characters")
    budget().value(value)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, check_circular=True
    )
    if indent is None and separators is None:
        return encoder.encode(value)
    return "".join(budget().each(encoder.iterencode(value)))


OWN: Mapping[str, Callable[..., Any]] = {
    "indent": _indent, "join": _join, "replace": _replace, "round": _round, "sum": _sum, "tojson": _tojson,
}  # fmt: skip
METHODS: Mapping[str, Callable[..., Any]] = {
    "format": _format, "join": _joined, "replace": _replaced, "rsplit": _rsplit, "split": _split,
    "splitlines": _splitlines,
}  # fmt: skip
"""Methods of texts that are our own."""


def chosen() -> dict[str, Callable[..., Any]]:
    """All filters by name."""
    return {name: JINJA[name] for name in FILTERS} | dict(OWN)
