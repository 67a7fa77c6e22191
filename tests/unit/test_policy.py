"""What a profile allows a job, each refusal by its field."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from finetune_api.job import parse
from finetune_api.model import format_path
from finetune_api.policy import not_allowed
from finetune_api.profile import FineTuneProfile, FineTuneProfileSpec
from finetune_api.support import unsupported_profile
from support.manifests import job_manifest
from support.world import make_profile

MODEL = {"uri": "s3://models/tiny/"}


def refused(allowed: dict[str, list[str]], **spec: Any) -> list[str]:
    """Problems of team-a's job, as a person reads them."""
    profile = FineTuneProfile.model_validate(make_profile(allowedUris=allowed))
    return [str(problem) for problem in not_allowed(parse(job_manifest(**spec)), profile)]


@pytest.mark.parametrize(
    ("prefix", "uri", "fine"),
    [
        ("s3://data/{namespace}/", "s3://data/team-a/x.jsonl", True),
        ("s3://data/{namespace}/", "s3://data/team-a/", True),
        ("s3://data/{namespace}", "s3://data/team-a/x/", True),
        ("s3://data-{namespace}/in", "s3://data-team-a/in/", True),
        ("s3://", "s3://anything/", True),
        ("s3://data", "s3://data/", True),
        ("s3://data/{namespace}", "s3://data/team-ab/", False),
        ("s3://data", "s3://database/x/", False),
        ("s3://data/{namespace}/", "s3://data/team-a", False),
        ("s3://data/{namespace}/", "s3://data/team-b/", False),
        ("s3://data/{namespace}/", "s3://data//team-a/", False),
        ("s3://data/{namespace}/", "s3://data/Team-A/", False),
        ("s3://data/{namespace}/", "s3://data/", False),
        ("hf://org/", "s3://org/x/", False),
    ],
)
def test_prefixes_reach_whole_segments(prefix: str, uri: str, fine: bool) -> None:
    found = refused({"datasets": [prefix]}, datasets=[{"name": "d", "uri": uri}])
    own = prefix.replace("{namespace}", "team-a")
    text = f"spec.datasets[0].uri: found '{uri}'; profile 'laptop' allows {own}"
    assert found == ([] if fine else [text])


FOREIGN = "s3://team-b/x/"
DATA = [{"name": "d", "uri": FOREIGN}]
OWN = {"datasets": [{"name": "d", "uri": "s3://team-a/d/"}], "output": {"uri": "s3://team-a/out"}}
GENERATE = {"name": "g", "generate": {"count": 3, "teacher": {"uri": FOREIGN}}}


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"baseModel": {"uri": FOREIGN}}, "baseModel.uri"),
        ({"baseModel": {"uri": "s3://team-a/m/", "adapterUri": FOREIGN}}, "baseModel.adapterUri"),
        ({"method": {"type": "PPO", "ppo": {"rewardModel": {"uri": FOREIGN}}}}, "method.ppo.rewardModel.uri"),
        ({"method": {"type": "GRPO", "grpo": {"rewardModel": {"uri": FOREIGN}}}}, "method.grpo.rewardModel.uri"),
        ({"evaluation": {"rewardModel": {"uri": FOREIGN}}}, "evaluation.rewardModel.uri"),
        ({"evaluation": {"retention": {"datasets": DATA}}}, "evaluation.retention.datasets[0].uri"),
        ({"validation": {"datasets": DATA}}, "validation.datasets[0].uri"),
        ({"test": {"datasets": DATA}}, "test.datasets[0].uri"),
        ({"checkpoint": {"uri": FOREIGN}}, "checkpoint.uri"),
        ({"output": {"uri": FOREIGN}}, "output.uri"),
        ({"stages": [{"name": "s", "datasets": DATA}]}, "stages[0].datasets[0].uri"),
        ({"stages": [{"name": "s", "method": {"type": "PPO", "ppo": {"rewardModel": {"uri": FOREIGN}}}}]},
         "stages[0].method.ppo.rewardModel.uri"),
        ({"stages": [GENERATE]}, "stages[0].generate.teacher.uri"),
    ],
)  # fmt: skip
def test_no_uri_of_a_job_is_left_out(spec: dict[str, Any], field: str) -> None:
    everywhere = {name: ["s3://{namespace}/"] for name in ("baseModel", "datasets", "output")}
    wanted = {"baseModel": {"uri": "s3://team-a/m/"}} | OWN | spec
    (only,) = refused(everywhere, **wanted)
    assert only.startswith(f"spec.{field}: found '{FOREIGN}'")


