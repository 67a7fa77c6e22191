"""What is known of a finished job, as the model card and the report are told."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune_api.manifest import RunInfo
from finetune_api.run import RunConfig
from finetune_api.stages import effective
from finetune_trainer.evaluation.samples import Sample
from finetune_trainer.facts import Evidence, Facts
from finetune_trainer.results import StageEnd
from support.runs import JOB_UID, make_run_config

METRICS = {"evalLossBefore": 2.5, "evalLoss": 1.25, "perplexityBefore": 12.1825, "perplexity": 3.4903}
SIZING = {"strategy": "ZeRO2", "microBatchSize": 2, "gradientAccumulation": 4, "memoryPerGPU": 1}


def make_history(steps: int = 100) -> list[dict[str, float]]:
    return [
        {"step": float(i), "loss": 3 - i / 100, "learning_rate": 1e-4 * i, "grad_norm": 0.5}
        for i in range(1, steps + 1)
    ]


def make_data_report(dataset: str = "pairs", **changes: Any) -> dict[str, Any]:
    """data-report.json of one dataset."""
    known = {
        "name": dataset,
        "format": "PromptCompletion",
        "renderedBy": "plain",
        "files": ["s3://bucket/data/pairs.jsonl"],
        "ignored": [],
        "rowsRead": 112,
        "splits": {
            "train": {
                "examples": 100,
                "tokens": 1200,
                "trainedTokens": 900,
                "shortest": 3,
                "longest": 30,
                "mean": 12.0,
            },
            "validation": {
                "examples": 5,
                "tokens": 60,
                "trainedTokens": 40,
                "shortest": 3,
                "longest": 30,
                "mean": 12.0,
            },
        },
        "dropped": {"duplicates": 7, "tooLong": 0},
        "warned": {"template": 1},
        "cases": {"duplicates": ["s3://bucket/data/pairs.jsonl line 9: as line 3"], "template": ["line 5: <|im_end|>"]},
        "sample": "What is it? A thing.",
    }
    return {"version": "v1", "maxLength": 256, "datasets": [known | changes]}


def make_facts(
    metrics: Mapping[str, float] | None = None,
    history: Sequence[dict[str, float]] | None = None,
    *,
    data: Mapping[str, Mapping[str, Any]] | None = None,
    kind: str = "Adapter",
    classes: Sequence[str] = (),
    confusion: Sequence[Sequence[int]] = (),
    samples: Sequence[Sample] = (),
    **spec: Any,
) -> Facts:
    """Of each stage as many steps as of the others."""
    stages = spec.get("stages", [])
    fields = make_run_config(workers=2, **spec).to_json() | {"sizing": SIZING, "stageSizings": [SIZING for _ in stages]}
    config = RunConfig.model_validate(fields)
    found = effective(config.spec)
    known = dict(METRICS if metrics is None else metrics)
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
        metrics=known,
    )
    lines = make_history() if history is None else list(history)
    courses = [
        StageEnd(name=s.name, origin="the base model" if s.name else "", metrics=known, history=lines, seconds=61.2)
        for s in found
    ]
    reports = {s.name: make_data_report() for s in found} if data is None else data
    evidence = Evidence(classes, confusion, samples)
    return Facts(config, found, "Model" if kind == "Model" else "Adapter", run, courses, reports, evidence)
