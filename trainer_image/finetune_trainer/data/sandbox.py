"""Jinja for strangers: an allow-list of all that a template may name, and a budget for each rendering."""

import datetime
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.tests import TESTS as JINJA
from jinja2.utils import Cycler, Joiner, Namespace
from markupsafe import Markup

from finetune_trainer.data import filters
from finetune_trainer.data.budget import OUTPUT_LIMIT, PER_STEP, Exceeded, begin, budget

SOURCE_LIMIT = 2**18
"""Characters of a template."""
TESTS = (
    "boolean", "defined", "divisibleby", "eq", "equalto", "==", "even", "false", "float", "ge", ">=", "greaterthan",
    "gt", ">", "in", "integer", "iterable", "le", "<=", "lessthan", "lt", "<", "lower", "mapping", "ne", "!=", "none",
    "number", "odd", "sameas", "sequence", "string", "true", "undefined", "upper",
)  # fmt: skip
_TEXTS = (
    "capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip",
    "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip",
    "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
)  # fmt: skip
_DAYS = ("year", "month", "day", "weekday", "isoweekday", "isoformat")
_TIMES = ("hour", "minute", "second", "microsecond", "isoformat")
_LOOPS = (
    "changed", "cycle", "depth", "depth0", "first", "index", "index0", "last", "length", "nextitem", "previtem",
    "revindex", "revindex0",
)  # fmt: skip
ATTRIBUTES: Mapping[type, frozenset[str]] = {
    str: frozenset(_TEXTS),
    Markup: frozenset(_TEXTS),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
    datetime.date: frozenset(_DAYS),
    datetime.time: frozenset(_TIMES),
    datetime.datetime: frozenset((*_DAYS, *_TIMES)),
    LoopContext: frozenset(_LOOPS),
    Cycler: frozenset(("current", "next", "reset")),
    Macro: frozenset(("arguments", "caller", "catch_kwargs", "catch_varargs", "name")),
}
"""What a value of each type has besides its items; a value of another type has nothing."""
_OF_DICT = frozenset(dir(dict))


class BadTemplate(Exception):
    """A template that cannot be compiled; the text says why."""


class Failed(Exception):
    """A rendering that failed; the text says why. `exceeded`: it took more than it may."""

    def __init__(self, message: str, exceeded: bool = False) -> None:
        super().__init__(message)
        self.exceeded = exceeded


