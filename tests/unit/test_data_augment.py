"""Passages in front of questions, passages that do not answer, and few-shot prompts."""

from typing import Any

import pytest

from finetune_api.dataset import Dataset
from finetune_trainer.data.augment import POOL, Passages, Shots
from finetune_trainer.data.formats import BadRow, Chat, Pair

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def make_passages(templated: bool = False, columns: dict[str, str] | None = None, **retrieval: Any) -> Passages:
    fields = {"name": "a", "uri": "s3://bucket/a.jsonl", "columns": {"context": "found"} | (columns or {})}
    return Passages(Dataset.model_validate(fields | {"retrieval": retrieval or None}), 42, templated)


PLACED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "one": ("PromptCompletion", {"prompt": "q", "found": "p"}, {"prompt": "[1] p\n\nq"}),
    "several": ("PromptCompletion", {"prompt": "q", "found": ["p", "r "]}, {"prompt": "[1] p\n\n[2] r\n\nq"}),
    "none": ("PromptCompletion", {"prompt": "q", "found": []}, {"prompt": "q"}),
    "with titles": (
        "Instruction", {"instruction": "q", "found": [{"title": "T", "text": "p"}, {"text": "r"}]},
        {"instruction": "[1] T\np\n\n[2] r\n\nq"}),
    "in a conversation": (
        "Messages", {"messages": [SYSTEM, USER, ANSWER], "found": "p"},
        {"messages": [SYSTEM, {"role": "user", "content": "[1] p\n\nq"}, ANSWER]}),
    "in a prompt of messages": (
        "PromptOnly", {"prompt": [USER], "found": "p"}, {"prompt": [{"role": "user", "content": "[1] p\n\nq"}]}),
}  # fmt: skip


@pytest.mark.parametrize(("form", "row", "placed"), PLACED.values(), ids=PLACED.keys())
def test_passages_come_before_the_question(form: str, row: dict[str, Any], placed: dict[str, Any]) -> None:
    assert make_passages().placed(row, form) == placed
    assert make_passages(templated=True).placed(row, form) is row


@pytest.mark.parametrize(
    ("value", "text"), [(3, "a passage or a list"), ([3], "as text"), ([{"body": "x"}], "as text")]
)
def test_what_is_no_passage_is_refused(value: Any, text: str) -> None:
    with pytest.raises(BadRow, match=text):
        make_passages().placed({"prompt": "q", "found": value}, "PromptCompletion")
    with pytest.raises(BadRow, match="the column 'found' is missing"):
        make_passages().placed({"prompt": "q"}, "PromptCompletion")


def test_a_share_of_the_rows_loses_its_passages_or_gets_others() -> None:
    passages = make_passages(dropRatio=0.2, swapRatio=0.3, absentAnswer="not there")
    kept = dropped = swapped = 0
    for number in range(2000):
        row = {"prompt": "q", "completion": "a", "found": f"passage {number}"}
        changed = passages.altered(row, "PromptCompletion", number.to_bytes(16, "big"))
        if changed is None:
            kept += 1
            continue
        assert changed["completion"] == "not there"
        dropped += changed["found"] == ""
        swapped += changed["found"].startswith("passage ") and changed["found"] != row["found"]
    assert kept + dropped + swapped == 2000
    assert (dropped, swapped) == (pytest.approx(400, abs=60), pytest.approx(600, abs=70))


def test_the_last_answer_of_a_conversation_says_that_nothing_is_there() -> None:
    passages = make_passages(dropRatio=1.0)
    row = {"messages": [USER, ANSWER, USER, ANSWER], "found": ["p"]}
    changed = passages.altered(row, "Messages", b"x" * 16)
    assert changed is not None
    assert [turn["content"] for turn in changed["messages"]] == ["q", "a", "q", "The passages do not answer this."]
    assert changed["found"] == []
    assert make_passages().altered(row, "Messages", b"x" * 16) is None


def make_shots(count: int, rows: int) -> Shots:
    shots = Shots(count, 42)
    for number in range(rows):
        shots.offer(bytes([number % 256, number // 256]), Pair(f"q{number} ", f"a{number}"))
    return shots


def test_shots_come_before_the_prompt_and_never_are_the_row_itself() -> None:
    shots = make_shots(2, 3)
    for number in range(3):
        found = shots.before(Pair(f"q{number} ", f"a{number}"), bytes([number, 0]))
        assert isinstance(found, Pair)
        assert found.completion == f"a{number}"
        assert found.prompt.endswith(f"\n\nq{number} ")
        assert found.prompt.count(f"q{number} ") == 1
        others = sorted(part for part in found.prompt.split("\n\n")[:-1])
        assert others == [f"q{i} a{i}" for i in range(3) if i != number]
    assert make_shots(2, 900).before(Pair("x", "y"), b"zz") == make_shots(2, 900).before(Pair("x", "y"), b"zz")


def test_of_many_rows_a_sample_is_kept() -> None:
    assert len(make_shots(1, 900)) == POOL


def test_shots_of_conversations_keep_one_system_prompt() -> None:
    shots = Shots(1, 1)
    other = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
    shots.offer(b"1", Chat((SYSTEM, *other)))
    assert shots.before(Chat((SYSTEM, USER, ANSWER)), b"2") == Chat((SYSTEM, *other, USER, ANSWER))


def test_too_few_rows_for_the_shots() -> None:
    with pytest.raises(BadRow, match="3 shots are wanted; 2 other training rows can be drawn"):
        make_shots(3, 3).before(Pair("q", "a"), bytes([1, 0]))
    assert Shots(0, 1).before(Pair("q", "a"), b"") == Pair("q", "a")
