"""What spec.evaluation may ask for, and which gates can never be met because their figure will not exist."""

from typing import Any

import pytest

from finetune_api.figures import Figure, foremost, name_of, parse, ranked
from finetune_api.job import FineTuneJobSpec
from finetune_api.support import unsupported

DATA = [
    {"name": "tickets", "uri": "s3://data/t/", "columns": {"slice": "language"}},
    {"name": "mails", "uri": "s3://data/m/"},
]


def said(**changes: Any) -> list[str]:
    fields = {
        "baseModel": {"uri": "s3://models/m/"},
        "datasets": DATA,
        "validation": {"fraction": 0.1},
        "output": {"uri": "s3://out/o/"},
    }
    spec = FineTuneJobSpec.model_validate(fields | changes)
    return [str(problem) for problem in unsupported(spec)]


def gate(metric: str, **changes: Any) -> list[str]:
    evaluation = {"gates": [{"metric": metric, "operator": "AtLeast", "value": 0.5}]} | changes.pop("evaluation", {})
    return said(evaluation=evaluation, **changes)


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("evalLoss", Figure("evalLoss")),
        ("evalLossBefore.tickets.de", Figure("evalLoss", before=True, dataset="tickets", slice="de")),
        ("testLoss", Figure("evalLoss", "test")),
        ("testRougeLBefore", Figure("rougeL", "test", before=True)),
        ("retentionPerplexity.wiki", Figure("perplexity", "retention", dataset="wiki")),
        ("sft/evalLoss@dpo", Figure("evalLoss", stage="sft", after="dpo")),
        ("testing", Figure("testing")),
        ("", Figure("")),
    ],
)
def test_a_name_says_what_it_is_of(name: str, figure: Figure) -> None:
    assert parse(name) == figure
    if figure.base and not figure.stage:
        where = "".join(f".{part}" for part in (figure.dataset, figure.slice) if part)
        assert name_of(figure.base + where, figure.split, figure.before) == name


def test_the_most_telling_figures_come_first() -> None:
    names = ["rougeL.a.x", "testLoss", "evalLoss.a", "evalLossBefore", "evalLoss", "dpo/evalLoss", "rougeL", "odd"]
    order = ["evalLoss", "rougeL", "odd", "evalLossBefore", "testLoss", "dpo/evalLoss", "evalLoss.a", "rougeL.a.x"]
    assert ranked(names) == order
    assert list(foremost(dict.fromkeys(names, 1.0), 2)) == ["evalLoss", "rougeL"]


@pytest.mark.parametrize(
    "evaluation",
    [
        {"metrics": ["Loss", "Perplexity", "TokenAccuracy", "ExactMatch", "F1", "Rouge", "Bleu", "Chrf", "Meteor"]},
        {"retention": {"datasets": [{"name": "wiki", "uri": "s3://data/w/"}], "maxRegression": 0.1}},
    ],
)
def test_what_is_built_is_accepted(evaluation: dict[str, Any]) -> None:
    assert said(evaluation=evaluation) == []
    assert said(evaluation=evaluation, test={"fraction": 0.1}) == []


@pytest.mark.parametrize(
    ("metrics", "changes", "words"),
    [
        (["Accuracy"], {}, "metrics[0]: found Accuracy; it needs Labelled data (method SFT)"),
        (["Rouge"], {"validation": None}, "metrics[0]: found Rouge; nothing is held out"),
        (
            ["Loss", "Bleu"],
            {"method": {"type": "SFT", "sft": {"loss": "All"}}},
            "metrics[1]: found Bleu; it compares answers",
        ),
        (["Rouge"], {"datasets": [DATA[1] | {"format": "Text"}]}, "metrics[0]: found Rouge; it compares answers"),
        (
            ["TokenAccuracy"],
            {"method": {"type": "DPO"}},
            "metrics[0]: found TokenAccuracy; it is measured with method SFT",
        ),
        (["Rouge"], {"method": {"type": "Reward"}}, "metrics[0]: found Rouge; it compares answers"),
        (["WinRate"], {}, "rewardModel: is required where metrics has WinRate"),
    ],
)
def test_what_cannot_be_measured_is_refused(metrics: list[str], changes: dict[str, Any], words: str) -> None:
    found = said(evaluation={"metrics": metrics}, **changes)
    assert any(f"spec.evaluation.{words}" in text for text in found), found


@pytest.mark.parametrize(
    ("metric", "changes"),
    [
        ("evalLoss", {}),
        ("perplexity.tickets", {}),
        ("evalLossBefore.tickets.de", {}),
        ("rougeL.mails", {"evaluation": {"metrics": ["Rouge"]}}),
        ("testLoss", {"test": {"fraction": 0.1}}),
        ("retentionLoss", {"evaluation": {"retention": {"datasets": [{"name": "wiki", "uri": "s3://data/w/"}]}}}),
        ("rewardMargin", {"method": {"type": "DPO"}}),
        ("tokensPerSecond", {}),
        ("f1", {"datasets": [DATA[0] | {"format": "Labelled"}]}),
    ],
)
def test_a_gate_on_a_figure_that_will_be_there(metric: str, changes: dict[str, Any]) -> None:
    assert gate(metric, **changes) == []


@pytest.mark.parametrize(
    ("metric", "changes", "words"),
    [
        ("rougeL", {}, "found 'rougeL'; evaluation.metrics has no Rouge"),
        ("rogueL", {}, "found 'rogueL'; its figures are evalLoss, perplexity, tokenAccuracy"),
        ("perplexity", {"method": {"type": "DPO"}}, "its figures are chosenReward, evalLoss, preferenceAccuracy"),
        ("testLoss", {}, "found 'testLoss'; it needs spec.test"),
        ("evalLoss", {"validation": None}, "found 'evalLoss'; it needs spec.validation"),
        ("retentionLoss", {}, "it needs spec.evaluation.retention"),
        ("evalLoss.letters", {}, "there is no dataset 'letters': there are tickets, mails"),
        ("evalLoss.mails.de", {}, "dataset mails has no columns.slice"),
        ("sft/evalLoss", {}, "there is no stage 'sft': the job has no stages"),
    ],
)
def test_a_gate_on_a_figure_that_cannot_be_is_refused(metric: str, changes: dict[str, Any], words: str) -> None:
    found = gate(metric, **changes)
    assert any(text.startswith("spec.evaluation.gates[0].metric: ") and words in text for text in found), found


def test_gates_of_stages() -> None:
    stages = [
        {"name": "sft", "method": {"type": "SFT"}},
        {"name": "dpo", "method": {"type": "DPO"}, "datasets": [{"name": "pairs", "uri": "s3://data/p/"}]},
    ]
    for metric in ("sft/perplexity", "rewardMargin", "dpo/rewardMargin.pairs", "sft/evalLoss@dpo"):
        assert gate(metric, stages=stages) == []
    assert "its figures are chosenReward" in gate("perplexity", stages=stages)[0]
    assert "there is no stage 'rl': its stages are sft, dpo" in gate("rl/evalLoss", stages=stages)[0]
    assert "evalLoss alone is measured" in gate("sft/perplexity@dpo", stages=stages)[0]
