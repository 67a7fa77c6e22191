"""The contract's models: what they refuse and how they say it."""

from collections.abc import Callable
from typing import Any

import pydantic
import pytest

from finetune_api import job
from finetune_api.failures import EXIT_CODES, OUTCOMES, Reason, TerminationMessage, outcome_of, reason_of_exit_code
from finetune_api.model import format_path, problems_of, quantity
from finetune_api.support import unsupported
from support.manifests import job_manifest


def test_a_minimal_job_gets_its_defaults() -> None:
    spec = job.parse(job_manifest()).spec
    assert spec.method.type == "SFT"
    assert spec.tuning.type == "LoRA"
    assert spec.run_policy.max_attempts == 4
    assert spec.distribution.workers == 1


def test_json_and_back_is_the_same() -> None:
    parsed = job.parse(job_manifest(training={"maxSteps": 3}, tuning={"type": "LoRA", "lora": {"rank": 4}}))
    assert job.parse(parsed.to_json()) == parsed


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"foo": 1}, "spec.foo", "does not exist"),
        ({"distribution": {"workers": -1}}, "spec.distribution.workers", "found -1"),
        ({"training": {"epochs": 1, "maxSteps": 1}}, "spec.training", "epochs and maxSteps cannot both be given"),
        ({"tuning": {"type": "LoRA", "ia3": {}}}, "spec.tuning", "ia3 is allowed only where type is IA3"),
        ({"baseModel": {"uri": "s3://models/a/../b"}}, "spec.baseModel.uri", "path segment"),
        ({"baseModel": {"uri": "http://models/a"}}, "spec.baseModel.uri", "pattern"),
        ({"datasets": []}, "spec.datasets", "at least 1 item"),
        ({"credentials": {}}, "spec.credentials", "exactly one of secretRef and serviceAccountName"),
        ({"validation": {"fraction": 0.9}}, "spec.validation.fraction", "less than or equal to 0.5"),
        ({"checkpoint": {"interval": {"type": "Steps"}}}, "spec.checkpoint.interval", "steps is required"),
    ],
)
def test_bad_specs_name_the_field(changes: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        job.parse(job_manifest(**changes))
    found = {format_path(problem.path): problem.message for problem in problems_of(caught.value)}
    assert words in found[path]


@pytest.mark.parametrize("name", ["a" * 51, "-a", "A", "a.b", "1a", ""])
def test_names_that_would_not_fit_their_children_are_refused(name: str) -> None:
    manifest = job_manifest()
    manifest["metadata"]["name"] = name
    with pytest.raises(pydantic.ValidationError):
        job.parse(manifest)


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"baseModel": {"uri": "hf://org/name"}}, "spec.baseModel.uri"),
        ({"tracking": {"tensorboard": True}}, "spec.tracking"),
    ],
)
def test_what_is_not_built_yet_is_refused_with_its_field(changes: dict[str, Any], path: str) -> None:
    problems = unsupported(job.parse(job_manifest(**changes)).spec)
    assert [format_path(p.path) for p in problems] == [path]
    assert "this version supports" in problems[0].message


