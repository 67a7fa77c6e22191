"""This trainer as a pod runs it: `python -m finetune_trainer train` pulls from S3, starts the rank and publishes."""

import datetime
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from task import Task
from workload import Size, examples_of, plan_of

from finetune_api.run import PinnedObject, PreparedData, RunConfig, StorageConfig
from finetune_sandbox.s3 import S3

BUCKET, JOB = "bench", "11111111-2222-3333-4444-555555555555"


def upload(s3: S3, folder: Path, key: str) -> list[PinnedObject]:
    client, pins = s3.client(), []
    for path in sorted(folder.iterdir()):
        client.upload_file(str(path), BUCKET, key + path.name)
        head = client.head_object(Bucket=BUCKET, Key=key + path.name)
        pins.append(PinnedObject(uri=f"s3://{BUCKET}/{key}{path.name}", size=head["ContentLength"], etag=head["ETag"]))
    return pins


def shape(size: Size, dtype: str) -> dict[str, Any]:
    """Of no consequence here: the plan is given."""
    return {
        "architecture": "LlamaForCausalLM",
        "parameters": 1,
        "hiddenSize": size.hidden,
        "layers": size.layers,
        "vocabSize": size.vocabulary,
        "linearParameters": 1,
        "targetFeatures": 1,
        "largestLayerParameters": 1,
        "maxPositions": 1,
        "dtype": dtype,
    }


def prepare(
    s3: S3, task: Task, size: Size, name: str, spec: dict[str, Any] | None = None, sizing: dict[str, Any] | None = None
) -> None:
    """Lays the model and the shard where `prepare` would have left them; writes the pod's run.json.

    `spec`, `sizing`: parts that are other than a LoRA's under DDP.
    """
    sizing = {
        "strategy": "DDP",
        "microBatchSize": task.micro,
        "gradientAccumulation": task.accumulation,
        "memoryPerGPU": 1,
    } | (sizing or {})
    examples, scratch = examples_of(Path(task.data)), f"{name}/.scratch/{JOB}/"
    data = Path(task.data).read_bytes()
    shard = {
        "key": "train/00000.parquet",
        "split": "train",
        "dataset": "rows",
        "rows": len(examples),
        "tokens": len(examples.input_ids),
        "trainedTokens": int(examples.trained().sum()),
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    index = PreparedData.model_validate(
        {
            "jobUid": JOB,
            "specSha256": "0" * 64,
            "inputs": [],
            "datasetsSha256": {"rows": "0" * 64},
            "baseModel": upload(s3, Path(task.model), f"{name}/model/"),
            "baseModelSha256": "0" * 64,
            "model": shape(size, task.dtype),
            "shards": [shard],
        }
    )
    written = index.model_dump_json(by_alias=True, exclude_none=True).encode()
    for key, body in ((f"{scratch}data/{shard['key']}", data), (f"{scratch}data/index.json", written)):
        s3.client().put_object(Bucket=BUCKET, Key=key, Body=body)
    config = RunConfig.model_validate(
        {
            "namespace": "bench",
            "job": name,
            "jobUid": JOB,
            "attempt": 0,
            "spec": {
                # A checkpoint at the end alone.
                "checkpoint": {"interval": {"type": "Steps", "steps": 10_000_000}},
                "output": {"uri": f"s3://{BUCKET}/{name}/"},
                "baseModel": {"uri": f"s3://{BUCKET}/{name}/model/", "dtype": task.dtype},
                "datasets": [{"name": "rows", "uri": f"s3://{BUCKET}/rows.jsonl"}],
                "method": {"type": "SFT", "sft": {"packing": task.packed}},
                "tuning": {"type": "LoRA", "lora": {"rank": task.lora_rank, "alpha": 2 * task.lora_rank}},
                "training": {
                    "maxSteps": task.steps,
                    "globalBatchSize": task.micro * task.accumulation * task.ranks,
                    "maxLength": task.max_length,
                    "seed": task.seed,
                },
            }
            | (spec or {}),
            "specSha256": "0" * 64,
            "devices": {"kind": task.device, "workers": 1, "processesPerWorker": task.ranks},
            "storage": StorageConfig(endpoint=s3.endpoint, region=s3.region, addressing_style="path"),
            "scratchUri": f"s3://{BUCKET}/{scratch}",
            "outputUri": f"s3://{BUCKET}/{name}/out/",
            "prepared": {
                "indexURI": f"s3://{BUCKET}/{scratch}data/index.json",
                "indexSHA256": hashlib.sha256(written).hexdigest(),
                "reportURI": f"s3://{BUCKET}/{scratch}data/data-report.json",
                "model": shape(size, task.dtype),
                "trainExamples": len(examples),
                "validationExamples": 0,
                "testExamples": 0,
                "trainTokens": len(examples.input_ids),
                "dropped": 0,
                "maxTokens": int(examples.lengths.max()),
            },
            "sizing": sizing,
        }
    )
    Path(task.folder, "run.json").write_text(config.model_dump_json(by_alias=True, exclude_none=True))


def forget(s3: S3, task: Task) -> None:
    """What an earlier run has saved: this one is to start from the first step."""
    uri = json.loads(Path(task.folder, "run.json").read_text())["scratchUri"]
    found = s3.client().list_objects_v2(Bucket=BUCKET, Prefix=f"{uri.removeprefix(f's3://{BUCKET}/')}checkpoints/")
    for entry in found.get("Contents", ()):
        s3.client().delete_object(Bucket=BUCKET, Key=entry["Key"])


def command(s3: S3, task: Task, port: int) -> tuple[list[str], dict[str, str]]:
    folder = Path(task.folder)
    return [sys.executable, "-m", "finetune_trainer", "train"], os.environ | {
        "FINETUNE_RUN_CONFIG": str(folder / "run.json"),
        "FINETUNE_WORK_DIR": str(folder / "work"),
        "FINETUNE_TERMINATION_LOG": str(folder / "termination-log"),
        "FINETUNE_POD_IP": "127.0.0.1",
        "FINETUNE_POD_UID": "pod",
        "FINETUNE_NODE_NAME": "node",
        "FINETUNE_MASTER_ADDR": "127.0.0.1",
        "FINETUNE_MASTER_PORT": str(port),
        "FINETUNE_WORKER_INDEX": "0",
        "FINETUNE_ATTEMPT_UID": f"attempt-{port}",
        "AWS_ACCESS_KEY_ID": s3.admin.access_key_id,
        "AWS_SECRET_ACCESS_KEY": s3.admin.secret_access_key,
    }


def steps(task: Task, log: Path) -> list[dict[str, float]]:
    """What the other contenders record, from the rank's own log lines and the plan of its steps."""
    plan = plan_of(task, examples_of(Path(task.data)))
    lines = [json.loads(line[line.index("{") :]) for line in log.read_text().splitlines() if '{"time"' in line]
    return [
        {
            "at": datetime.datetime.fromisoformat(line["time"]).timestamp(),
            "tokens": int(plan.rows.lengths[plan.step(line["step"] - 1)].sum()),
        }
        for line in lines
        if line["event"] == "step"
    ]
