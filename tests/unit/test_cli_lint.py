"""`finetune lint`: every problem with its line, in words, and the same on the models' and the server's side."""

from pathlib import Path
from typing import Any

import pytest

from finetune_api.profile import FineTuneProfile
from finetune_cli import __main__ as entry
from finetune_cli import lint
from support.manifests import job_manifest
from support.world import World, make_job, make_profile

JOB = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: support-bot, namespace: team-a}
spec:
  baseModel: {uri: s3://models/small/}
  datasets:
    - {name: tickets, uri: s3://data/tickets/}
  output: {uri: s3://adapters/team-a/}
"""


def found(text: str, profile: FineTuneProfile | None = None) -> list[str]:
    return [str(finding) for finding in lint.lint("job.yaml", text, profile)[1]]


def test_a_good_job_has_no_findings() -> None:
    assert found(JOB) == []


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ("lerningRate: 1", "job.yaml:9:3: spec.lerningRate: this field does not exist"),
        (
            "training: {learningrate: 1e-3}",
            "spec.training.learningrate: this field does not exist; did you mean 'learningRate'?",
        ),
        (
            "training: {learning_rate: 1e-3}",
            "spec.training.learning_rate: this field does not exist; did you mean 'learningRate'?",
        ),
        (
            "training: {learningRate: 0}",
            "job.yaml:9:28: spec.training.learningRate: found 0; input should be greater than 0",
        ),
        (
            "training: {epochs: 1, maxSteps: 2}",
            "job.yaml:9:13: spec.training: epochs and maxSteps cannot both be given",
        ),
        (
            "distribution: {workers: -1}",
            "spec.distribution.workers: found -1; input should be greater than or equal to 1",
        ),
        ('distribution: {workers: "2"}', "spec.distribution.workers: found '2'; input should be a valid integer"),
        ("distribution: {workers: 2.5}", "spec.distribution.workers: found 2.5; "),
        ("method: {type: SFT, dpo: {beta: 1}}", "spec.method: dpo is allowed only where type is DPO"),
        (
            "method: {type: PPO}",
            "spec.method.ppo.rewardModel: found none; PPO learns from the scores of a reward model",
        ),
        ("runPolicy: {suspend: 1}", "spec.runPolicy.suspend: found 1; input should be a valid boolean"),
        (
            "checkpoint: {uri: gs://x/}",
            "spec.checkpoint.uri: found 'gs://x/'; must be s3://bucket/key or s3://bucket/prefix/",
        ),
        ("checkpoint: {uri: s3://a-b/../c}", "a URI must not contain '.' or '..' as a path segment"),
        ("checkpoint: {interval: {type: Steps}}", "steps is required where type is Steps"),
        (f"queue: {{name: {'q' * 64}}}", "string should have at most 63 characters"),
        ("output: {uri: s3://other/}", "job.yaml:9:3: spec.output: is given twice, first in line 8"),
    ],
)
def test_each_mistake_is_named_once_with_its_line(line: str, finding: str) -> None:
    (only,) = found(JOB + f"  {line}\n")
    assert only.startswith("job.yaml:9:")
    assert finding in only


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("/v1alpha1", "/v2", "job.yaml:1:13: apiVersion: found 'finetune.dev/v2'; a FineTuneJob has"),
        ("FineTuneJob", "FinetuneJob", "job.yaml:2:7: kind: found 'FinetuneJob'; finetune.dev/v1alpha1 has"),
        ("{name: support-bot,", "{", "job.yaml:3:1: metadata.name: is required"),
        ("support-bot", "Support_Bot", "job.yaml:3:18: metadata.name: found 'Support_Bot'; must start with a letter"),
        ("  output: {uri: s3://adapters/team-a/}\n", "", "job.yaml:4:1: spec.output: is required"),
        ("name: tickets, ", "", "job.yaml:7:7: spec.datasets[0].name: is required"),
        ("spec:", "spec", "is not valid YAML"),
        ("kind: FineTuneJob\n", "", "kind: is required"),
        (
            "  output",
            "    - {name: tickets, uri: s3://b-c/x}\n  output",
            "job.yaml:8:7: spec.datasets[1]: Duplicate value",
        ),
    ],
)
def test_what_is_missing_or_misspelt_is_named(old: str, new: str, finding: str) -> None:
    (only,) = found(JOB.replace(old, new))
    assert finding in only


@pytest.mark.parametrize(
    "text", ["", "- a\n", "x\n", "kind: [1]\napiVersion: 2\n", "metadata: 1\nkind: Secret\napiVersion: v1\n"]
)
def test_what_is_no_object_at_all_is_one_finding(text: str) -> None:
    assert len(found(text)) == 1


def test_every_document_of_a_file_is_checked_and_foreign_kinds_pass() -> None:
    secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: s3-creds}\nanything: 1\n"
    text = secret + "---\n" + JOB + "---\n" + JOB.replace("s3://models", "s4://models")
    assert [finding.split(": ")[:2] for finding in found(text)] == [["job.yaml:19:20", "spec.baseModel.uri"]]


PROFILE = FineTuneProfile.model_validate(
    {
        "metadata": {"name": "small"},
        "spec": {
            "image": "trainer",
            "allowedNamespaces": ["team-b"],
            "serviceAccounts": ["tuner"],
            "limits": {"maxWorkers": 2, "maxGPUs": 3, "maxActiveDeadlineSeconds": 60},
        },
    }
)


def test_the_profile_limits_what_a_job_may_ask_for() -> None:
    text = (
        JOB
        + "  distribution: {workers: 4}\n"
        + "  runPolicy: {activeDeadlineSeconds: 61}\n"
        + "  credentials: {serviceAccountName: root}\n"
    )
    assert [finding.split(": ")[1] for finding in found(text, PROFILE)] == [
        "metadata.namespace",
        "spec.distribution",
        "spec.distribution.workers",
        "spec.runPolicy.activeDeadlineSeconds",
        "spec.credentials.serviceAccountName",
    ]


@pytest.mark.parametrize(
    ("spec", "profile"),
    [
        (
            {"training": {"maxLength": 9}},
            {"locked": ["training.maxLength"], "defaults": {"training": {"maxLength": 8}}},
        ),
        ({"datasets": [{"name": "d", "uri": "s3://team-b/"}]}, {"allowedUris": {"datasets": ["s3://{namespace}/"]}}),
        ({"distribution": {"workers": 4}}, {"limits": {"maxWorkers": 2, "maxGPUs": 3}}),
        ({"method": {"type": "PPO"}}, {}),
        ({}, {"defaults": {"method": {"type": "PPO"}}}),
        ({"distribution": {"workers": 1}}, {"defaults": {"distribution": {"minWorkers": 2, "workers": 2}}}),
    ],
)
async def test_lint_says_what_the_operator_says(spec: dict[str, Any], profile: dict[str, Any]) -> None:
    job, raw = make_job().with_spec(**spec).build(), make_profile(**profile)
    world = World(job, profiles=[raw])
    await world.settle()
    assert world.state == "Failed"
    problems = lint.problems(job_manifest(**spec), FineTuneProfile.model_validate(raw))
    assert "; ".join(map(str, problems)) == world.status.message


def test_defaults_of_the_profile_are_what_a_job_leaves_out() -> None:
    text = JOB + "  method: {type: PPO}\n"
    assert "spec.method.ppo.rewardModel: found none" in found(text)[0]
    spec = {"image": "i", "defaults": {"method": {"type": "PPO", "ppo": {"rewardModel": {"uri": "s3://models/r/"}}}}}
    assert found(text, FineTuneProfile.model_validate({"metadata": {"name": "p"}, "spec": spec})) == []


def test_a_profile_that_cannot_be_meant_is_refused() -> None:
    text = "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneProfile\nmetadata: {name: p}\nspec:\n  image: i\n"
    assert found(text) == []
    (only,) = found(text + "  locked: [training.maxLenght]\n")
    assert only.startswith("job.yaml:6:12: spec.locked[0]: found 'training.maxLenght'; it must be a path")


def run(*arguments: str) -> int:
    return entry.run(entry.cli, "finetune", list(arguments))


def test_the_command_prints_findings_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(JOB)
    bad.write_text(JOB + "  typo: 1\n")
    assert run("lint", str(good)) == 0
    assert capsys.readouterr().out == f"{good}: ok (FineTuneJob support-bot)\n"
    assert run("lint", str(good), str(bad)) == 2
    assert f"{bad}:9:3: spec.typo: this field does not exist" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    file = tmp_path / "job.yaml"
    if content is not None:
        file.write_bytes(content)
    assert run("lint", str(file)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file} ")
    assert error.count("\n") == 1


def test_the_profile_option_needs_exactly_one_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(JOB)
    assert run("lint", "--profile", str(job), str(job)) == 2
    assert "holds 0 FineTuneProfiles" in capsys.readouterr().err
