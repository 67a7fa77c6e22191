"""Rows of every format as examples."""

from typing import Any

import pytest

from finetune_api.dataset import Columns
from finetune_trainer.data.formats import Ambiguous, BadRow, Chat, Pair, Plain, content_hash, detect, to_example

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TOOL_CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}

DETECTED = [
    ({"messages": []}, None, "Messages"),
    ({"conversations": [], "id": 1}, None, "Messages"),
    ({"prompt": "", "completion": ""}, None, "PromptCompletion"),
    ({"question": "", "answer": "", "topic": ""}, None, "PromptCompletion"),
    ({"instruction": "", "output": ""}, None, "Instruction"),
    ({"instruction": "", "context": "", "response": ""}, None, "Instruction"),
    ({"text": "", "meta": 1}, None, "Text"),
    ({"q": "", "text": "", "r": ""}, Columns(prompt="q", completion="r"), "PromptCompletion"),
    ({"body": ""}, Columns(text="body"), "Text"),
]


@pytest.mark.parametrize(("row", "columns", "form"), DETECTED)
def test_the_format_is_found_out(row: dict[str, Any], columns: Columns | None, form: str) -> None:
    assert detect([row], columns) == form


def test_a_row_that_lacks_a_column_does_not_hide_the_format() -> None:
    assert detect([{"text": ""}, {"text": ""}, {"body": ""}], None) == "Text"


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"a": 1, "b": 2}], "found the columns a, b, which fit no format"),
        ([{"messages": [], "text": ""}], "fit Messages and Text"),
        ([{"text": ""}, {"prompt": ""}], "found the columns prompt, text, which fit no format"),
    ],
)
def test_what_is_not_clear_is_not_guessed(rows: list[dict[str, Any]], text: str) -> None:
    with pytest.raises(Ambiguous, match=text):
        detect(rows, None)


EXAMPLES: dict[str, tuple[str, dict[str, Any], bool, Any]] = {
    "messages": ("Messages", {"messages": [SYSTEM, USER, ANSWER]}, False, Chat((SYSTEM, USER, ANSWER))),
    "messages as JSON": (
        "Messages", {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, False,
        Chat((USER, ANSWER))),
    "sharegpt": (
        "Messages",
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        False, Chat((SYSTEM, USER, ANSWER))),
    "parts": (
        "Messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]}, False,
        Chat((USER, ANSWER))),
    "a tool call without content": (
        "Messages", {"messages": [USER, TOOL_CALL | {"content": None, "name": None}], "tools": [{"name": "f"}]}, False,
        Chat((USER, TOOL_CALL), [{"name": "f"}])),
    "a pair for a chat model": ("PromptCompletion", {"prompt": "q", "completion": "a"}, True, Chat((USER, ANSWER))),
    "a pair for a base model": ("PromptCompletion", {"prompt": "q", "completion": " a"}, False, Pair("q", " a")),
    "a pair with a system prompt": (
        "PromptCompletion", {"system": "s", "prompt": "q", "completion": "a"}, True, Chat((SYSTEM, USER, ANSWER))),
    "a pair of conversations": (
        "PromptCompletion", {"prompt": [USER], "completion": [ANSWER]}, False, Chat((USER, ANSWER))),
    "an instruction": (
        "Instruction", {"instruction": "q", "input": "", "output": "a"}, False, Chat((USER, ANSWER))),
    "an instruction with input": (
        "Instruction", {"instruction": "i", "input": "x", "output": "a"}, True,
        Chat(({"role": "user", "content": "i\n\nx"}, ANSWER))),
    "text": ("Text", {"text": "t"}, True, Plain("t")),
}  # fmt: skip


@pytest.mark.parametrize(("form", "row", "chat", "example"), EXAMPLES.values(), ids=EXAMPLES.keys())
def test_examples(form: str, row: dict[str, Any], chat: bool, example: Any) -> None:
    assert to_example(row, form, None, None, chat) == example


def test_a_template_makes_the_prompt() -> None:
    row = {"instruction": "i", "input": "x", "output": "a"}
    assert to_example(row, "Instruction", None, lambda r: f"<{r['instruction']}>", True) == Pair("<i>", "a")


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no turns": ("Messages", {"messages": []}, "`messages` must be a list of messages with at least one"),
    "no object": ("Messages", {"messages": ["hi"]}, r"`messages\[0\]` must be an object"),
    "a strange role": (
        "Messages", {"messages": [{"role": "bot", "content": ""}]},
        r"`messages\[0\].role` must be one of system, user, assistant, tool; found 'bot'"),
    "no content": (
        "Messages", {"messages": [{"role": "user"}]}, r"`messages\[0\].content` must be text; found NoneType"),
    "a picture": (
        "Messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts of other types than text"),
    "no answer": ("Messages", {"messages": [USER]}, "found no turn of the assistant"),
    "text that is no JSON": ("Messages", {"messages": "hello"}, "`messages` is text that is not JSON"),
    "a number": ("PromptCompletion", {"prompt": "q", "completion": 3}, "`completion` must be text; found int"),
    "nothing to learn": ("PromptCompletion", {"prompt": "q", "completion": "\n"}, "`completion` is empty"),
    "no column": ("Text", {"body": "x"}, "the column 'text' is missing; found body"),
    "two users": ("Messages", {"messages": [USER, USER, ANSWER]}, "order: turn 2, user, follows user; system comes"),
    "an answer to nothing": ("Messages", {"messages": [ANSWER, USER, ANSWER]}, "turn 1, assistant, comes first"),
    "two answers": ("Messages", {"messages": [USER, ANSWER, ANSWER]}, "turn 3, assistant, follows assistant"),
    "a late system prompt": ("Messages", {"messages": [USER, ANSWER, SYSTEM]}, "turn 3, system, follows assistant"),
    "a tool that nobody called": (
        "Messages", {"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "turn 2, tool, follows user"),
    "empty answers": ("Messages", {"messages": [USER, ANSWER | {"content": " "}]}, "turn of the assistant is empty"),
    "tools": ("Messages", {"messages": [USER, ANSWER], "tools": {}}, "`tools` must be a list"),
}  # fmt: skip


@pytest.mark.parametrize(("form", "row", "text"), BAD.values(), ids=BAD.keys())
def test_bad_rows_say_what_is_wrong(form: str, row: dict[str, Any], text: str) -> None:
    with pytest.raises(BadRow, match=text):
        to_example(row, form, None, None, False)


def test_a_column_that_the_spec_names_must_be_there() -> None:
    row = {"prompt": "q", "completion": "a", "sys": None}
    assert to_example(row, "PromptCompletion", Columns(system="sys"), None, True) == Chat((USER, ANSWER))
    with pytest.raises(BadRow, match="the column 'syst' is missing; found completion, prompt, sys"):
        to_example(row, "PromptCompletion", Columns(system="syst"), None, True)


def test_content_is_equal_whatever_its_white_space_and_composition() -> None:
    one, two = Pair("a  b\n", "caf\u00e9"), Pair("a b", "cafe\u0301 ")
    assert content_hash(one) == content_hash(two)
    assert content_hash(one) != content_hash(Pair("a b caf\u00e9", ""))
    assert content_hash(Chat((USER, ANSWER))) != content_hash(Chat((ANSWER, USER)))
    assert len(content_hash(one)) == 16


@pytest.mark.parametrize("text", ["\ud800", "\ufdd0"])
def test_text_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadRow):
        content_hash(Plain(text))
