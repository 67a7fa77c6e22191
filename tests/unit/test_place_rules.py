"""Where a job may not write."""

from typing import Any

import pytest

from finetune_api import job
from finetune_api.model import format_path
from finetune_api.support import unsupported
from support.manifests import job_manifest

DATA = [{"name": "d", "uri": "s3://bucket/data/"}]


def problems(**spec: Any) -> list[str]:
    manifest = job_manifest(**{"baseModel": {"uri": "s3://bucket/models/m/"}, "datasets": DATA} | spec)
    return [f"{format_path(p.path)}: {p.message}" for p in unsupported(job.parse(manifest).spec)]


@pytest.mark.parametrize(
    "spec",
    [
        {"output": {"uri": "s3://bucket/"}},
        {"output": {"uri": "s3://bucket/data-out/"}},
        {"output": {"uri": "s3://bucket/data"}, "datasets": [{"name": "d", "uri": "s3://bucket/data/x.jsonl"}]},
        {"output": {"uri": "s3://bucket/models/"}},
        {"output": {"uri": "s3://other/data/"}},
        # What another job left of a run that diverged.
        {
            "output": {"uri": "s3://bucket/out/"},
            "baseModel": {"uri": "s3://bucket/m/", "adapterUri": "s3://bucket/out/.scratch/u/good/job/step-00000001/"},
        },
    ],
)
def test_beside_what_is_read_there_is_room(spec: dict[str, Any]) -> None:
    assert problems(**spec) == []


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            {"output": {"uri": "s3://bucket/data/out/"}},
            "spec.output.uri: found s3://bucket/data/out/, which lies in what spec.datasets[0].uri reads, "
            "s3://bucket/data/; write outside of it",
        ),
        (
            {"output": {"uri": "s3://bucket/data"}},
            "spec.output.uri: found s3://bucket/data, which lies in what spec.datasets[0].uri reads",
        ),
        (
            {"output": {"uri": "s3://bucket/models/m/adapters/"}, "baseModel": {"uri": "s3://bucket/models/m"}},
            "spec.output.uri: found s3://bucket/models/m/adapters/, which lies in what spec.baseModel.uri reads",
        ),
        (
            {"output": {"uri": "s3://out/"}, "checkpoint": {"uri": "s3://bucket/data/scratch/"}},
            "spec.checkpoint.uri: found s3://bucket/data/scratch/, which lies in what spec.datasets[0].uri reads",
        ),
        (
            {
                "output": {"uri": "s3://out/held-out/x/"},
                "validation": {"datasets": [{"name": "v", "uri": "s3://out/held-out/"}]},
            },
            "spec.output.uri: found s3://out/held-out/x/, which lies in what spec.validation.datasets[0].uri reads",
        ),
        (
            {
                "output": {"uri": "s3://bucket/out/"},
                "datasets": [{"name": "d", "uri": "s3://bucket/out/.scratch/u/x/"}],
            },
            "spec.datasets[0].uri: found s3://bucket/out/.scratch/u/x/, which is scratch data of a job",
        ),
    ],
)
def test_what_is_read_is_not_written_to(spec: dict[str, Any], expected: str) -> None:
    (found,) = problems(**spec)
    assert found.startswith(expected)
