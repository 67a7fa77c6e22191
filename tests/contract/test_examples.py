"""Every example is one that the server would take, and the job that uses a profile fits it."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from finetune_api.dataset import Format
from finetune_api.job import FineTuneJob
from finetune_api.method import Method
from finetune_api.profile import FineTuneProfile
from finetune_api.stages import effective
from finetune_api.tuning import Tuning
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


def choices(model: type[BaseModel]) -> set[str]:
    return set(get_args(model.model_fields["type"].annotation))


def test_each_method_tuning_and_format_has_an_example() -> None:
    documents = [document.data for file in FILES for document in yamldoc.load(file.read_text())]
    jobs = [FineTuneJob.model_validate(data) for data in documents if data["kind"] == "FineTuneJob"]
    stages = [stage.spec for job in jobs for stage in effective(job.spec)]
    assert {spec.method.type for spec in stages} == choices(Method)
    assert {spec.tuning.type for spec in stages} == choices(Tuning)
    loras = [spec.tuning.lora for spec in stages if spec.tuning.lora]
    assert {lora.scaling for lora in loras} == {"Standard", "RankStabilized"}
    assert {lora.initialization for lora in loras} == {"Default", "PiSSA"}
    formats = {dataset.format for spec in stages for dataset in spec.datasets}
    assert formats | {"Auto"} == set(get_args(Format))


def test_the_readme_names_each_example() -> None:
    readme = (EXAMPLES.parent / "README.md").read_text()
    assert [file.name for file in FILES if f"examples/{file.name}" not in readme] == ["profile-laptop.yaml"]
