"""The model card and the figures."""

import json
from typing import Any

import pytest
import yaml

from finetune_api.manifest import RunInfo
from finetune_api.run import PreparedData, RunConfig
from finetune_trainer.card import metrics_lines, model_card, sparkline
from support.runs import JOB_UID, make_run_config

METRICS = {"evalLossBefore": 2.5, "evalLoss": 1.25, "perplexityBefore": 12.1825, "perplexity": 3.4903}


def make_card(
    metrics: dict[str, float] | None = None, history: list[dict[str, float]] | None = None, **spec: Any
) -> str:
    config = make_run_config(workers=2, **spec).to_json() | {
        "sizing": {"strategy": "ZeRO2", "microBatchSize": 2, "gradientAccumulation": 4, "memoryPerGPU": 1}
    }
    shards = [
        ("train", 90, 1000),
        ("train", 10, 200),
        ("validation", 5, 60),
    ]
    index = {
        "jobUid": JOB_UID,
        "specSha256": "0" * 64,
        "inputs": [],
        "datasetsSha256": {"pairs": "d" * 64},
        "baseModel": [],
        "baseModelSha256": "b" * 64,
        "model": {
            "architecture": "LlamaForCausalLM",
            "dtype": "Float32",
        }
        | dict.fromkeys(
            (
                "parameters",
                "hiddenSize",
                "layers",
                "vocabSize",
                "linearParameters",
                "targetFeatures",
                "largestLayerParameters",
                "maxPositions",
            ),
            1,
        ),
        "shards": [
            {
                "key": f"{split}/{number}.parquet",
                "split": split,
                "dataset": "pairs",
                "rows": rows,
                "tokens": tokens,
                "trainedTokens": tokens,
                "size": 1,
                "sha256": "0" * 64,
            }
            for number, (split, rows, tokens) in enumerate(shards)
        ],
        "dropped": {"duplicates": 7, "tooLong": 0},
    }
    run = RunInfo(
        namespace="team-a",
        job="bot",
        job_uid=JOB_UID,
        attempt=1,
        attempt_uid="uid-1",
        spec_sha256="0" * 64,
        base_model_uri="s3://bucket/models/tiny/",
        base_model_sha256="b" * 64,
        datasets_sha256={"pairs": "d" * 64},
        image="registry/trainer@sha256:abc",
        metrics=METRICS if metrics is None else metrics,
    )
    lines = [{"step": float(i), "loss": 3 - i / 100} for i in range(1, 101)] if history is None else history
    return model_card(RunConfig.model_validate(config), PreparedData.model_validate(index), run, lines, 61.2)


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
    card = make_card(metrics={})
    assert "nothing was evaluated" in card
    assert "Validation loss" not in card


def test_without_a_logged_step() -> None:
    assert "Nothing was logged." in make_card(history=[])


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
