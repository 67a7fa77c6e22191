"""The first program of a job, on CPU alone: checks all there is to check, then turns the data into shards of tokens.

    probe the output -> inspect the base model -> pin the data -> rows to shards -> data-report.json -> index.json

Whatever is wrong with a job's inputs is said here, before a GPU is asked for. A second run in the same scratch prefix
writes the same objects again.
"""

import hashlib
import json
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pyarrow as pa

from finetune_api.failures import EXIT_CODES, FineTuneError, Reason, TerminationMessage
from finetune_api.job import FineTuneJobSpec
from finetune_api.manifest import FileEntry
from finetune_api.run import Outline, PinnedObject, PreparedData, PreparedSummary, RunConfig, Shard, Split, StageSummary
from finetune_api.stages import STAGE_URI, EffectiveStage, effective
from finetune_trainer import log, preflight
from finetune_trainer.confined import confined
from finetune_trainer.data.adapter import inspect_adapter
from finetune_trainer.data.basemodel import BaseModel, digest, for_tuning, inspect
from finetune_trainer.data.pipeline import Pipeline
from finetune_trainer.data.policy import AcrossStages
from finetune_trainer.data.records import Record
from finetune_trainer.data.report import DATA_REPORT, DatasetReport, worst
from finetune_trainer.data.rewardmodel import inspect_judge, inspect_reward_model
from finetune_trainer.data.rewardrules import check_rewards
from finetune_trainer.data.shards import Upload
from finetune_trainer.data.sources import Source, sources
from finetune_trainer.probe import probe
from finetune_trainer.runconfig import stage_config
from finetune_trainer.storage import Store, join
from finetune_trainer.synthesis.seeds import KEY as SEEDS
from finetune_trainer.synthesis.seeds import SeedWriter
from finetune_trainer.termination import run, write_termination
from finetune_trainer.workdir import WorkDir

ROWS = "rows.jsonl"
"""What a stage that generates writes, beside its manifest."""


def main() -> int:
    # A process that is PID 1 has no default action for signals.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    return run(prepare)


def _stop(number: int, frame: FrameType | None) -> None:
    """Ends the process there and then: the HTTP client would take an exception for a failed request and retry it.

    What is lost is an index that was not written yet; at worst a probe's few bytes stay behind.
    """
    code = EXIT_CODES[Reason.PREEMPTED]
    text = "the pod was asked to end while it prepared the data"
    write_termination(TerminationMessage(reason=Reason.PREEMPTED, message=text, exit_code=code))
    os._exit(code)


def prepare(config: RunConfig) -> TerminationMessage:
    """Raises FineTuneError with the field, file and line of what is wrong.

    All of it happens in a process of its own: what a tenant's files make of a library ends that one alone.
    """
    return confined(lambda: _prepare(config))


def _prepare(config: RunConfig) -> TerminationMessage:
    # Arrow's own pool takes a gibibyte at once, which says nothing of what is needed.
    pa.set_memory_pool(pa.system_memory_pool())
    data_uri = join(config.scratch_uri, "data")
    folder = WorkDir.from_env().root / "prepare"
    with Store(config.storage) as store:
        preflight.check_access(store, config)
        uid = os.environ.get("FINETUNE_POD_UID") or config.job_uid
        probe(store, config.output_uri, uid, "spec.output.uri")
        scratch = "spec.checkpoint.uri" if config.spec.checkpoint.uri else "spec.output.uri"
        conditional = probe(store, config.scratch_uri, uid, scratch)
        preflight.check_owner(store, config)
        model = inspect(store, config.spec)
        log.event("base model inspected", architecture=model.shape.architecture, parameters=model.shape.parameters)
        stages = effective(config.spec)
        done = _prepare_all(store, config, stages, model, folder)
        index, sha256, reports = done[""] if not config.spec.stages else _of_all(store, config, model, done)
    summary = _summary(data_uri, index, sha256, [stage.data for stage in done.values()])
    if config.spec.stages:
        parts = [_stage_summary(stage, done.get(stage.name), model) for stage in stages]
        summary = summary.model_copy(update={"stages": parts})
    said = {"message": worst(reports), "conditional_writes": conditional}
    return TerminationMessage(prepared=summary.model_copy(update=said))