def test_every_field_that_holds_a_uri_is_asked_about() -> None:
    """A field that is added to the API and not to the policy would be a hole."""
    from finetune_api.crd import job_crd

    def fields(node: dict[str, Any], path: str) -> list[str]:
        below = [f for name, child in node.get("properties", {}).items() for f in fields(child, f"{path}.{name}")]
        found = below + (fields(node["items"], path) if "items" in node else [])
        return [*found, path] if path.lower().endswith("uri") else found

    schema = job_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    assert sorted(fields(schema, "")) == sorted(
        [
            ".baseModel.uri", ".baseModel.adapterUri", ".datasets.uri", ".output.uri", ".checkpoint.uri",
            ".validation.datasets.uri", ".test.datasets.uri", ".evaluation.retention.datasets.uri",
            ".evaluation.rewardModel.uri", ".method.ppo.rewardModel.uri", ".method.grpo.rewardModel.uri",
            ".stages.datasets.uri", ".stages.generate.teacher.uri", ".stages.method.ppo.rewardModel.uri",
            ".stages.method.grpo.rewardModel.uri",
            ".tracking.mlflow.uri",  # refused altogether
        ]
    )  # fmt: skip


def test_rows_of_a_stage_are_the_jobs_own() -> None:
    spec = OWN | {"stages": [{"name": "s", "datasets": [{"name": "d", "uri": "stage://g"}]}]}
    assert refused({"datasets": ["s3://{namespace}/"]}, **spec) == []


def test_what_jobs_may_publish_they_may_start_from() -> None:
    base = {"uri": "s3://models/tiny/", "adapterUri": "s3://team-a/out/a/"}
    allowed = {"baseModel": ["s3://models/"], "output": ["s3://{namespace}/out/"]}
    assert refused(allowed, **OWN | {"baseModel": base}) == []
    (only,) = refused(allowed, **OWN | {"baseModel": {"uri": "s3://team-a/out/whole/"}})
    assert only == "spec.baseModel.uri: found 's3://team-a/out/whole/'; profile 'laptop' allows s3://models/"


@pytest.mark.parametrize("prefix", ["data/", "s3://data/{name}/", "s3://a/{namespace", "s3://a/../b/", "s3://a/%2e/"])
def test_a_prefix_that_means_nothing_is_refused(prefix: str) -> None:
    with pytest.raises(ValidationError):
        FineTuneProfileSpec.model_validate({"image": "i", "allowedUris": {"output": [prefix]}})


@pytest.mark.parametrize(
    "name", ["HOME", "FINETUNE_RUN_CONFIG", "AWS_SECRET_ACCESS_KEY", "KUBEFLOW_TRAINER_SERVER_URL"]
)
def test_the_operators_own_variables_are_not_a_profiles(name: str) -> None:
    spec = FineTuneProfileSpec.model_validate({"image": "i", "environment": [{"name": "NCCL_DEBUG"}, {"name": name}]})
    (only,) = unsupported_profile(spec)
    assert format_path(only.path) == "spec.environment[1].name"


def test_the_profile_of_the_readme_is_one() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = (block for block in text.split("```") if block.startswith("yaml\nspec:\n"))
    spec = yaml.safe_load(block.removeprefix("yaml\n"))["spec"]
    profile = FineTuneProfile.model_validate(make_profile(**spec))
    assert unsupported_profile(profile.spec) == []
