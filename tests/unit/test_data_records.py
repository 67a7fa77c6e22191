"""Rows of preferences, classes and prompts as what each method learns from."""

from typing import Any

import pytest
from pydantic import ValidationError

from finetune_api import dataset_rules
from finetune_api.dataset import Columns
from finetune_api.failures import FineTuneError
from finetune_api.formats import ACCEPTED, Kind, formats_of, kind_of
from finetune_api.job import FineTuneJobSpec
from finetune_api.model import Problem
from finetune_api.stages import effective
from finetune_trainer.data.classes import Classes
from finetune_trainer.data.formats import BadRow, Chat, Pair, Plain, detect
from finetune_trainer.data.records import Record, digests_of, to_records

USER, GOOD, BAD = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "good"},
    {"role": "assistant", "content": "bad"},
)
SYSTEM = {"role": "system", "content": "s"}
CHATS = Record(Chat((USER, GOOD)), Chat((USER, BAD)))

RECORDS: dict[str, tuple[str, Kind, dict[str, Any], bool, list[Record]]] = {
    "text": (
        "Preference", "Pairs", {"prompt": "q", "chosen": " good", "rejected": " bad"}, False,
        [Record(Pair("q", " good"), Pair("q", " bad"))]),
    "text for a chat model": (
        "Preference", "Pairs", {"question": "q", "chosen": "good", "rejected": "bad"}, True, [CHATS]),
    "text with a system prompt": (
        "Preference", "Pairs", {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}, True,
        [Record(Chat((SYSTEM, USER, GOOD)), Chat((SYSTEM, USER, BAD)))]),
    "whole texts": (
        "Preference", "Pairs", {"chosen": "Human: q\n\nAssistant: bold", "rejected": "Human: q\n\nAssistant: bad"},
        False, [Record(Pair("Human: q\n\nAssistant:", " bold"), Pair("Human: q\n\nAssistant:", " bad"))]),
    "answers as messages": (
        "Preference", "Pairs", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, False, [CHATS]),
    "answers as messages to a text": (
        "Preference", "Pairs", {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, False, [CHATS]),
    "whole conversations": (
        "Preference", "Pairs", {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, False, [CHATS]),
    "sharegpt": (
        "Preference", "Pairs",
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
         "rejected": {"from": "gpt", "value": "bad"}}, False, [CHATS]),
    "both answers for KTO": (
        "Preference", "Unpaired", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, False,
        [Record(Chat((USER, GOOD)), desirable=True), Record(Chat((USER, BAD)), desirable=False)]),
    "one answer for KTO": (
        "Preference", "Unpaired", {"prompt": "q", "completion": "a", "label": False}, False,
        [Record(Pair("q", "a"), desirable=False)]),
    "one answer for KTO from CSV": (
        "Preference", "Unpaired", {"prompt": "q", "completion": "good", "label": "True"}, True,
        [Record(Chat((USER, GOOD)), desirable=True)]),
    "a conversation for KTO": (
        "Preference", "Unpaired", {"messages": [USER, GOOD], "label": 1}, True,
        [Record(Chat((USER, GOOD)), desirable=True)]),
    "a class": ("Labelled", "Classes", {"text": "t", "label": "spam"}, True, [Record(Plain("t"), label="spam")]),
    "a class by number": ("Labelled", "Classes", {"text": "t", "label": 3}, True, [Record(Plain("t"), label="3")]),
    "a prompt": ("PromptOnly", "Prompts", {"prompt": "q", "answer": 4}, False, [Record(Plain("q"), reference="4")]),
    "a prompt for a chat model": ("PromptOnly", "Prompts", {"prompt": "q"}, True, [Record(Chat((USER,)))]),
    "a prompt as messages": (
        "PromptOnly", "Prompts", {"prompt": [SYSTEM, USER], "solution": "x"}, False,
        [Record(Chat((SYSTEM, USER)), reference="x")]),
    "a conversation whose last answer is left out": (
        "PromptOnly", "Prompts", {"messages": [USER, GOOD]}, True, [Record(Chat((USER,)))]),
}  # fmt: skip


@pytest.mark.parametrize(("form", "kind", "row", "chat", "records"), RECORDS.values(), ids=RECORDS.keys())
def test_records(form: str, kind: Kind, row: dict[str, Any], chat: bool, records: list[Record]) -> None:
    assert to_records(row, form, kind, None, None, chat) == records
    if form != "Preference" or kind == "Pairs":
        assert detect([row], None, [form]) == form


def test_a_template_makes_the_prompt_of_both_answers() -> None:
    row = {"q": "x", "chosen": "a", "rejected": "b"}
    found = to_records(row, "Preference", "Pairs", Columns(prompt="q"), lambda row: f"<{row['q']}>", True)
    assert found == [Record(Pair("<x>", "a"), Pair("<x>", "b"))]
    assert to_records({"q": "x"}, "PromptOnly", "Prompts", None, lambda row: f"<{row['q']}>", True) == [
        Record(Plain("<x>"))
    ]


REFUSED: dict[str, tuple[str, Kind, dict[str, Any], str]] = {
    "one answer": ("Preference", "Pairs", {"prompt": "q", "chosen": "a"}, "the column 'rejected' is missing"),
    "a verdict for DPO": (
        "Preference", "Pairs", {"prompt": "q", "completion": "a", "label": True}, "the column 'chosen' is missing"),
    "equal answers": ("Preference", "Pairs", {"prompt": "q", "chosen": "a", "rejected": "a "}, "answer are equal"),
    "nothing in common": ("Preference", "Pairs", {"chosen": "a b", "rejected": "c d"}, "begin with is empty"),
    "an empty answer": ("Preference", "Pairs", {"prompt": "q", "chosen": "a", "rejected": ""}, "is empty"),
    "two conversations": (
        "Preference", "Pairs", {"chosen": [USER, GOOD], "rejected": [SYSTEM, BAD]}, "the same conversation but for"),
    "no answer at the end": (
        "Preference", "Pairs", {"chosen": [USER, USER], "rejected": [USER, BAD]}, "`chosen` must end with a turn of"),
    "a strange verdict": (
        "Preference", "Unpaired", {"prompt": "q", "completion": "a", "label": "good"},
        "`label` must be true .* found 'good'"),
    "no class": ("Labelled", "Classes", {"text": "t", "label": None}, "the name or the number of a class; found None"),
    "an empty class": ("Labelled", "Classes", {"text": "t", "label": " "}, "1 to 128 characters; found 0"),
    "no text": ("Labelled", "Classes", {"text": " ", "label": "x"}, "`text` is empty"),
    "an answered prompt": ("PromptOnly", "Prompts", {"prompt": [USER, GOOD]}, "must end with a turn of the user"),
    "an empty prompt": ("PromptOnly", "Prompts", {"prompt": " "}, "`prompt` is empty"),
    "a reference that is a list": ("PromptOnly", "Prompts", {"prompt": "q", "answer": []}, "`answer` must be text"),
}  # fmt: skip


@pytest.mark.parametrize(("form", "kind", "row", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_rows(form: str, kind: Kind, row: dict[str, Any], text: str) -> None:
    with pytest.raises(BadRow, match=text):
        to_records(row, form, kind, None, None, False)


def test_a_verdict_has_no_part_in_the_content() -> None:
    one = [Record(Plain("a"), label="x")]
    assert digests_of(one) == digests_of([Record(Plain("a"), label="y")])
    assert digests_of([CHATS]) != digests_of([Record(CHATS.example)])


def test_classes_are_ordered_and_held_out_ones_are_known() -> None:
    classes = Classes()
    for name in ("10", "9", "b", "a"):
        classes.see(name, "train", "here")
    classes.see("9", "validation", "there")
    assert classes.names() == ["9", "10", "a", "b"]
    classes.see("c", "validation", "spec.validation.datasets[0]: x line 3")
    with pytest.raises(FineTuneError, match=r"datasets\[0\]: x line 3: the class 'c' is in no training row; found 9,"):
        classes.names()
    with pytest.raises(FineTuneError, match="found no class; at least two"):
        Classes().names()


def spec_of(kind: str, form: str, **fields: Any) -> FineTuneJobSpec:
    dataset = {"name": "a", "uri": "s3://bucket/a.jsonl", "format": form}
    return FineTuneJobSpec.model_validate(
        {
            "baseModel": {"uri": "s3://bucket/m/"},
            "output": {"uri": "s3://bucket/o/"},
            "method": {"type": kind},
            "datasets": [dataset],
        }
        | fields
    )


def problems(spec: FineTuneJobSpec) -> list[Problem]:
    return [problem for stage in effective(spec) for problem in dataset_rules.problems(stage)]


def test_every_method_has_its_formats() -> None:
    for method, accepted in ACCEPTED.items():
        assert all(not list(problems(spec_of(method, form))) for form in ("Auto", *accepted))
    kinds = {method: kind_of(method, spec_of(method, "Auto").datasets) for method in ACCEPTED}
    assert kinds["DPO"] == kinds["Reward"] == "Pairs"
    assert (kinds["SFT"], kinds["KTO"], kinds["PPO"]) == ("Tokens", "Unpaired", "Prompts")
    assert formats_of("SFT", kind_of("SFT", spec_of("SFT", "Labelled").datasets)) == ("Labelled",)


def test_a_format_that_the_method_does_not_learn_from_is_named() -> None:
    assert [str(p) for p in problems(spec_of("DPO", "Text"))] == [
        "spec.datasets[0].format: found Text; method DPO needs Preference"
    ]
    held = {"datasets": [{"name": "v", "uri": "s3://bucket/v.jsonl", "format": "Text"}]}
    assert [str(p) for p in problems(spec_of("SFT", "Labelled", validation=held))] == [
        "spec.validation.datasets[0].format: found Text; beside Labelled data each dataset needs Labelled"
    ]
    stages = [{"name": "s", "datasets": held["datasets"], "method": {"type": "Reward"}}]
    assert [str(p) for p in problems(spec_of("SFT", "Auto", stages=stages))] == [
        "spec.stages[0].datasets[0].format: found Text; method Reward needs Preference"
    ]


@pytest.mark.parametrize(
    ("dataset", "spec", "text"),
    [
        (
            {"shots": 2, "format": "Text"},
            {},
            "datasets[0].shots: found 2; shots need method SFT and the format Messages",
        ),
        ({"shots": 2}, {"method": {"type": "SFT", "sft": {"loss": "All"}}}, "with loss All the shots would be learned"),
        ({"retrieval": {}, "columns": {"context": "c"}}, {"method": {"type": "DPO"}}, "retrieval: needs method SFT"),
        ({"weight": 2}, {"mixing": {"type": "Proportional"}}, "weight: found 2; mixing.type Proportional uses no weig"),
    ],
)
def test_options_that_do_not_go_together_are_named(dataset: dict[str, Any], spec: dict[str, Any], text: str) -> None:
    fields = {"name": "a", "uri": "s3://bucket/a.jsonl"} | dataset
    changes = {"datasets": [fields]} | spec
    assert text in str([str(problem) for problem in problems(spec_of("SFT", "Auto", **changes))])


def test_held_out_data_have_no_shots() -> None:
    held = {"datasets": [{"name": "v", "uri": "s3://bucket/v.jsonl", "shots": 1}]}
    assert [str(problem) for problem in problems(spec_of("SFT", "Auto", validation=held))] == [
        "spec.validation.datasets[0].shots: found 1; data that are only held out have no training rows to draw from"
    ]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"datasets": [{"name": "a", "uri": "s3://b-b/a", "retrieval": {"dropRatio": 0.5}}]}, "needs columns.context"),
        ({"mixing": {"type": "Temperature"}}, "temperature is required where type is Temperature"),
        ({"mixing": {"type": "Weighted", "temperature": 2}}, "temperature is required where type is Temperature"),
        ({"datasets": [{"name": "a", "uri": "s3://b-b/a", "columns": {"context": "c"},
                        "retrieval": {"dropRatio": 0.6, "swapRatio": 0.6}}]}, "must be at most 1 together"),
    ],
)  # fmt: skip
def test_rules_of_the_options(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        spec_of("SFT", "Auto", **fields)