def _prepare_all(
    store: Store, config: RunConfig, stages: Sequence[EffectiveStage], model: BaseModel, folder: Path
) -> dict[str, "Prepared"]:
    """By stage; but for those that learn from what another one writes."""
    now = [stage for stage in stages if not stage.reads]
    # What is held out must be known before what is trained on is looked at.
    order = sorted(now, key=lambda stage: not _holds_out_datasets(stage))
    folder.mkdir(parents=True, exist_ok=True)
    across = AcrossStages(config.spec.data_policy, folder) if config.spec.stages else None
    done = {stage.name: prepare_stage(store, config, stage, model, folder, across) for stage in order}
    if across:
        across.close()
    return {stage.name: done[stage.name] for stage in now}


def _holds_out_datasets(stage: EffectiveStage) -> bool:
    return any(holdout and holdout.datasets for holdout in (stage.spec.validation, stage.spec.test))


class Prepared(NamedTuple):
    data: PreparedData
    sha256: str
    """Of the index as it was written."""
    reports: list[DatasetReport]


def prepare_stage(
    store: Store,
    config: RunConfig,
    stage: EffectiveStage,
    model: BaseModel,
    folder: Path,
    across: AcrossStages | None = None,
) -> Prepared:
    """One stage's data, or the job's where it has no stages: shards, data-report.json and, last, index.json.

    `config`: the job's; `model`: as `inspect` found it; `folder`: for files while they are written; `across`: of the
    job's stages. Raises FineTuneError with the field, file and line of what is wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _prepare_stage(store, stage_config(config, stage), stage, model, folder, across)
    except FineTuneError as error:
        raise FineTuneError(error.reason, stage.named(str(error))) from error


def _prepare_stage(
    store: Store,
    config: RunConfig,
    stage: EffectiveStage,
    model: BaseModel,
    folder: Path,
    across: AcrossStages | None,
) -> Prepared:
    data_uri = join(config.scratch_uri, join("data", stage.name)) if stage.name else join(config.scratch_uri, "data")
    model = for_tuning(model, config.spec.tuning)
    if config.spec.training.max_length > model.shape.max_positions:
        log.event("maxLength exceeds the model's positions", level="warning", positions=model.shape.max_positions)
    adapter = inspect_adapter(store, config.spec, model)
    rewards, judge = inspect_reward_model(store, config.spec, model), inspect_judge(store, config.spec, model)
    found = sources(store, spec := with_rows(config.spec, config.scratch_uri))
    seeds = SeedWriter(folder / SEEDS)
    upload: Upload = lambda path, key: store.upload(path, join(data_uri, key))  # noqa: E731
    pipeline = Pipeline(
        store,
        spec,
        model,
        folder,
        upload,
        across,
        (lambda split, record: seeds.add(split, record.example)) if stage.generate else _unheard,
    )
    for source in found:
        pipeline.run(source)
    pipeline.close()
    seeds.close()
    _check_enough(config, pipeline)
    check_rewards(store, config.spec.method, model.encoder.tokenizer, data_uri, pipeline.shards)
    classes = pipeline.classes()
    store.put_bytes(join(data_uri, DATA_REPORT), _report(config, model, pipeline.reports))
    known = {
        "adapter": adapter,
        "reward_model": rewards.files,
        "judge": judge.files,
        "reward_parameters": rewards.parameters + judge.parameters,
    }
    index = _index(config, model, found, pipeline, classes).model_copy(update=known)
    if index.train_bytes > config.data_cache_bytes:
        index = index.model_copy(update={"outline": _outline(store, config, data_uri, pipeline.outline.path)})
    if stage.generate:
        index = index.model_copy(update=_for_generating(store, config, stage, data_uri, seeds))
    return Prepared(index, _write_index(store, data_uri, index), pipeline.reports)


def _unheard(split: Split, record: Record) -> None:
    """Most stages need no seeds."""


def _for_generating(
    store: Store, config: RunConfig, stage: EffectiveStage, data_uri: str, seeds: SeedWriter
) -> dict[str, Any]:
    """What a stage that generates needs besides: the rows that it shows, and the model that it asks."""
    if not seeds.close():
        raise FineTuneError(
            Reason.DATA_INVALID,
            "spec.datasets: no row is one question with its answer, of which a stage that generates writes more",
        )
    size, sha256 = store.upload(seeds.path, join(data_uri, SEEDS))
    teacher = stage.generate.teacher if stage.generate else None
    files: list[PinnedObject] = []
    if teacher:
        asked = config.spec.base_model.model_copy(update={"uri": teacher.uri, "adapter_uri": None})
        field = f"spec.stages[{stage.number}].generate.teacher.uri"
        files = inspect(store, config.spec.model_copy(update={"base_model": asked}), field).files
    return {"seeds": FileEntry(key=SEEDS, size=size, sha256=sha256), "teacher": files}


def _outline(store: Store, config: RunConfig, data_uri: str, path: Path) -> Outline:
    """Said once and for all attempts: the order of the rows depends on it."""
    key = "train/outline.parquet"
    size, sha256 = store.upload(path, join(data_uri, key))
    log.event("training data will be streamed", cacheBytes=config.data_cache_bytes)
    return Outline(key=key, size=size, sha256=sha256, cache_bytes=config.data_cache_bytes)


def with_rows(spec: FineTuneJobSpec, scratch_uri: str) -> FineTuneJobSpec:
    """With the place of what an earlier stage wrote in place of its name."""
    datasets = [
        dataset.model_copy(update={"uri": join(scratch_uri, f"stages/{name}/{ROWS}")})
        if (name := dataset.uri.removeprefix(STAGE_URI)) != dataset.uri
        else dataset
        for dataset in spec.datasets
    ]
    return spec.model_copy(update={"datasets": datasets})


def _write_index(store: Store, data_uri: str, index: PreparedData) -> str:
    data = index.model_dump_json(by_alias=True, exclude_none=True).encode()
    store.put_bytes(join(data_uri, "index.json"), data)
    return hashlib.sha256(data).hexdigest()


def _of_all(store: Store, config: RunConfig, model: BaseModel, done: Mapping[str, Prepared]) -> Prepared:
    """The job's own report and index: what all stages read, and which indexes they have."""
    data_uri = join(config.scratch_uri, "data")
    reports = [report for stage in done.values() for report in stage.reports]
    index = PreparedData(
        job_uid=config.job_uid,
        spec_sha256=config.spec_sha256,
        inputs=list({pin.uri: pin for stage in done.values() for pin in stage.data.inputs}.values()),
        datasets_sha256={
            f"{name}/{dataset}": sha256
            for name, stage in done.items()
            for dataset, sha256 in stage.data.datasets_sha256.items()
        },
        base_model=model.files,
        base_model_sha256=model.sha256,
        adapter=next((stage.data.adapter for stage in done.values() if stage.data.adapter), []),
        model=model.shape,
        shards=[],
        dropped=_added([stage.data.dropped for stage in done.values()]),
        max_tokens=max((stage.data.max_tokens for stage in done.values()), default=0),
        stages={name: stage.sha256 for name, stage in done.items()},
    )
    store.put_bytes(join(data_uri, DATA_REPORT), _report(config, model, reports))
    return Prepared(index, _write_index(store, data_uri, index), reports)


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in counts:
        for cause, count in part.items():
            total[cause] = total.get(cause, 0) + count
    return total


