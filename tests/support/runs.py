"""RunConfigs and the environment of a pod, for tests of what runs in one."""

import json
import os
from pathlib import Path
from typing import Any

from finetune_api.run import RunConfig, StorageConfig

JOB_UID = "11111111-2222-3333-4444-555555555555"


def make_run_config(
    *,
    workers: int = 1,
    processes: int = 1,
    grace_seconds: int = 20,
    bucket: str = "bucket",
    endpoint: str | None = None,
    **spec: Any,
) -> RunConfig:
    """A job over `s3://<bucket>/…`; `spec` overrides fields of the spec, in their API form."""
    fields: dict[str, Any] = {
        "baseModel": {"uri": f"s3://{bucket}/models/tiny/"},
        "datasets": [{"name": "pairs", "uri": f"s3://{bucket}/data/pairs.jsonl"}],
        "output": {"uri": f"s3://{bucket}/out/"},
    }
    fields |= spec
    output = fields["output"]["uri"]
    return RunConfig.model_validate(
        {
            "namespace": "team-a",
            "job": "bot",
            "jobUid": JOB_UID,
            "spec": fields,
            "specSha256": "0" * 64,
            "devices": {"kind": "CPU", "workers": workers, "processesPerWorker": processes},
            "storage": StorageConfig(endpoint=endpoint, region="us-east-1", addressing_style="path"),
            "scratchUri": f"{output}.scratch/{JOB_UID}/",
            "outputUri": f"{output}bot/",
            "graceSeconds": grace_seconds,
        }
    )


def pod_environment(directory: Path, config: RunConfig, **extra: str) -> dict[str, str]:
    """The variables of a pod whose volumes are folders below `directory`."""
    (directory / "run.json").write_text(config.model_dump_json(by_alias=True, exclude_none=True))
    (directory / "work").mkdir(exist_ok=True)
    return os.environ | {
        "FINETUNE_RUN_CONFIG": str(directory / "run.json"),
        "FINETUNE_WORK_DIR": str(directory / "work"),
        "FINETUNE_TERMINATION_LOG": str(directory / "termination-log"),
        "FINETUNE_POD_IP": "127.0.0.1",
        "FINETUNE_POD_UID": "pod-uid",
        "FINETUNE_NODE_NAME": "node-1",
        "FINETUNE_MASTER_PORT": "29500",
        "FINETUNE_WORKER_INDEX": "0",
        **extra,
    }


def events_of(log: Path, name: str) -> list[dict[str, Any]]:
    """The lines of one event. The last line may be half written still."""
    lines = log.read_text().rpartition("\n")[0].splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{"time"')]
    return [event for event in found if event["event"] == name]
