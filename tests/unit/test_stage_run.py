"""A stage's place among the others: what it starts from on the disk, its share of the job, its figures' names."""

from pathlib import Path
from typing import Any

import pytest

from finetune_api.run import PreparedData
from finetune_trainer.output import named
from finetune_trainer.report import Reporter
from finetune_trainer.results import StageEnd
from finetune_trainer.start import StageRun, Start, in_words, needed, result_of, start_of
from finetune_trainer.workdir import WorkDir
from support.gang import SHAPE
from support.runs import JOB_UID, make_run_config

OTHER: dict[str, Any] = {"tuning": {"type": "LoRA", "lora": {"rank": 2}}}
FULL: dict[str, Any] = {"tuning": {"type": "Full"}}


def make_run(root: Path, *stages: dict[str, Any], number: int = 0, **spec: Any) -> StageRun:
    named_stages = [{"name": "abcdef"[place]} | stage for place, stage in enumerate(stages)]
    return StageRun(make_run_config(stages=named_stages, **spec), number, root)


def test_what_each_stage_is_loaded_from(tmp_path: Path) -> None:
    run = make_run(tmp_path, {}, {}, OTHER, FULL, {}, {})
    work, stages = run.work, run.stages
    base, a, b, d, e = tmp_path / "model", *(tmp_path / "stages" / name for name in "abde")
    merged = tmp_path / "merged"
    assert [start_of(work, stages, number) for number in range(6)] == [
        Start(base, None),
        Start(base, a),
        Start(merged / "b", None),
        Start(merged / "c", None),
        Start(d, None),
        Start(d, e),
    ]
    assert result_of(work, stages, 1) == Start(base, b)
    assert result_of(work, stages, 2) == Start(merged / "b", tmp_path / "stages" / "c")
    assert result_of(work, stages, 3) == Start(d, None)
    assert [needed(stages, number) for number in range(6)] == [[], [0], [0, 1], [0, 1, 2], [3], [3, 4]]
    assert in_words(stages, 2) == "the adapter of stage b, merged into its model"


def test_a_job_without_stages_has_the_folders_that_it_always_had(tmp_path: Path) -> None:
    run = make_run(tmp_path, baseModel={"uri": "s3://bucket/models/tiny/", "adapterUri": "s3://bucket/a/"})
    assert run.is_last
    assert run.config is run.job
    assert run.start == Start(tmp_path / "model", tmp_path / "adapter")
    assert (run.work.index, run.work.checkpoints, run.work.output) == tuple(
        tmp_path / name for name in ("data/index.json", "checkpoints", "output")
    )
    assert run.span() == (0.0, 1.0)


def make_index(root: Path, stage: str, rows: int) -> None:
    shard = {"key": "train/0.parquet", "split": "train", "dataset": "pairs", "rows": rows, "tokens": 1, "size": 1}
    work = WorkDir(root, stage)
    work.data.mkdir(parents=True)
    index = PreparedData.model_validate(
        {
            "jobUid": JOB_UID,
            "specSha256": "0" * 64,
            "inputs": [],
            "datasetsSha256": {},
            "baseModel": [],
            "baseModelSha256": "b" * 64,
            "model": SHAPE,
            "shards": [shard | {"trainedTokens": 1, "sha256": "c" * 64}],
        }
    )
    work.index.write_text(index.model_dump_json(by_alias=True))


def test_progress_is_over_all_stages_by_their_steps(tmp_path: Path) -> None:
    stages = [{"training": {"maxSteps": 10}}, {"training": {"epochs": 2}}, {"training": {"maxSteps": 70}}]
    for name, rows in (("a", 5), ("b", 160), ("c", 5)):
        make_index(tmp_path, name, rows)
    assert [make_run(tmp_path, *stages, number=number).span() for number in range(3)] == [
        (0.0, pytest.approx(0.1)),
        (pytest.approx(0.1), pytest.approx(0.2)),
        (pytest.approx(0.3), pytest.approx(0.7)),
    ]
    reporter = Reporter(None)
    run = make_run(tmp_path, *stages, number=1)
    reporter.stage(run.stage.name, *run.span())
    reporter.progress(10, 20, {}, None)
    assert (reporter._status.stage, reporter._status.step, reporter._status.total_steps) == ("b", 10, 20)
    assert reporter._status.progress_percentage == 20


def test_figures_bear_the_name_of_their_stage() -> None:
    ends = [
        StageEnd(name="a", origin="", metrics={"evalLoss": 1.0}),
        StageEnd(name="b", origin="", metrics={"evalLoss": 2.0, "a/evalLoss@b": 1.5}),
    ]
    assert named(ends, "c", {"evalLoss": 3.0, "a/evalLoss@c": 1.7}) == {
        "evalLoss": 3.0,
        "c/evalLoss": 3.0,
        "a/evalLoss": 1.0,
        "b/evalLoss": 2.0,
        "a/evalLoss@b": 1.5,
        "a/evalLoss@c": 1.7,
    }
    assert named([], "", {"evalLoss": 3.0}) == {"evalLoss": 3.0}