def _count(shards: Sequence[Shard], split: Split) -> int:
    return sum(shard.rows for shard in shards if shard.split == split)


def _check_enough(config: RunConfig, pipeline: Pipeline) -> None:
    rows, ranks = _count(pipeline.shards, "train"), config.devices.world_size
    dropped = sum(sum(report.dropped.values()) for report in pipeline.reports)
    if rows < ranks:
        cases = [case for report in pipeline.reports for cases in report.cases.values() for case in cases][:2]
        tail = f" ({dropped:,} were left out: {'; '.join(cases)})" if dropped else ""
        raise FineTuneError(
            Reason.DATA_INVALID,
            f"spec.datasets: {rows:,} training examples are left{tail}; each of the {ranks} processes needs one",
        )
    verdicts = {name for r in pipeline.reports if "train" in r.splits for name in r.splits["train"].verdicts}
    if pipeline.kind == "Unpaired" and len(verdicts) < 2:
        raise FineTuneError(
            Reason.DATA_INVALID, f"spec.datasets: every answer is {verdicts.pop()}; KTO needs good and bad ones"
        )
    if config.spec.validation and not _count(pipeline.shards, "validation"):
        log.event("no row fell into the validation split; it will be empty", level="warning", trainExamples=rows)


def _report(config: RunConfig, model: BaseModel, reports: list[DatasetReport]) -> bytes:
    value: dict[str, Any] = {
        "version": "v1",
        "job": f"{config.namespace}/{config.job}",
        "jobUid": config.job_uid,
        "specSha256": config.spec_sha256,
        "chatTemplate": "model" if model.has_chat_template else "default",
        "maxLength": min(config.spec.training.max_length, model.shape.max_positions),
        "datasets": [report.to_json() for report in reports],
    }
    return json.dumps(value, ensure_ascii=False, indent=1).encode(errors="backslashreplace")


