"""The model card and the figures."""

import json
from typing import Any

import pytest
import yaml

from finetune_trainer.card import metrics_lines, model_card, sparkline
from finetune_trainer.facts import groups
from support.telling import make_facts

STAGES = [
    {"name": "sft", "datasets": [{"name": "pairs", "uri": "s3://bucket/data/pairs.jsonl"}]},
    {
        "name": "dpo",
        "method": {"type": "DPO"},
        "datasets": [{"name": "ranked", "uri": "s3://bucket/data/ranked.jsonl"}],
    },
]


def make_card(*told: Any, **changes: Any) -> str:
    return model_card(make_facts(*told, **changes))


def test_the_front_matter_names_the_base_model_and_no_licence() -> None:
    front = yaml.safe_load(make_card().split("---")[1])
    assert front["base_model"] == "s3://bucket/models/tiny/"
    assert front["library_name"] == "peft"
    assert "license" not in front


@pytest.mark.parametrize(
    "line",
    [
        "| Validation loss | 2.5000 | 1.2500 |",
        "| Validation perplexity | 12.1825 | 3.4903 |",
        "| pairs | `s3://bucket/data/pairs.jsonl` | 100 | 1,200 | 5 | in proportion | `dddddddddddddddd` |",
        "Left out: 7 duplicates.",
        "| Steps | 100, 16 examples each |",
        "| Processes | 2 (CPU), ZeRO2 |",
        "| Job | team-a/bot, attempt 1 (`uid-1`) |",
        "| Image | `registry/trainer@sha256:abc` |",
        "| 1 | 2.9900 |",
        "| 100 | 2.0000 |",
    ],
)
def test_what_it_says(line: str) -> None:
    assert line in make_card().splitlines()


def test_packed_rows_are_not_called_examples() -> None:
    assert "| Steps | 100, 16 packed rows each |" in make_card(method={"type": "SFT", "sft": {"packing": True}})


def test_without_validation_data_it_claims_nothing() -> None:
    card = make_card({})
    assert "nothing was evaluated" in card
    assert "Validation loss" not in card


def test_without_a_logged_step() -> None:
    assert "Nothing was logged." in make_card(None, [])


def test_the_mix_that_was_seen_stands_beside_the_planned_one() -> None:
    metrics = {"plannedShare.a": 0.75, "plannedShare.b": 0.25, "trainRows.a": 30.0, "trainRows.b": 10.0}
    card = make_card(metrics | {"trainTokens.a": 900.0, "trainTokens.b": 1100.0})
    assert "| Dataset | Planned share | Share | Rows | Tokens |" in card
    assert "| a | 75.0% | 75.0% | 30 | 900 |" in card
    assert "| b | 25.0% | 25.0% | 10 | 1,100 |" in card
    assert "Planned share" not in make_card()


def test_what_stopped_early_says_whose_weights_it_has_and_what_went_wrong() -> None:
    values = [(10, 2.0, 1.5), (20, 1.5, 1.2), (30, 1.0, 1.4), (40, 0.8, 1.6)]
    history = [{"step": float(step), "loss": loss, "eval_loss": held} for step, loss, held in values]
    card = make_card({"bestStep": 20.0}, history, training={"earlyStopping": {}}, validation={"fraction": 0.1})
    assert "| Weights | of step 20, the best by eval_loss; training ended after step 40 |" in card
    assert "| 20 | 1.2000 |" in card
    assert "Over-fitting: training falls, validation rises since step 20." in card
    assert "Over-fitting" not in make_card()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"type": "PPO"}, "PPO against the reward model before, KL coefficient 0.05, clipped at 0.2"),
        (
            {"type": "GRPO", "grpo": {"rewards": [{"name": "short", "expression": "1"}]}},
            "GRPO (Normalized advantages), 8 answers to a prompt, judged by `short`",
        ),
        ({"type": "DPO"}, "DPO, Sigmoid loss, beta 0.1"),
        ({"type": "Reward"}, "Reward, centring 0"),
    ],
)
def test_each_method_has_its_words(method: dict[str, Any], words: str) -> None:
    assert f"| Method | {words} |" in make_card(method=method).splitlines()


def test_figures_of_datasets_and_slices() -> None:
    card = make_card({"accuracy": 0.5, "accuracy.tickets": 0.25, "accuracyBefore.tickets.de": 0.1, "trainLoss": 1.0})
    lines = card.splitlines()
    assert "| Validation accuracy | – | 0.5000 |" in lines
    assert "| tickets |  | Validation accuracy | – | 0.2500 |" in lines
    assert "| tickets | de | Validation accuracy | 0.1000 | – |" in lines
    assert "trainLoss" not in card


def test_a_slice_cannot_bring_markup() -> None:
    card = make_card({"accuracy": 0.25, "accuracy.tickets.<script>|\nx": 0.25})
    assert "| tickets | &lt;script>\\| x | Validation accuracy | – | 0.2500 |" in card.splitlines()


def test_every_stage_has_its_part_and_what_it_left_of_the_others() -> None:
    metrics = {"sft/evalLoss": 1.0, "sft/evalLoss@dpo": 1.5, "dpo/rewardMargin": 2.0, "rewardMargin": 2.0}
    lines = make_card(metrics, stages=STAGES).splitlines()
    assert [line for line in lines if line.startswith("### ")].count("### sft") == 3
    assert "| sft | Validation loss | sft | 1.0000 |" in lines
    assert "| sft | Validation loss | dpo | 1.5000 |" in lines
    assert "| Method | DPO, Sigmoid loss, beta 0.1 |" in lines
    assert any("supervised fine-tuning, then direct preference optimisation (DPO)" in line for line in lines)


def test_an_adapter_upon_a_merged_model_is_published_as_a_whole_model() -> None:
    card = make_card(kind="Model")
    assert "PeftModel" not in card
    assert "trained (LoRA, merged)" in card


def test_a_column_cannot_break_a_table() -> None:
    card = make_card(tuning={"type": "LoRA", "lora": {"targetModules": ["q_proj", "v.*"]}})
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


@pytest.mark.parametrize(("values", "line"), [([], ""), ([1], ""), ([1, 1], "▁▁"), ([1, 2], "▁█"), ([3, 1], "█▁")])
def test_sparkline(values: list[float], line: str) -> None:
    assert sparkline(values) == line


def test_a_long_curve_is_thinned() -> None:
    assert len(sparkline([float(i) for i in range(10_000)])) == 60


def test_metrics_lines() -> None:
    lines = metrics_lines([{"step": 1.0, "loss": 2.0}], {"evalLoss": 1.0}).splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1.0, "loss": 2.0}, {"final": {"evalLoss": 1.0}}]


@pytest.mark.parametrize("slice_", ["n/a", "a@b", "</script>", "x.y", "sft/a@b"])
def test_a_slice_may_be_called_anything(slice_: str) -> None:
    (row,) = groups({f"accuracyBefore.tickets.{slice_}": 0.25, f"accuracy.tickets.{slice_}": 0.5})
    assert (row.figure.dataset, row.figure.slice, row.before, row.after) == ("tickets", slice_, 0.25, 0.5)
