"""Templates that would run for ever or fill the memory: each is refused within seconds, and takes little memory."""

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_trainer.data.budget import OUTPUT_LIMIT
from finetune_trainer.data.formats import BadRow
from finetune_trainer.data.sandbox import SOURCE_LIMIT, BadTemplate
from finetune_trainer.data.templates import ChatTemplate, Costly, RowTemplate
from support.limited import limited

MEGABYTES, SECONDS = 300, 6.0
"""More memory than is mapped before, and CPU time: of a rendering, and of what is compiled before it."""
STEPS = r"it takes more than 200,000 steps"
LONG = r"it makes a text of more than 4,194,304 characters"
WRITES = r"it writes more than 4,194,304 characters"
GREAT = r"it computes a number of more than 38 digits"
COSTLY = f"{STEPS}|{LONG}|{WRITES}|it takes more than 2 seconds of CPU time"
DOUBLING = "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
NESTING = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"

TIME = {
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", STEPS),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "two macros that call each other": (
        "{% macro f(n) %}{% if n %}{{ g(n) }}{{ g(n) }}{% endif %}{% endmacro %}"
        "{% macro g(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(40) }}", STEPS),
    "a macro that is an argument": (
        "{% macro f(g, n) %}{% if n %}{{ g(g, n - 1) }}{{ g(g, n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(f, 60) }}", STEPS),
    "a block that is called again and again": (
        "{% macro f(n) %}{{ caller() }}{% if n %}{% call f(n - 1) %}{% endcall %}{% call f(n - 1) %}{% endcall %}"
        "{% endif %}{% endmacro %}{% call f(60) %}{% endcall %}", STEPS),
    "a caller that is called twice at each depth": (
        "{% macro f(n) %}{% if n %}{% call f(n - 1) %}{{ caller() }}{{ caller() }}{% endcall %}{% else %}{{ caller() }}"
        "{% endif %}{% endmacro %}{% call f(60) %}x{% endcall %}", f"{STEPS}|No caller defined"),
    "a loop that is called in itself": (
        "{% for x in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}", STEPS),
    "a loop that is called with a range": (
        "{% for x in range(99999) recursive %}{{ loop(range(99999)) if loop.depth < 9 }}{% endfor %}", STEPS),
    "a block of a template that calls itself": (
        "{% block b %}{% for i in [1, 2] %}{{ self.b() }}{% endfor %}{% endblock %}", f"{STEPS}|RecursionError"),
    "loops in loops": (
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", STEPS),
    "loops without a step that passes": (
        "{% for i in range(9999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}", STEPS),
    "a filter over a range": ("{% for i in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}", STEPS),
    "a filter that sorts": ("{% for i in range(999) %}{% set x = range(9999) | sort | list %}{% endfor %}", STEPS),
    "filters that are mapped": (
        "{% for i in range(99999) %}{% set x = range(99999) | map('string') | map('upper') | list %}{% endfor %}",
        STEPS),
    "the largest of a range": ("{% for i in range(99999) %}{% set x = range(99999) | max %}{% endfor %}", STEPS),
    "what is unique": ("{% for i in range(999) %}{% set x = range(99999) | unique | list %}{% endfor %}", STEPS),
    "what is selected": (
        "{% for i in range(999) %}{% set x = range(99999) | select('odd') | list %}{% endfor %}", STEPS),
    "a search in a long text": (
        "{% for i in range(99999) %}{% set x = 'zy' in text %}{% endfor %}", COSTLY),
    "a comparison of long texts": (
        "{% set a = text ~ 'a' %}{% set b = text ~ 'b' %}{% for i in range(99999) %}{% set x = a == b %}{% endfor %}",
        COSTLY),
    "a count in a long text": ("{% for i in range(99999) %}{% set x = text.count('yx') %}{% endfor %}", COSTLY),
    "a comparison of lists that hold the same lists": (
        NESTING.replace("STEP", "[ns.x, ns.x]") + "{% set a = ns.x %}{{ a == ns.x }}", STEPS),
    "arguments that hold arguments": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}{% endmacro %}"
        "{{ f(60, 1) }}", STEPS),
    "arguments by name that hold arguments": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1, a=kwargs, b=kwargs) }}{% else %}{{ kwargs }}{% endif %}{% endmacro %}"
        "{{ f(60) }}", STEPS),
    "a straight line that is long": (
        "{% for i in range(9999) %}" + "{% if text == i %}{% endif %}" * 5000 + "{% endfor %}", COSTLY),
}  # fmt: skip