def _index(
    config: RunConfig, model: BaseModel, found: list[Source], pipeline: Pipeline, classes: list[str]
) -> PreparedData:
    return PreparedData(
        job_uid=config.job_uid,
        spec_sha256=config.spec_sha256,
        inputs=[pinned for source in found for pinned in source.files],
        datasets_sha256={
            # Held-out data may bear the name of training data.
            source.dataset.name if source.split is None else f"{source.split}/{source.dataset.name}": digest(
                source.files, "s3://"
            )
            for source in found
        },
        base_model=model.files,
        base_model_sha256=model.sha256,
        model=model.shape,
        kind=pipeline.kind,
        classes=classes,
        shards=pipeline.shards,
        dropped=_added(report.dropped for report in pipeline.reports),
        max_tokens=max(
            (lengths.longest for report in pipeline.reports for lengths in report.splits.values()), default=0
        ),
    )


def _summary(data_uri: str, index: PreparedData, sha256: str, parts: Sequence[PreparedData]) -> PreparedSummary:
    """`parts`: the indexes that have shards."""
    shards = [shard for part in parts for shard in part.shards]
    return PreparedSummary(
        index_uri=join(data_uri, "index.json"),
        index_sha256=sha256,
        report_uri=join(data_uri, DATA_REPORT),
        model=index.model,
        train_examples=_count(shards, "train"),
        validation_examples=_count(shards, "validation"),
        test_examples=_count(shards, "test"),
        train_tokens=_train_tokens(shards),
        dropped=sum(index.dropped.values()),
        max_tokens=index.max_tokens,
        reward_parameters=index.reward_parameters,
    )


def _stage_summary(stage: EffectiveStage, prepared: Prepared | None, model: BaseModel) -> StageSummary:
    shape = for_tuning(model, stage.spec.tuning).shape
    return StageSummary(
        train_tokens=_train_tokens(prepared.data.shards) if prepared else 0,
        max_tokens=prepared.data.max_tokens if prepared else 0,
        reward_parameters=prepared.data.reward_parameters if prepared else 0,
        target_features=shape.target_features,
        target_outputs=shape.target_outputs,
    )


def _train_tokens(shards: Sequence[Shard]) -> int:
    return sum(shard.tokens + shard.rejected_tokens for shard in shards if shard.split == "train")
