"""Every example is one that the server would take, and the job that uses a profile fits it."""

from pathlib import Path

import pytest

from finetune_api.profile import FineTuneProfile
from finetune_cli import lint, yamldoc

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))


def test_there_are_examples() -> None:
    assert {"sft-lora.yaml", "profile-laptop.yaml"} <= {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_example_has_no_findings(file: Path) -> None:
    assert lint.lint(file.name, file.read_text())[1] == []


@pytest.mark.parametrize(
    ("job", "profile"),
    [
        ("sft-lora", "profile-laptop"),
        ("dpo-lora", "profile-laptop"),
        ("sft-instruction-two-datasets", "profile-a100-8x"),
    ],
)
def test_a_job_fits_its_profile(job: str, profile: str) -> None:
    (document,) = yamldoc.load((EXAMPLES / f"{profile}.yaml").read_text())
    platform = FineTuneProfile.model_validate(document.data)
    assert lint.lint(job, (EXAMPLES / f"{job}.yaml").read_text(), platform)[1] == []
