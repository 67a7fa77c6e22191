"""A job as stages: what holds for each, what each starts from, and which cannot follow each other."""

from typing import Any

import pytest

from finetune_api.job import FineTuneJobSpec
from finetune_api.model import format_path
from finetune_api.stages import effective, origin
from finetune_api.support import unsupported

LORA: dict[str, Any] = {"type": "LoRA", "lora": {"rank": 8}}
PREFERRED = [{"name": "pairs", "uri": "s3://data/pairs.jsonl"}]


def make_spec(*stages: dict[str, Any], **fields: Any) -> FineTuneJobSpec:
    named = [{"name": f"stage-{number}"} | stage for number, stage in enumerate(stages)]
    return FineTuneJobSpec.model_validate(
        {
            "baseModel": {"uri": "s3://models/tiny/"},
            "datasets": [{"name": "rows", "uri": "s3://data/rows.jsonl"}],
            "output": {"uri": "s3://out/"},
            "stages": named,
        }
        | fields
    )


def dpo(**stage: Any) -> dict[str, Any]:
    return {"method": {"type": "DPO"}, "datasets": PREFERRED} | stage


def reward(**stage: Any) -> dict[str, Any]:
    return dpo(**stage) | {"method": {"type": "Reward"}}


def test_a_job_without_stages_is_one() -> None:
    spec = make_spec()
    (only,) = effective(spec)
    assert (only.number, only.name, only.spec, only.own) == (0, "", spec, None)
    assert only.path("tuning") == ("spec", "tuning")
    assert only.named("spec.tuning.lora: found x") == "spec.tuning.lora: found x"


def test_what_a_stage_leaves_out_comes_from_spec() -> None:
    spec = make_spec(
        {"training": {"maxSteps": 5}},
        dpo(tuning=LORA, training={"learningRate": 0.1}),
        training={"epochs": 2, "learningRate": 0.01, "seed": 7},
        validation={"fraction": 0.1},
    )
    first, second = effective(spec)
    assert (first.spec.training.max_steps, first.spec.training.epochs) == (5, None)
    assert (second.spec.training.learning_rate, second.spec.training.epochs) == (0.1, 2)
    assert [stage.spec.training.seed for stage in (first, second)] == [7, 7]
    assert [stage.spec.datasets[0].name for stage in (first, second)] == ["rows", "pairs"]
    assert [stage.spec.method.type for stage in (first, second)] == ["SFT", "DPO"]
    assert not any(stage.spec.stages for stage in (first, second))


def test_held_out_datasets_are_those_of_the_stages_that_learn_from_specs_own() -> None:
    held_out = {"datasets": [{"name": "held", "uri": "s3://data/held.jsonl"}]}
    own, other = effective(make_spec({}, dpo(), validation=held_out))
    assert own.spec.validation
    assert other.spec.validation is None


def test_the_earlier_adapter_is_the_first_stages_and_the_merged_output_the_last_ones() -> None:
    spec = make_spec(
        {},
        {},
        baseModel={"uri": "s3://models/tiny/", "adapterUri": "s3://adapters/a/"},
        output={"uri": "s3://out/", "merged": True},
    )
    first, last = effective(spec)
    assert (first.spec.base_model.adapter_uri, last.spec.base_model.adapter_uri) == ("s3://adapters/a/", None)
    assert (first.spec.output.merged, last.spec.output.merged) == (False, True)


FULL = {"type": "Full"}
PISSA = {"type": "LoRA", "lora": {"initialization": "PiSSA"}}
ORIGINS: list[tuple[str, list[dict[str, Any]], list[tuple[int | None, str]]]] = [
    ("carried", [{}, {}], [(None, "Base"), (0, "Carried")]),
    ("another tuning", [{}, {"tuning": LORA}], [(None, "Base"), (0, "Merged")]),
    ("a method that compares", [{}, dpo()], [(None, "Base"), (0, "Carried")]),
    ("full, then an adapter", [{"tuning": FULL}, {}], [(None, "Base"), (0, "Whole")]),
    ("an adapter, then full", [{}, {"tuning": FULL}], [(None, "Base"), (0, "Merged")]),
    ("full twice", [{"tuning": FULL}, {"tuning": FULL}], [(None, "Base"), (0, "Whole")]),
    ("PiSSA twice", [{"tuning": PISSA}, {"tuning": PISSA}], [(None, "Base"), (0, "Merged")]),
    ("a reward model ends in itself", [{}, reward(), {}], [(None, "Base"), (0, "Merged"), (0, "Carried")]),
    ("a reward model first", [reward(), {}], [(None, "Base"), (None, "Base")]),
    ("rows end in themselves", [{}, {"generate": {"count": 3}}, {}], [(None, "Base"), (0, "Carried"), (0, "Carried")]),
]


@pytest.mark.parametrize(("stages", "expected"), [row[1:] for row in ORIGINS], ids=[row[0] for row in ORIGINS])
def test_what_a_stage_starts_from(stages: list[dict[str, Any]], expected: list[tuple[int | None, str]]) -> None:
    found = effective(make_spec(*stages))
    assert [tuple(origin(found, stage.number)) for stage in found] == expected


def test_a_sentence_names_the_field_where_it_was_written() -> None:
    _, second = effective(make_spec({}, dpo()))
    text = "spec.datasets[0].uri: found x; spec.tuning is spec's own"
    assert second.named(text) == "spec.stages[1].datasets[0].uri: found x; spec.tuning is spec's own"


GENERATE = {"generate": {"count": 3}}
REFUSED: list[tuple[list[dict[str, Any]], str, str]] = [
    (
        [{"tuning": {"type": "PromptTuning"}}, dpo()],
        "spec.tuning.type",
        "stage-1 cannot start from stage-0: PromptTuning",
    ),
    (
        [{"tuning": {"type": "PrefixTuning"}}, {"tuning": FULL}],
        "spec.stages[1].tuning.type",
        "PrefixTuning adds tokens",
    ),
    ([{}, GENERATE], "spec.stages[1].generate", "the last stage must train"),
    (
        [{}, {"datasets": [{"name": "written", "uri": "stage://stage-0"}]}],
        "spec.stages[1].datasets[0].uri",
        "found stage://stage-0; no earlier stage generates",
    ),
    (
        [{"datasets": [{"name": "written", "uri": "stage://stage-1"}]}, GENERATE, {}],
        "spec.stages[0].datasets[0].uri",
        "found stage://stage-1",
    ),
]


@pytest.mark.parametrize(("stages", "path", "text"), REFUSED)
def test_stages_that_cannot_follow_each_other_are_refused(stages: list[dict[str, Any]], path: str, text: str) -> None:
    found = [(format_path(problem.path), problem.message) for problem in unsupported(make_spec(*stages))]
    assert any(place == path and text in message for place, message in found), found


@pytest.mark.parametrize("stages", [[{}, {}], [{}, dpo(), {"tuning": FULL}], [{"tuning": FULL}, {}], [{}, reward()]])
def test_stages_that_can_follow_each_other_are_taken(stages: list[dict[str, Any]]) -> None:
    assert unsupported(make_spec(*stages)) == []