MEMORY = {
    "~": (DOUBLING.replace("STEP", "ns.x ~ ns.x"), LONG),
    "+": (DOUBLING.replace("STEP", "ns.x + ns.x"), LONG),
    "join": (DOUBLING.replace("STEP", "[ns.x, ns.x] | join"), f"{LONG}|{STEPS}"),
    "join with a long text": (DOUBLING.replace("STEP", "['', ''] | join(ns.x ~ ns.x)"), LONG),
    "the method join": (DOUBLING.replace("STEP", "ns.x.join(['', '', ''])"), LONG),
    "the method join of a range": ("{{ text.join(range(9999) | map('string')) }}", f"{LONG}|{STEPS}"),
    "replace": (DOUBLING.replace("STEP", "ns.x | replace('x', 'xx')"), LONG),
    "the method replace": (DOUBLING.replace("STEP", "ns.x.replace('x', 'xx')"), LONG),
    "replace of nothing": ("{{ text | replace('', text) }}", LONG),
    "replace in markup": ("{{ (text | safe).replace('y', text) }}", LONG),
    "format": (DOUBLING.replace("STEP", "'{0}{0}'.format(ns.x)"), LONG),
    "a set block": (
        "{% set ns = namespace(x='x' ~ text) %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% endfor %}", f"{STEPS}|{LONG}"),
    "a set block with a filter": (
        "{% set ns = namespace(x='x' ~ text) %}{% for i in range(60) %}{% set ns.x | upper %}{{ ns.x }}{{ ns.x }}"
        "{% endset %}{% endfor %}", f"{STEPS}|{LONG}"),
    "a macro that says all twice": (
        "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}"
        "{% set ns = namespace(x=text) %}{% for i in range(60) %}{% set ns.x = f(ns.x) %}{% endfor %}",
        f"{STEPS}|{LONG}"),
    "a filter block": (
        "{% filter upper %}{% for i in range(9999) %}{{ text }}{% endfor %}{% endfilter %}", f"{STEPS}|{LONG}"),
    "a filter block of plain text": (
        "{% filter upper %}{% for i in range(99999) %}" + "x" * 50_000 + "{% endfor %}{% endfilter %}",
        f"{STEPS}|{LONG}"),
    "a set block of plain text": (
        "{% set a %}{% for i in range(99999) %}" + "x" * 50_000 + "{% endfor %}{% endset %}", f"{STEPS}|{LONG}"),
    "plain text": ("{% for i in range(99999) %}" + "x" * 50_000 + "{% endfor %}", f"{STEPS}|{WRITES}"),
    "an endless text": ("{% for i in range(1000) %}{{ 'x' ~ text }}{% endfor %}", WRITES),
    "many long texts": (
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = ns.x + [text ~ i] %}{% endfor %}",
        STEPS),
    "many slices": (
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x, text[i:]] %}{% endfor %}",
        STEPS),
    "lists that hold the same lists": (NESTING.replace("STEP", "[ns.x, ns.x]") + "{{ ns.x }}", STEPS),
    "tuples that hold the same tuples": (NESTING.replace("STEP", "(ns.x, ns.x)") + "{{ ns.x }}", STEPS),
    "objects that hold the same objects": (
        NESTING.replace("STEP", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x | tojson }}", STEPS),
    "objects by name": (NESTING.replace("STEP", "dict(a=ns.x, b=ns.x)") + "{{ ns.x | string }}", STEPS),
    "namespaces that hold themselves": (
        NESTING.replace("STEP", "namespace(a=ns.x, b=ns.x)") + "{{ [ns.x] | string }}", STEPS),
    "lists that grow": (NESTING.replace("STEP", "ns.x + ns.x") + "{{ ns.x }}", STEPS),
    "a list of a range": ("{% for i in range(999) %}{% set x = range(99999) | list %}{% endfor %}", STEPS),
    "a list of letters": ("{% set x = (text ~ text ~ text ~ text) | list %}" * 9, STEPS),
    "a split into letters": ("{% set x = text.split('y') %}" * 9 + "{% set x = text.split('y', -5) %}" * 9, STEPS),
    "a split into lines": ("{% set x = text.replace('y', '\\r').splitlines() %}" * 9, STEPS),
    "a sum of lists": ("{{ [[1], [2]] | sum(start=[]) }}", "`sum` adds numbers only"),
    "a long range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "a list of a long range": ("{{ range(10**9) | list }}", "Range too big"),
    "a repeated text": ("{{ 'x' * 10**9 }}", r"`\*` is allowed between numbers only"),
    "a repeated list": ("{{ [1] * 10**9 }}", r"`\*` is allowed between numbers only"),
    "a great power": ("{{ 10 ** 10 ** 10 }}", r"`\*\*` is allowed with small numbers only"),
    "powers of powers": ("{{ (((10 ** 16) ** 16) ** 16) ** 16 }}", r"small numbers only|38 digits"),
    "a product without end": (
        "{% set ns = namespace(x=10) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", GREAT),
    "a number of many digits": ("{{ text.replace('y', '9') | int(0, 16) }}", GREAT),
    "a rounded power": ("{{ 5 | round(-10**9, 'floor') }}", "`round` takes -16 to 16 digits"),
    "a padded number": ("{{ '%999999999d' % 1 }}", "`%` is allowed between numbers only"),
    "a width": ("{{ '{:>999999999}'.format(1) }}", "`format` takes plain fields"),
    "a width by name": ("{{ '{:{w}}'.format(1, w=10**9) }}", "`format` takes plain fields"),
    "a width in markup": ("{{ ('{:>999999999}' | safe).format(1) }}", "`format` takes plain fields"),
    "a width by index": ("{{ 'x'['format'](1) }}{{ '{:>99999999}'['format'](1) }}", "`format` takes plain fields"),
    "ljust": ("{{ 'x'.ljust(10**9) }}", "access to attribute 'ljust'"),
    "zfill": ("{{ 'x'.zfill(10**9) }}", "access to attribute 'zfill'"),
    "expandtabs": ("{{ '\t'.expandtabs(10**9) }}", "access to attribute 'expandtabs'"),
    "translate": ("{{ text.translate({121: text}) }}", "access to attribute 'translate'"),
    "encode": ("{{ text.encode('utf-32') }}", "access to attribute 'encode'"),
    "to_bytes": ("{{ (1).to_bytes(10**9, 'big') }}", "access to attribute 'to_bytes'"),
    "an indentation": ("{{ 'x' | indent(10**9, first=true) }}", "`indent` takes a width from 0 to 64"),
    "an indentation by a text": ("{{ 'x' | indent(text, first=true) }}", "`indent` takes a width from 0 to 64"),
    "an indentation of many lines": ("{{ text | replace('y', '\n') | indent(64, true, true) }}", LONG),
    "an indentation of JSON": ("{{ [1] | tojson(indent=10**9) }}", "`tojson` takes an indent of at most 16"),
    "an indentation of deep JSON": (
        "{% set ns = namespace(x=[1, 2]) %}{% for i in range(300) %}{% set ns.x = [ns.x, 1, 2, 3] %}{% endfor %}"
        "{% for i in range(99999) %}{% set x = ns.x | tojson(indent=16) %}{% endfor %}", STEPS),
    "separators of JSON": ("{{ range(9999) | list | tojson(separators=(text, text)) }}", "`tojson` takes separators"),
    "a day of many digits": ("{{ strftime_now('%999999999Y') }}", "'strftime_now' is undefined"),
    "a long reason": ("{{ dict(text) }}", "ValueError"),
}  # fmt: skip

