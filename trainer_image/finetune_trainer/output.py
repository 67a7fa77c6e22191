"""What a stage leaves: saved by rank 0 and published, as the job's output or as what the stage after it starts from."""

import json
import os
import shutil
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from finetune_api.failures import TrainingResult
from finetune_api.manifest import RunInfo
from finetune_trainer import card, htmlreport, log, save
from finetune_trainer.data.report import DATA_REPORT
from finetune_trainer.facts import Evidence, Facts
from finetune_trainer.fence import Fence
from finetune_trainer.journal import Journal
from finetune_trainer.model import Task
from finetune_trainer.publish import now, publish
from finetune_trainer.report import Reporter
from finetune_trainer.results import RECORD, Record, StageEnd, publish_result, read_record
from finetune_trainer.start import StageRun
from finetune_trainer.state import Tensors
from finetune_trainer.steps import name_of
from finetune_trainer.storage import Store, join
from finetune_trainer.storage_errors import ObjectMissing


class Trained(NamedTuple):
    """A model at the end of its training; `parameters`: the trained ones, whole, by name."""

    model: Any
    parameters: Tensors
    initial: Tensors
    """Of `tuning.initial_of`."""
    dtype: torch.dtype
    task: Task
    classes: Sequence[str]


def save_output(run: StageRun, trained: Trained) -> Literal["Adapter", "Model"]:
    """Fills `work.output`. An adapter upon a merged model would be of no use to anybody: the last stage merges it."""
    spec, start, output = run.config.spec, run.start, run.work.output
    _, parameters, initial, dtype, task, classes = trained
    if not spec.tuning.is_adapter:
        save.save_model(start.model, dtype, task, classes, parameters, output)
        save.copy_tokenizer(start.model, output)
        return "Model"
    whole = run.is_last and start.model != run.work.model
    adapter = output.with_name(f"{output.name}.adapter") if whole else output
    save.save_adapter(trained.model, parameters, initial, adapter)
    if classes:
        save.save_classes(start.model, classes, adapter)
    if whole:
        shutil.rmtree(output, ignore_errors=True)
    if whole or (run.is_last and spec.output.merged):
        merged = output if whole else output / "merged"
        save.save_merged(start.model, spec.tuning, dtype, task, classes, adapter, merged)
        save.copy_tokenizer(start.model, merged)
    save.copy_tokenizer(start.model, output)
    return "Model" if whole else "Adapter"


def publish_stage(run: StageRun, store: Store, journal: Journal, metrics: dict[str, float]) -> None:
    """Rank 0, of a stage that is not the last: what was saved, and what was measured so far."""
    end = StageEnd(
        name=run.stage.name, origin=run.origin, metrics=metrics, history=journal.history, seconds=journal.seconds
    )
    before = read_record(store, run.job, run.stages, run.number)
    record = Record(stages=[*before.stages, end])
    (run.work.output / RECORD).write_text(record.model_dump_json())
    publish_result(store, run.job, run.work, run.stage, run.work.output, journal.published_step)


def publish_sound(run: StageRun, store: Store, trained: Trained, step: int) -> str:
    """Rank 0, of a run that diverged: what its last good checkpoint holds, in the scratch prefix, as another job can
    start from it. Returns how, in words."""
    kind = save_output(run, trained)
    uri = join(run.job.scratch_uri, f"good/{run.stage.name or 'job'}/{name_of(step)}/")
    Fence.check_own(store, run.job)
    store.delete_prefix(uri, run.job.scratch_uri)
    publish(store, run.work.output, uri, kind=kind, step=step, created_time=now())
    field = "baseModel.adapterUri" if kind == "Adapter" else "baseModel.uri"
    return f"a job can start from its weights with {field} {uri}"


def publish_output(
    run: StageRun,
    store: Store,
    journal: Journal,
    metrics: dict[str, float],
    reporter: Reporter,
    kind: Literal["Adapter", "Model"],
    evidence: Evidence,
) -> TrainingResult:
    """Rank 0, of the last stage: what was saved, below the attempt's own UID, its manifest last."""
    config, output = run.config, run.work.output
    earlier = read_record(store, run.job, run.stages, run.number).stages
    metrics = named(earlier, run.stage.name, metrics)
    attempt_uid = os.environ["FINETUNE_ATTEMPT_UID"]
    info = RunInfo(
        namespace=config.namespace,
        job=config.job,
        job_uid=config.job_uid,
        attempt=config.attempt or 0,
        attempt_uid=attempt_uid,
        spec_sha256=config.spec_sha256,
        base_model_uri=config.spec.base_model.uri,
        base_model_sha256=run.index.base_model_sha256,
        datasets_sha256=run.index.datasets_sha256,
        image=config.image,
        metrics=metrics,
    )
    last = StageEnd(
        name=run.stage.name, origin=run.origin, metrics=metrics, history=journal.history, seconds=journal.seconds
    )
    facts = Facts(run.job, run.stages, kind, info, [*earlier, last], data_reports(run, store), evidence)
    (output / "README.md").write_text(card.model_card(facts))
    (output / "report.html").write_text(htmlreport.report(facts), encoding="utf-8", errors="replace")
    (output / "metrics.jsonl").write_text(
        _stage_lines(earlier) + card.metrics_lines(_of_stage(run.stage.name, journal.history), metrics)
    )
    reporter.phase("Publishing")
    uri = f"{config.output_uri.rstrip('/')}/{attempt_uid}/"
    fence = Fence.of(store, run.job)
    step, commit = journal.published_step, fence.commit if fence else None
    done = publish(store, output, uri, kind=kind, step=step, created_time=now(), run=info, commit=commit)
    log.event("published", uri=done.uri, bytes=done.size, manifest_sha256=done.manifest_sha256)
    return TrainingResult(uri=done.uri, manifest_sha256=done.manifest_sha256, size_bytes=done.size, metrics=metrics)


def data_reports(run: StageRun, store: Store) -> dict[str, Any]:
    """What `prepare` reported of each stage's data, where it did."""
    found = {}
    for stage in run.stages:
        uri = join(join(run.job.scratch_uri, f"data/{stage.name}".rstrip("/")), DATA_REPORT)
        try:
            found[stage.name] = json.loads(store.get_bytes(uri, 64 * 2**20))
        except ObjectMissing:
            continue
    return found


def named(earlier: Sequence[StageEnd], last: str, metrics: dict[str, float]) -> dict[str, float]:
    """The figures of all stages: the last one's by their own names, and each stage's by `<stage>/<figure>`."""
    if not last:
        return metrics
    found = dict(metrics)
    for name, own in [*((end.name, end.metrics) for end in earlier), (last, metrics)]:
        # `sft/evalLoss@dpo` says by itself whose it is.
        found |= {figure if "/" in figure else f"{name}/{figure}": value for figure, value in own.items()}
    return found


def _of_stage(name: str, history: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    return [{"stage": name} | entry for entry in history] if name else list(history)


def _stage_lines(earlier: Sequence[StageEnd]) -> str:
    return "".join(json.dumps(entry) + "\n" for end in earlier for entry in _of_stage(end.name, end.history))
