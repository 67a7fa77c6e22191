"""Every chat template that TRL ships renders as transformers renders it."""

import datetime
from importlib.resources import files
from typing import Any

import pytest
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from finetune_trainer.data.formats import BadRow
from finetune_trainer.data.templates import ChatTemplate

TEMPLATES = {
    path.name: path.read_text()
    for path in sorted((files("trl") / "chat_templates").iterdir(), key=lambda path: path.name)
    if path.name.endswith(".jinja")
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name", "enum": ["Bern", "Ulm"]},
                    "days": {"type": "integer"},
                    "hours": {"type": "array", "items": {"type": "string"}},
                    "unit": {"type": ["string", "null"]},
                },
                "required": ["city"],
            },
            "return": {"type": "object", "description": "The weather"},
        },
    }
]
CALL = {
    "id": "abc123def",
    "type": "function",
    "function": {
        "name": "get_weather",
        "arguments": {"city": "Bern", "days": 2, "hours": ["1", {"a": True}], "x": None},
    },
}
Turns = list[dict[str, Any]]
CONVERSATIONS: dict[str, tuple[Turns, list[Any] | None]] = {
    "a question": (
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello é\n\n"}], None),
    "a system prompt and a thought": (
        [
            {"role": "system", "content": "Be kind"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "x"},
        ], None),
    "a tool": (
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "get_weather", "tool_call_id": "abc123def", "content": '{"t": 3}'},
            {"role": "assistant", "content": "3 degrees"},
        ], TOOLS),
    "a tool and a thought": (
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "See", "thinking": "hm", "tool_calls": [CALL]},
            {"role": "tool", "name": "get_weather", "tool_call_id": "abc123def", "content": '{"t": 3}'},
            {"role": "assistant", "content": "3 degrees"},
            {"role": "user", "content": "thanks"},
        ], TOOLS),
    "parts": (
        [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Hello"}], "reasoning": "hm"},
        ], None),
}  # fmt: skip


class NewYear(datetime.datetime):
    """The day that `strftime_now` always says here."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "NewYear":
        return cls(2025, 1, 1)


def rendered(source: str, turns: Turns, tools: list[Any] | None, ask: bool) -> str | None:
    try:
        return ChatTemplate(source, SPECIAL).render(turns, tools, ask=ask).text
    except BadRow:
        return None


def wanted(source: str, turns: Turns, tools: list[Any] | None, ask: bool) -> str | None:
    try:
        texts, _ = render_jinja_template(
            [turns], tools=tools, chat_template=source, add_generation_prompt=ask, **SPECIAL
        )
        return str(texts[0])
    except Exception:
        # Many templates refuse conversations: in which words is not of interest here.
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_transformers_renders_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", NewYear)
    found = 0
    for turns, tools in CONVERSATIONS.values():
        for ask in (False, True):
            own = rendered(TEMPLATES[name], turns, tools, ask)
            assert own == wanted(TEMPLATES[name], turns, tools, ask)
            found += own is not None
    assert found


def test_all_of_them_are_tried() -> None:
    assert len(TEMPLATES) >= 70


HELPERS = {
    "strip": "{{ messages[0]['content'].strip() }}|{{ messages[0].content.lstrip('\\n') }}",
    "split": "{{ messages[-1].content.split('</think>')[-1].rstrip() }}{{ 'a,b'.split(',', 1) | last }}",
    "starts": "{{ 'x' if messages[0].content.startswith('<') or messages[0].content.endswith('i') else 'y' }}",
    "replace": "{{ messages[0].content.replace('H', 'J', 1) }}{{ 'aXa' | replace('X', '-') }}",
    "items": "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}",
    "get": "{{ messages[0].get('name', 'nobody') }}{{ messages[0].get('role') }}{{ messages[0].keys() | list }}",
    "loop": (
        "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
        "{{ loop.revindex }}{{ loop.cycle('a', 'b') }}{{ loop.previtem.role if loop.previtem is defined }}"
        "{% if loop.changed(m.role) %}!{% endif %}{% endfor %}"),
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "macro": (
        "{% macro f(x, y='z') %}{{ x }}{{ y }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}{% endmacro %}"
        "{{ f('a', q=1) }}{{ f('a', 'b', 'c') }}{% call f('b') %}c{% endcall %}"),
    "tojson": "{{ messages | tojson(indent=2) }}{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}"
        "{{ 'ü<' | tojson(ensure_ascii=true) }}",
    "set": "{% set x %}a{{ 1 }}{% endset %}{% set y | upper %}{{ x }}b{% endset %}{{ y ~ none ~ 1.5 ~ true }}",
    "slices": "{{ messages[1:] | length }}{{ messages[0].content[::-1] }}{{ messages[:1] + messages[1:] == messages }}",
    "filters": (
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}"
        "{{ [3, 1, 2] | sort | join('-') }}{{ [1, 1] | unique | list }}{{ {'b': 1, 'a': 2} | dictsort }}"
        "{{ 'ab cd' | title | trim | truncate(4) }}{{ [1, 2] | sum }}{{ 2.5 | round | int }}{{ '<' | e }}"),
    "indent": "{{ 'a\nb' | indent(2) }}{{ 'a\nb' | indent('> ', true) }}",
    "format": "{{ '{} and {0}'.format('a') if false }}{{ '{0}-{b}-{{}}'.format('a', b=1) }}{{ '{}{}'.format(1, 2) }}",
    "join": "{{ ', '.join(['a', 'b']) }}{{ ['a', 'b'] | join }}",
    "whitespace": "{%- for m in messages -%}\n  {{- m.role }} \n{% endfor %}\n  {% if true %}x{% endif %}\n",
    "tests": "{{ 1 is odd }}{{ 'a' is string }}{{ messages is iterable }}{{ x is defined }}{{ 'a' in 'abc' }}",
    "markup": "{{ ('<b>' | safe) + '<' }}{{ ('a<' | e).replace('a', '>') }}{{ ('<' | safe).join(['>', '>']) }}",
}  # fmt: skip


@pytest.mark.parametrize("source", HELPERS.values(), ids=HELPERS.keys())
def test_what_templates_use_works_as_in_transformers(source: str) -> None:
    turns, _ = CONVERSATIONS["a system prompt and a thought"]
    own = rendered(source, turns, None, False)
    assert own is not None
    assert own == wanted(source, turns, None, False)