NAMES = {
    "batch": ("{{ [1] | batch(10**9, 0) | list }}", "No filter named 'batch'"),
    "slice": ("{{ [1] | slice(10**9) | list }}", "No filter named 'slice'"),
    "center": ("{{ 'x' | center(10**9) }}", "No filter named 'center'"),
    "format": ("{{ '%999999999d' | format(1) }}", "No filter named 'format'"),
    "wordwrap": ("{{ 'x' | wordwrap(1, wrapstring='y') }}", "No filter named 'wordwrap'"),
    "urlize": ("{{ 'x' | urlize }}", "No filter named 'urlize'"),
    "attr": ("{{ 'x' | attr('upper') }}", "No filter named 'attr'"),
    "pprint": ("{{ 'x' | pprint }}", "No filter named 'pprint'"),
    "an unknown test": ("{{ 'x' is filter }}", "No test named 'filter'"),
    "3,000 parentheses": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "lie too deep within each other"),
    "3,000 lists": ("{{ " + "[" * 3000 + "]" * 3000 + " }}", "lie too deep within each other"),
    "3,000 negations": ("{{ " + "not " * 3000 + "1 }}", "lie too deep within each other"),
    "30,000 sums": ("{{ " + "1 + " * 30_000 + "1 }}", "lie too deep within each other"),
    "3,000 conditions": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "lie too deep within each other"),
    "9,000 conditions in a row": (
        "{% if not x %}" + "{% elif x < 0 %}" * 9000 + "{% endif %}", "lie too deep within each other"),
    "100 loops": ("{% for i in x %}" * 100 + "{% endfor %}" * 100, "lie too deep|cannot be compiled"),
    "a number of 5,000 digits": ("{{ " + "1" * 5000 + " }}", "cannot be compiled"),
    "a template without end": ("x" * (SOURCE_LIMIT + 1), "it has 262,145 characters; at most 262,144 are allowed"),
}  # fmt: skip
ROW = {"text": "y" * 1_000_000, "tags": []}


