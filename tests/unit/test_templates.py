"""Templates: what they may do, what they may not, and where the assistant speaks."""

from typing import Any

import pytest

from finetune_api.dataset import Columns
from finetune_trainer.data.formats import BadRow, Chat, Pair, Plain
from finetune_trainer.data.templates import DEFAULT_CHAT_TEMPLATE, BadTemplate, ChatTemplate, RowTemplate
from finetune_trainer.data.tokenise import IGNORED, Encoder, Loss, Tokens, lay_out
from support.tiny import CHATML, make_tokenizer

MARKED = (
    "{%- for m in messages %}"
    "{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.role[0] | upper }}:{{ m.content }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
FORGETS = "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}{{ m.content }};{% endif %}{% endfor %}"
TURNS = (
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
    {"role": "user", "content": "bye"},
)


def test_a_row_template_sees_the_columns() -> None:
    template = RowTemplate("{% for x in tags %}{{ x | upper }}{{ ', ' if not loop.last }}{% endfor %}: {{ name }}\n")
    assert template.render({"name": "n", "tags": ["a", "b"]}) == "A, B: n\n"


def test_a_column_goes_by_its_role_too_and_first_by_its_own_name() -> None:
    template = RowTemplate("{{ instruction }}/{{ input }}", Columns(instruction="question", input="context"))
    assert template.columns == {"instruction", "input", "question", "context"}
    assert template.render({"question": "q", "context": "c"}) == "q/c"
    assert template.render({"question": "q", "context": "c", "input": "i"}) == "q/i"


HOSTILE = {
    "an unknown column": ("{{ nope }}", "'nope' is undefined"),
    "the class of a value": ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
    "a function's globals": ("{{ cycler.__init__.__globals__ }}", "'__init__'"),
    "an endless text": (
        "{% for i in range(1000) %}{{ 'x' ~ text }}{% endfor %}", "writes more than 4,194,304 characters"),
    "loops in loops": (
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "more than 200,000 steps"),
    "a long range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "a repeated text": ("{{ 'x' * 10**9 }}", r"`\*` is allowed between numbers only"),
    "a great power": ("{{ 10 ** 10 ** 10 }}", r"`\*\*` is allowed with small numbers only"),
    "a padded number": ("{{ '%999999999d' % 1 }}", "`%` is allowed between numbers only"),
    "padding": ("{{ 'x'.ljust(10**9) }}", "access to attribute 'ljust'"),
    "an indentation": ("{{ 'x' | indent(10**9, first=true) }}", "`indent` takes a width from 0 to 64"),
    "a division by zero": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "changed input": ("{{ tags.append(1) }}", "append"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "text"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_template_can_do_no_harm(source: str, text: str) -> None:
    with pytest.raises(BadRow, match=f"the template failed: .*{text}"):
        RowTemplate(source).render({"text": "y" * 10_000, "tags": []})


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% if x %}", "line 1: Unexpected end of template"),
        ("a\n{{ x | center(5) }}", "line 2: No filter named 'center'"),
        ("{% include 'x' %}{{", "line 1"),
    ],
)
def test_a_template_that_cannot_be_compiled_is_told_with_its_line(source: str, text: str) -> None:
    with pytest.raises(BadTemplate, match=text):
        RowTemplate(source)


def test_another_template_cannot_be_loaded() -> None:
    with pytest.raises(BadRow, match="the template failed"):
        RowTemplate("{% include '/etc/passwd' %}").render({})


SPANS: list[tuple[str, Loss, list[str]]] = [
    (CHATML, "Completion", ["second<|im_end|>\n"]),
    (CHATML, "Assistant", ["first<|im_end|>\n", "second<|im_end|>\n"]),
    (MARKED, "Completion", ["second<|im_end|>"]),
    (MARKED, "Assistant", ["first<|im_end|>", "second<|im_end|>"]),
    (DEFAULT_CHAT_TEMPLATE, "Assistant", ["first</s>", "second</s>"]),
]


