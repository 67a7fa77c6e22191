"""Jinja, sandboxed and bounded: the data set's own template for prompts, and the chat template of the model.

A template comes from a stranger: it can reach nothing but its variables, its loops and its output end, and what it does
wrong is said in one sentence.
"""

import contextvars
import datetime
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import StrictUndefined, Template, TemplateError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import do_indent
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune_api.dataset import Columns
from finetune_trainer.data.formats import BadRow

OUTPUT_LIMIT = 4 * 2**20
"""Characters that one rendering may write."""
LOOP_LIMIT = 200_000
"""Steps of all loops of one rendering together."""
INDENT_LIMIT = 64

DEFAULT_CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '### Assistant:\\n' }}{% generation %}{{ message.content + eos_token }}{% endgeneration %}{{ '\\n' }}
{%- else %}
{{- '### ' + message.role | capitalize + ':\\n' + message.content + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"""
"""For models that bring none: `### User:`, the text, an empty line, `### Assistant:`, the answer and EOS."""

_steps: contextvars.ContextVar[list[int]] = contextvars.ContextVar("steps")
_START, _END = "\ufdd0", "\ufdd1"


class BadTemplate(Exception):
    """A template that cannot be compiled."""


class Rendered(NamedTuple):
    text: str
    spans: list[tuple[int, int]] | None
    """Where the assistant speaks, as [start, end) in `text`; None where the template does not mark it."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, as in transformers: marks what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_START}{caller()}{_END}"


class _Environment(ImmutableSandboxedEnvironment):
    """Counts the steps of every loop, and refuses operators that make a long string out of a short one."""

    intercepted_binops = frozenset(["*", "**", "%"])
    _padding = frozenset(["center", "ljust", "rjust", "zfill", "expandtabs"])

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in self._padding:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_bounded", [], [], None, None).set_lineno(loop.lineno)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if not numbers and operator in ("*", "**"):
            raise SecurityError(f"`{operator}` is allowed between numbers only")
        if operator == "**" and (abs(left) > 10**6 or abs(right) > 16):
            raise SecurityError("`**` is allowed with small numbers only")
        if operator == "%" and isinstance(left, str):
            raise SecurityError("`%` is allowed between numbers only; `~` joins text")
        return super().call_binop(context, operator, left, right)


def _bounded(items: Iterable[Any]) -> Iterator[Any]:
    left = _steps.get()
    for item in items:
        left[0] -= 1
        if left[0] < 0:
            raise SecurityError(f"its loops take more than {LOOP_LIMIT:,} steps")
        yield item


def _environment(**options: Any) -> _Environment:
    env = _Environment(**options)
    env.filters["_bounded"] = _bounded
    env.filters["tojson"] = _tojson
    # These pad to a width of the template's choice.
    env.filters["indent"] = _indent
    for name in ("center", "format", "urlize"):
        del env.filters[name]
    env.globals.pop("lipsum")
    return env


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    if not 0 <= width <= INDENT_LIMIT:
        raise SecurityError(f"`indent` takes a width from 0 to {INDENT_LIMIT}")
    return do_indent(text, width, first, blank)


def _render(template: Template, variables: Mapping[str, Any]) -> str:
    """Raises BadRow with what the template said."""
    _steps.set([LOOP_LIMIT])
    pieces: list[str] = []
    length = 0
    try:
        for piece in template.generate(**variables):
            length += len(piece)
            if length > OUTPUT_LIMIT:
                raise SecurityError(f"it writes more than {OUTPUT_LIMIT:,} characters")
            pieces.append(piece)
    except TemplateError as error:
        raise BadRow(f"the template failed: {error.message or type(error).__name__}") from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
        raise BadRow(f"the template failed: {type(error).__name__}: {error}") from error
    return "".join(pieces)


def _compiled(env: _Environment, source: str) -> Template:
    try:
        return env.from_string(source)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise BadTemplate(f"line {line}: {error.message}" if line else str(error.message)) from error


class RowTemplate:
    """spec.datasets[].template: renders the prompt from the row's columns; an unknown column is an error.

    A column goes by its own name, and by its role where spec.datasets[].columns gives it one.
    """

    def __init__(self, source: str, columns: Columns | None = None) -> None:
        """Raises BadTemplate."""
        env = _environment(undefined=StrictUndefined, keep_trailing_newline=True)
        self._template = _compiled(env, source)
        self._roles: dict[str, str] = columns.model_dump(exclude_none=True) if columns else {}
        named = meta.find_undeclared_variables(env.parse(source))
        self.columns = frozenset(named | {self._roles[name] for name in named if name in self._roles})

    def render(self, row: Mapping[str, Any]) -> str:
        roles = {role: row[name] for role, name in self._roles.items() if name in row}
        return _render(self._template, roles | {str(name): value for name, value in row.items()})


class ChatTemplate:
    """What transformers' `apply_chat_template` does: the same helpers, the same handling of white space."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: `bos_token` and the like, by their names. Raises BadTemplate."""
        self.source = source
        self._special = dict(special_tokens)
        env = _environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        env.globals["raise_exception"] = _raise_exception
        env.globals["strftime_now"] = _strftime_now
        self._template = _compiled(env, source)
        self.marks = any(word == "generation" for _, kind, word in env.lex(source) if kind == "name")

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, *, ask: bool = False
    ) -> Rendered:
        """The text of a conversation; `ask` ends it where the assistant is to speak. Raises BadRow."""
        text = _render(
            self._template,
            {
                **self._special,
                "messages": [dict(message) for message in messages],
                "tools": list(tools) if tools else None,
                "documents": None,
                "add_generation_prompt": ask,
            },
        )
        return _unmarked(text) if self.marks else Rendered(text, None)


def _unmarked(text: str) -> Rendered:
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    length = start = 0
    for part in text.split(_START):
        said, _, rest = part.rpartition(_END)
        if pieces:
            start = length
            spans.append((start, start + len(said)))
        pieces += [said, rest]
        length += len(said) + len(rest)
    return Rendered("".join(pieces), spans)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    """A day that never changes: the same data give the same tokens on every day."""
    return datetime.datetime(2025, 1, 1).strftime(form)