def rendered(source: str) -> str:
    return RowTemplate(source).render(ROW)


@pytest.mark.parametrize(("source", "text"), [*TIME.values(), *MEMORY.values()], ids=[*TIME, *MEMORY])
def test_a_rendering_ends_in_time_and_takes_little_memory(source: str, text: str) -> None:
    row = ROW | {"text": "y" * 10_000} if text == WRITES else ROW
    ended = limited(lambda: RowTemplate(source).render(row), MEGABYTES)
    assert re.match(f"(Costly|BadRow): the template failed: .*({text})", str(ended.answer)), ended.answer
    assert "\n" not in ended.answer
    assert ended.seconds < SECONDS


@pytest.mark.parametrize(("source", "text"), NAMES.values(), ids=NAMES.keys())
def test_what_does_not_exist_cannot_be_compiled(source: str, text: str) -> None:
    ended = limited(lambda: rendered(source), MEGABYTES)
    assert re.match(f"BadTemplate: .*({text})", str(ended.answer)), ended.answer
    assert "\n" not in ended.answer
    assert ended.seconds < SECONDS


def test_a_chat_template_is_held_to_the_same() -> None:
    source, _ = TIME["a macro that calls itself twice"]
    with pytest.raises(Costly, match=f"{STEPS} .* \\(the model's chat template\\)"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    with pytest.raises(BadRow, match="`strftime_now` takes a format of at most 256 characters, without widths"):
        ChatTemplate("{{ strftime_now('%999999999Y') }}", {}).render([])


def test_what_a_template_says_of_itself_is_cut_to_a_line() -> None:
    with pytest.raises(BadRow) as caught:
        ChatTemplate("{{ raise_exception('a\nb' ~ messages) }}", {}).render([{"content": "x" * 10_000}])
    assert str(caught.value) == "the template failed: a (the model's chat template)"


def test_a_long_conversation_is_no_attack() -> None:
    source = "{% for m in messages %}{% set c = m.content.strip() | trim %}{{ '<' + m.role + '>' ~ c }}{% endfor %}"
    turns = [{"role": "user", "content": " word" * 700}] * 1000
    assert len(ChatTemplate(source, {}).render(turns).text) == 1000 * (5 * 700 - 1 + 6)


# Templates by chance: words that do the most harm, in any order and in each other.
WORDS = st.sampled_from(
    ["text", "ns.x", "tags", "range(99999)", "[ns.x, ns.x]", "{'a': ns.x}", "ns", "'x'", "9", "10**9", "none", "loop",
     "f(ns.x)", "varargs", "cycler(ns.x)", "dict(a=ns.x)", "namespace(a=ns.x)", "joiner(text)", "f", "self", "undef"]
)  # fmt: skip
FILTERS = st.sampled_from(
    ["list", "join", "join(text)", "map('upper')", "string", "tojson(indent=2)", "sort", "unique", "replace('y', text)",
     "indent(64)", "sum", "reverse", "items", "dictsort", "select", "first", "length", "title", "truncate(9)", "safe",
     "escape", "int(0, 36)", "float", "round(2)", "default(text)", "wordcount", "min", "upper", "trim(text)"]
)  # fmt: skip
EXPRESSIONS: st.SearchStrategy[str] = st.recursive(
    WORDS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["~", "+", "*", "-", "%", "**", "==", "<", "in", "and", "//"]), inner).map(
            lambda parts: "(" + " ".join(parts) + ")"
        ),
        st.tuples(inner, FILTERS).map(lambda parts: f"({parts[0]} | {parts[1]})"),
        st.tuples(
            inner, st.sampled_from(["[1:]", "[0]", ".split('y')", ".join(tags)", ".x", ".format(text)", "(9)"])
        ).map("".join),
        st.lists(inner, max_size=3).map(lambda parts: "[" + ", ".join(parts) + "]"),
    ),
    max_leaves=6,
)
BODIES = st.recursive(
    st.one_of(
        EXPRESSIONS.map(lambda e: "{{ " + e + " }}"),
        EXPRESSIONS.map(lambda e: "{% set ns.x = " + e + " %}"),
    ),
    lambda inner: st.one_of(
        st.tuples(EXPRESSIONS, inner).map(lambda p: "{% for i in " + p[0] + " recursive %}" + p[1] + "{% endfor %}"),
        inner.map(lambda body: "{% set ns.x %}" + body + "{% endset %}"),
        inner.map(lambda body: "{% filter upper %}" + body + "{% endfilter %}"),
        inner.map(lambda body: "{% macro f(x) %}" + body + "{% endmacro %}{{ f(text) }}"),
        st.tuples(inner, inner).map("".join),
    ),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(BODIES, min_size=20, max_size=20))
def test_templates_by_chance_end(bodies: list[str]) -> None:
    def work() -> list[Any]:
        found: list[Any] = []
        for body in bodies:
            source = "{% set ns = namespace(x=text) %}{% for z in range(50) %}" + body + "{% endfor %}"
            try:
                found.append(len(RowTemplate(source).render({"text": "y" * 100_000, "tags": ["a", "b"]})))
            except (BadRow, BadTemplate):
                found.append(0)
        return found

    ended = limited(work, 2 * MEGABYTES, 20 * 3)
    assert isinstance(ended.answer, list), ended.answer
    assert max(ended.answer) <= OUTPUT_LIMIT