@pytest.mark.parametrize(("source", "loss", "spoken"), SPANS)
def test_the_loss_falls_on_what_the_assistant_says(source: str, loss: Loss, spoken: list[str]) -> None:
    text = lay_out(Chat(TURNS), loss, ChatTemplate(source, {"eos_token": "</s>"}))
    assert [text.text[start:end] for start, end in text.spans] == spoken
    assert ("bye" in text.text) == (loss == "Assistant")


def test_all_is_all() -> None:
    text = lay_out(Chat(TURNS), "All", ChatTemplate(MARKED, {}))
    assert text.spans == [(0, len(text.text))]
    assert "\ufdd0" not in text.text


def test_the_default_template_reads_plainly() -> None:
    chat = ChatTemplate(DEFAULT_CHAT_TEMPLATE, {"eos_token": "</s>"})
    assert chat.render(TURNS[1:3]).text == "### User:\none\n\n### Assistant:\nfirst</s>\n"
    assert chat.render(TURNS[1:2], ask=True).text == "### User:\none\n\n### Assistant:\n"


def test_a_template_that_rewrites_what_was_said_is_refused() -> None:
    with pytest.raises(BadRow, match="rewrites earlier turns"):
        lay_out(Chat(TURNS), "Assistant", ChatTemplate(FORGETS, {}))


def test_the_helpers_of_chat_templates() -> None:
    source = (
        "{{ tools | tojson }} {{ strftime_now('%Y') }}{% for m in messages %}{% break %}{% endfor %}{{ bos_token }}"
    )
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(TURNS, [{"ü": 1}]).text == '[{"ü": 1}] 2025<s>'
    with pytest.raises(BadRow, match="the template failed: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render(TURNS)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(make_tokenizer(), eos_id=2, bos_id=1)


def encode(encoder: Encoder, example: Any, loss: Loss = "Completion", source: str = CHATML) -> Tokens:
    return encoder.encode([lay_out(example, loss, ChatTemplate(source, {"eos_token": "</s>"}))])[0]


def learned(tokens: Tokens) -> list[int]:
    return [label for label in tokens.labels if label != IGNORED]


def test_a_pair_learns_its_completion_and_the_end(encoder: Encoder) -> None:
    tokenizer = make_tokenizer()
    tokens = encode(encoder, Pair("the question", " the answer ünd"))
    assert tokens.input_ids[0] == 1
    assert learned(tokens)[-1] == 2
    assert tokenizer.decode(learned(tokens)) == " the answer ünd"
    assert tokens.trained == len(learned(tokens))
    everything = encode(encoder, Pair("the question", " the answer"), "All")
    assert everything.trained == len(everything.input_ids) - 1


def test_text_is_learned_whole(encoder: Encoder) -> None:
    tokens = encode(encoder, Plain("the lazy dog"))
    assert tokens.labels[1:] == tokens.input_ids[1:]
    assert tokens.input_ids[-1] == 2


def test_bos_is_written_once(encoder: Encoder) -> None:
    assert encode(encoder, Pair("<s>x", "y")).input_ids.count(1) == 1
    assert encode(encoder, Chat(TURNS)).input_ids.count(1) == 0


def test_an_end_of_turn_is_end_enough(encoder: Encoder) -> None:
    assert 2 not in encode(encoder, Chat(TURNS)).input_ids
    assert encode(encoder, Chat(TURNS), source="{% for m in messages %}{{ m.content }} {% endfor %}").input_ids[-1] == 2
    # Nothing is learned after the last answer, so no end is either.
    assert 2 not in encode(encoder, Chat(TURNS), "Assistant").input_ids


def test_a_tokenizers_own_padding_and_truncation_are_off() -> None:
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokens = Encoder(tokenizer, 2, 1).encode([lay_out(Plain("word " * 20), "All", ChatTemplate(CHATML, {}))])[0]
    assert 4 < len(tokens.input_ids) < 64
