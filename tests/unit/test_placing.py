"""What sizing is asked of a stage."""

from typing import Any

import pytest

from finetune_api import job
from finetune_api.placing import request_of
from finetune_api.stages import effective
from support.manifests import job_manifest


@pytest.mark.parametrize(
    ("method", "batch", "length"),
    [
        ({"type": "SFT"}, 16, 100),
        ({"type": "PPO", "ppo": {"maxNewTokens": 28}}, 16, 128),
        # Each step learns from all answers to its prompts, and an answer stands behind its prompt.
        ({"type": "GRPO", "grpo": {"generations": 4, "maxNewTokens": 28}}, 64, 128),
    ],
)
def test_answers_count(method: dict[str, Any], batch: int, length: int) -> None:
    stages = effective(job.parse(job_manifest(method=method)).spec)
    request = request_of(stages, 0, max_tokens=100)
    assert (request.global_batch_size, request.sequence_length) == (batch, length)