class Environment(ImmutableSandboxedEnvironment):
    """What is not listed does not exist, and what exists is paid for."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self, **options: Any) -> None:
        # Nothing is computed while a template is compiled: no budget would bound it.
        super().__init__(optimized=False, finalize=_written, **options)
        self.filters = {name: _paid(function) for name, function in filters.chosen().items()} | _INNER
        self.tests = {name: _paid(JINJA[name]) for name in TESTS}
        self.globals.clear()
        self.globals.update(
            range=safe_range, dict=dict, namespace=filters.PlainNamespace, cycler=Cycler, joiner=Joiner
        )  # fmt: skip

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _instrument(tree)
        return tree

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute not in _OF_DICT:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if isinstance(obj, str) and attribute in filters.METHODS:
            return functools.partial(filters.METHODS[attribute], obj)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, str | int):
            budget().spend(1)
        elif isinstance(obj, str) and argument in filters.METHODS:
            return self.getattr(obj, str(argument))
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return attr in ATTRIBUTES.get(type(obj), ())

    def wrap_str_format(self, value: Any) -> None:
        """Formatting pads to a width of the template's choice: `format` is a method of our own."""

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        paid = budget()
        paid.spend(1)
        if isinstance(obj, LoopContext) and args:
            args = (paid.each(args[0]), *args[1:])
        elif isinstance(obj, Macro):
            if obj.catch_varargs or obj.catch_kwargs:
                paid.value([args, kwargs])
        else:
            # A method goes through its own text, and may go through the one that it is given.
            paid.items(getattr(obj, "__self__", None) or (obj.args[0] if isinstance(obj, functools.partial) else ()))
            paid.items(args[0] if args else ())
        return paid.value(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        paid = budget()
        if isinstance(left, int | float) and isinstance(right, int | float):
            if operator == "**" and (abs(left) > 10**6 or abs(right) > 16):
                raise SecurityError("`**` is allowed with small numbers only")
        elif operator in ("*", "**"):
            raise SecurityError(f"`{operator}` is allowed between numbers only")
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("`%` is allowed between numbers only; `~` joins text")
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            paid.text(len(left) + len(right))
            return left + right
        return paid.value(super().call_binop(context, operator, left, right))


def _instrument(tree: nodes.Template) -> None:
    """Puts filters of our own around what Jinja does without asking the environment."""
    every = list(tree.find_all(nodes.Node))
    for node in every:
        if isinstance(node, nodes.For):
            node.iter = _within("_each", node.iter)
        elif isinstance(node, nodes.AssignBlock):
            # Without a node of its own, the innermost filter of a block takes what the block wrote.
            node.filter = nodes.Filter(node.filter, "_value", [], [], None, None, lineno=node.lineno)
        elif isinstance(node, nodes.Output):
            plain = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
            if plain >= PER_STEP // 4:
                node.nodes.insert(0, _within("_plain", nodes.Const(plain, lineno=node.lineno)))
    for parent in every:
        for field, value in list(parent.iter_fields()):
            if isinstance(value, list):
                value[:] = [_counted(item) for item in value]
            elif isinstance(value, nodes.Node):
                setattr(parent, field, _counted(value))


def _counted(node: Any) -> Any:
    """The expression with a filter around it, where it makes or goes through something that may be large."""
    if isinstance(node, nodes.Concat):
        return _within("_concat", nodes.List(node.nodes, lineno=node.lineno))
    if isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return _within("_value", node)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _within("_value", node)
    if isinstance(node, nodes.Compare) and any(
        operand.op in ("in", "notin") or not isinstance(operand.expr, nodes.Const) for operand in node.ops
    ):
        return _within("_step", node)
    return node


def _within(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _each(values: Iterable[Any]) -> Iterator[Any]:
    paid = budget()
    for value in values:
        paid.spend(1)
        yield value


def _value(value: Any) -> Any:
    return budget().value(value)


def _concat(values: list[Any]) -> str:
    texts = [value if type(value) is str else str(value) for value in values]
    budget().text(sum(map(len, texts)))
    return "".join(texts)


def _step(value: Any) -> Any:
    budget().spend(1)
    return value


def _plain(length: int) -> str:
    budget().spend(1 + length // PER_STEP)
    return ""


@pass_context
def _written(context: Any, value: Any) -> Any:
    """What is written, as text. That it needs the context keeps Jinja from writing constants while it compiles."""
    return budget().value(value if isinstance(value, str) else str(budget().value(value)))


_INNER: dict[str, Callable[..., Any]] = {
    "_each": _each, "_value": _value, "_concat": _concat, "_step": _step, "_plain": _plain,
}  # fmt: skip


def _paid(function: Any) -> Callable[..., Any]:
    """A filter or test that pays for what it is given, and then for what it gives."""
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def paying(*args: Any, **kwargs: Any) -> Any:
        paid = budget()
        paid.items(args[place] if len(args) > place else None)
        return paid.value(function(*args, **kwargs))

    return paying


def compiled(env: Environment, source: str) -> Template:
    """Raises BadTemplate."""
    if len(source) > SOURCE_LIMIT:
        raise BadTemplate(f"it has {len(source):,} characters; at most {SOURCE_LIMIT:,} are allowed")
    try:
        with warnings.catch_warnings():
            # Python warns of expressions that cannot work; the rendering will say so.
            warnings.simplefilter("ignore", SyntaxWarning)
            return env.from_string(source)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise BadTemplate(f"line {line}: {short(error.message)}" if line else short(error.message)) from error
    except (RecursionError, MemoryError) as error:
        raise BadTemplate("its parentheses, lists or blocks lie too deep within each other") from error
    except Exception as error:
        # Jinja writes Python, whose compiler has limits of its own.
        raise BadTemplate(f"it cannot be compiled ({type(error).__name__}: {short(str(error))})") from error


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """Raises Failed with what the template said."""
    begin()
    pieces: list[str] = []
    length = 0
    try:
        for piece in template.generate(**variables):
            length += len(piece)
            if length > OUTPUT_LIMIT:
                raise Exceeded(f"it writes more than {OUTPUT_LIMIT:,} characters")
            pieces.append(piece)
        return "".join(pieces)
    except Exceeded as error:
        raise Failed(short(error.message), exceeded=True) from error
    except TemplateError as error:
        raise Failed(short(error.message) or type(error).__name__) from error
    except Exception as error:
        # Whatever is raised here, the template and its variables are the cause.
        raise Failed(short(f"{type(error).__name__}: {error}")) from error


def short(text: str | None) -> str:
    """The first line of what a library said, fit for a sentence of ours."""
    line = next(iter((text or "").strip().splitlines()), "")
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", line)[:300]
