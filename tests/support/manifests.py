"""Builders of manifests."""

from typing import Any


def job_manifest(name: str = "support-bot", namespace: str = "team-a", **spec: Any) -> dict[str, Any]:
    """A minimal valid FineTuneJob; keyword arguments replace members of spec."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "baseModel": {"uri": "s3://models/tiny/"},
            "datasets": [{"name": "tickets", "uri": "s3://data/tickets.jsonl"}],
            "output": {"uri": "s3://adapters/team-a/"},
            **spec,
        },
    }
