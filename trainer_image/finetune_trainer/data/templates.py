"""Jinja, sandboxed and bounded: the data set's own template for prompts, and the chat template of the model.

A template comes from a stranger: it can reach nothing but its variables, its loops and its output end, and what it does
wrong is said in one sentence.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import StrictUndefined, Template, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from finetune_api.dataset import Columns
from finetune_trainer.data import sandbox
from finetune_trainer.data.filters import raise_exception, strftime_now
from finetune_trainer.data.formats import BadRow
from finetune_trainer.data.sandbox import BadTemplate as BadTemplate
from finetune_trainer.data.sandbox import Environment, compiled

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

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_START, _END = "\ufdd0", "\ufdd1"


class Costly(BadRow):
    """A rendering takes more than it may: no data policy leaves such a row out, since the next one costs as much."""


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


def _render(template: Template, variables: Mapping[str, Any], whose: str = "") -> str:
    """Raises BadRow with what the template said."""
    try:
        return sandbox.render(template, variables)
    except sandbox.Failed as error:
        raise (Costly if error.exceeded else BadRow)(f"the template failed: {error}{whose}") from error


class RowTemplate:
    """spec.datasets[].template: renders the prompt from the row's columns; an unknown column is an error.

    A column goes by its own name, and by its role where spec.datasets[].columns gives it one.
    """

    def __init__(self, source: str, columns: Columns | None = None) -> None:
        """Raises BadTemplate."""
        env = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
        self._template = compiled(env, source)
        self._roles: dict[str, str] = columns.model_dump(exclude_none=True) if columns else {}
        named = meta.find_undeclared_variables(env.parse(source))
        self.columns = frozenset(named | {self._roles[name] for name in named if name in self._roles})

    def render(self, row: Mapping[str, Any]) -> str:
        roles = {role: row[name] for role, name in self._roles.items() if name in row}
        variables = roles | {str(name): value for name, value in row.items()}
        return _render(self._template, variables)


class ChatTemplate:
    """What transformers' `apply_chat_template` does: the same helpers, the same handling of white space."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: `bos_token` and the like, by their names. Raises BadTemplate."""
        self.source = source
        self._special = dict(special_tokens)
        env = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        env.globals["raise_exception"] = raise_exception
        env.globals["strftime_now"] = strftime_now
        self._template = compiled(env, source)
        self.marks = any(word == "generation" for _, kind, word in env.lex(source) if kind == "name")

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, *, ask: bool = False
    ) -> Rendered:
        """The text of a conversation; `ask` ends it where the assistant is to speak. Raises BadRow."""
        text = _render(
            self._template,
            {
                **self._special,
                "messages": [_aliased(message) for message in messages],
                "tools": list(tools) if tools else None,
                "documents": None,
                "add_generation_prompt": ask,
            },
            " (the model's chat template)",
        )
        return _unmarked(text) if self.marks else Rendered(text, None)


def _aliased(message: Mapping[str, Any]) -> dict[str, Any]:
    """A turn with its thought under each of the names that templates read it by."""
    thought = next((message[name] for name in _THOUGHTS if message.get(name) is not None), None)
    return dict(message) if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


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