LABELLED = {"datasets": [{"name": "texts", "uri": "s3://data/texts.jsonl", "format": "Labelled"}]}


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        (
            {"tuning": {"type": "PromptTuning"}, "method": {"type": "SFT", "sft": {"packing": True}}},
            "spec.method.sft.packing",
            "only the row's first example would see them",
        ),
        (
            {"tuning": {"type": "QLoRA"}, "distribution": {"strategy": "ZeRO2"}},
            "spec.distribution.strategy",
            "QLoRA's quantised weights cannot be partitioned: DDP (or Auto)",
        ),
        (
            {"tuning": {"type": "DoRA"}, "distribution": {"strategy": "ZeRO3"}},
            "spec.distribution.strategy",
            "DDP or ZeRO1 or ZeRO2 (or Auto)",
        ),
        (
            {"tuning": {"type": "IA3"}, "distribution": {"strategy": "ZeRO3"}},
            "spec.distribution.strategy",
            "IA3's few parameters are not partitioned: DDP or ZeRO1 or ZeRO2 (or Auto)",
        ),
        (
            {"tuning": {"type": "QLoRA", "lora": {"initialization": "PiSSA"}}},
            "spec.tuning.lora.initialization",
            "it changes the base weights",
        ),
        (
            {"tuning": {"type": "Full"}, "baseModel": {"uri": "s3://models/b/", "adapterUri": "s3://models/a/"}},
            "spec.baseModel.adapterUri",
            "publish the adapter merged",
        ),
        (
            {"method": {"type": "Reward"}, "baseModel": {"uri": "s3://models/b/", "adapterUri": "s3://models/a/"}},
            "spec.baseModel.adapterUri",
            "Reward starts from a whole model; publish the adapter merged",
        ),
        (
            {"method": {"type": "Reward"}, "tuning": {"type": "PrefixTuning"}},
            "spec.tuning.type",
            "peft trains no new head beside virtual tokens: LoRA, QLoRA, DoRA, IA3, Freeze, Full",
        ),
        (
            LABELLED | {"tuning": {"type": "PromptTuning"}},
            "spec.tuning.type",
            "peft trains no new head beside virtual tokens",
        ),
        (
            LABELLED | {"method": {"type": "SFT", "sft": {"packing": True}}},
            "spec.method.sft.packing",
            "each row of Labelled data holds one text",
        ),
        (
            LABELLED | {"baseModel": {"uri": "s3://models/b/", "adapterUri": "s3://models/a/"}},
            "spec.baseModel.adapterUri",
            "a new head for Labelled data starts from a whole model",
        ),
        (
            {"method": {"type": "KTO"}, "training": {"globalBatchSize": 1}},
            "spec.training.globalBatchSize",
            "at least 2",
        ),
        (
            LABELLED | {"method": {"type": "SFT", "sft": {"loss": "All"}}},
            "spec.method.sft.loss",
            "classes are learned, not tokens",
        ),
        (
            {"training": {"globalBatchSize": 10}, "distribution": {"workers": 2, "gpusPerWorker": 2}},
            "spec.training.globalBatchSize",
            "a multiple of the 4 processes (workers x gpusPerWorker), for example 8",
        ),
        (
            {
                "training": {"globalBatchSize": 16},
                "distribution": {"workers": 4, "minWorkers": 3, "gpusPerWorker": 2},
                "runPolicy": {"preRunningDeadlineSeconds": 600},
            },
            "spec.training.globalBatchSize",
            "a multiple of the 6 processes (minWorkers x gpusPerWorker), for example 12",
        ),
        (
            {"distribution": {"workers": 2, "minWorkers": 1}},
            "spec.distribution.minWorkers",
            "runPolicy.preRunningDeadlineSeconds, which says how long all workers are waited for, must be given too",
        ),
        (
            {
                "distribution": {"workers": 2, "minWorkers": 1},
                "runPolicy": {"preRunningDeadlineSeconds": 600},
                "queue": {"name": "team-a"},
            },
            "spec.distribution.minWorkers",
            "the queue team-a admits all workers or none",
        ),
        (
            {"training": {"globalBatchSize": 16, "microBatchSize": 3}, "distribution": {"workers": 2}},
            "spec.training.microBatchSize",
            "must divide the 8 examples that each process takes",
        ),
        (
            {"distribution": {"strategy": "ZeRO2"}},
            "spec.distribution.strategy",
            "one process has none to share with",
        ),
        (
            {"distribution": {"workers": 2, "strategy": "DDP", "offload": "Optimizer"}},
            "spec.distribution.offload",
            "strategy DDP cannot offload it: ZeRO2 or ZeRO3 (or Auto)",
        ),
        (
            {"tuning": {"type": "QLoRA"}, "distribution": {"offload": "Optimizer"}},
            "spec.distribution.offload",
            "QLoRA trains under DDP, which cannot offload it",
        ),
        (
            {"tuning": {"type": "Full"}, "output": {"uri": "s3://out-bucket/", "merged": True}},
            "spec.output.merged",
            "a whole model is published in any case",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(changes: dict[str, Any], path: str, words: str) -> None:
    (problem,) = unsupported(job.parse(job_manifest(**changes)).spec)
    assert format_path(problem.path) == path
    assert words in problem.message


def test_the_minimal_job_is_supported() -> None:
    assert unsupported(job.parse(job_manifest()).spec) == []


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("500m", 0.5), ("2Gi", 2 * 1024**3), ("1.5k", 1500), ("3M", 3e6), ("1Ti", 1024**4)]
)
def test_quantities(text: str, value: float) -> None:
    assert quantity(text) == value


def test_exit_codes_are_distinct_and_come_back() -> None:
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)
    assert all(reason_of_exit_code(code) is reason for reason, code in EXIT_CODES.items())
    assert all(2 < code < 126 for code in EXIT_CODES.values())
    assert reason_of_exit_code(-9) is Reason.RANK_FAILED


def test_only_named_reasons_are_tried_again() -> None:
    assert {reason for reason in Reason if outcome_of(reason) != "Permanent"} == set(OUTCOMES)


@pytest.mark.parametrize("fill", [lambda n: "x" * n, lambda n: "é" * n, lambda n: '"' * n, lambda n: "\n" * n])
def test_a_termination_message_fits_into_4096_bytes(fill: Callable[[int], str]) -> None:
    message = TerminationMessage(reason=Reason.DATA_INVALID, message=fill(2048), exit_code=66)
    assert len(message.encode()) <= 4096
    decoded = TerminationMessage.decode(message.encode().decode())
    assert decoded is not None
    assert decoded.reason is Reason.DATA_INVALID


@pytest.mark.parametrize(
    "text", ["", "Traceback (most recent call last)", '{"reason": "Data', '{"reason": "Nope"}', "[]"]
)
def test_what_is_not_a_termination_message_is_none(text: str) -> None:
    assert TerminationMessage.decode(text) is None


def test_null_is_as_good_as_nothing() -> None:
    nulls = job_manifest(stages=None, queue=None, tuning={"type": "LoRA", "lora": {"targetModules": None}})
    assert job.parse(nulls) == job.parse(job_manifest(tuning={"type": "LoRA", "lora": {}}))


def test_a_field_that_does_not_exist_is_refused_with_null_too() -> None:
    with pytest.raises(pydantic.ValidationError, match="stagez"):
        job.parse(job_manifest(stagez=None))


def test_a_word_is_no_boolean() -> None:
    with pytest.raises(pydantic.ValidationError, match="suspend"):
        job.parse(job_manifest(runPolicy={"suspend": "yes"}))
