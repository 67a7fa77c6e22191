"""The command line itself: help, usage errors and exit codes, and that it starts fast."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from finetune_cli import __main__ as entry
from finetune_cli.options import SECONDS


def run(*arguments: str) -> int:
    return entry.run(entry.cli, "finetune", list(arguments))


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in entry.COMMANDS:
        assert run(name, "--help") == 0, name
        assert f"finetune {name}" in capsys.readouterr().out


def test_help_imports_neither_the_api_nor_a_client() -> None:
    heavy = ("finetune_api", "finetune_sandbox", "kubernetes", "boto3", "rich", "yaml")
    program = (
        "import sys; from finetune_cli.__main__ import cli, run; run(cli, 'finetune', ['--help'])\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "finetune_cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.startswith("finetune, version ")


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["get"], ["run"], ["wait", "a", "--timeout", "soon"], ["logs", "a", "--attempt", "x"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert "Error: " in capsys.readouterr().err


def test_crds_prints_both_definitions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("crds") == 0
    definitions = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [d["spec"]["names"]["kind"] for d in definitions] == ["FineTuneJob", "FineTuneProfile"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "error: no cluster: there is no kubeconfig at "),
        ("", "names no usable cluster"),
        ("x: 1", "names no usable cluster"),
        ("[", "names no usable cluster"),
        ("contexts: 1\ncurrent-context: a", "names no usable cluster"),
    ],
)
def test_a_bad_kubeconfig_is_one_sentence_and_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    file = tmp_path / "kubeconfig"
    if content is not None:
        file.write_text(content)
    assert run("list", "--kubeconfig", str(file)) == 3
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}]
users: [{name: u, user: {token: t}}]
contexts: [{name: here, context: {cluster: c, user: u, namespace: team-a}}]
current-context: here
"""


@pytest.mark.parametrize(("extra", "message"), [([], "cannot be reached"), (["--context", "no"], "no usable cluster")])
def test_a_cluster_that_is_not_there_is_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(KUBECONFIG)
    assert run("get", "a", "--kubeconfig", str(file), *extra) == 3
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["list", "--sandbox"], ["sandbox", "ls"], ["sandbox", "cp", ".", "s3://abc/"]])
def test_commands_that_need_the_sandbox_say_how_to_start_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert run(*command, "--directory", str(tmp_path / "none")) == 3
    assert "`finetune sandbox up` starts one" in capsys.readouterr().err


def test_an_invalid_manifest_is_never_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: a}\nspec: {typo: 1}\n")
    for command in ("run", "submit"):
        assert run(command, "-f", str(file), "--kubeconfig", str(tmp_path / "none")) == 2
        assert f"{file}:4:8: spec.typo: this field does not exist" in capsys.readouterr().err


def test_run_wants_exactly_one_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "secret.yaml"
    file.write_text("apiVersion: v1\nkind: Secret\nmetadata: {name: a}\n")
    assert run("run", "-f", str(file)) == 2
    assert "holds 0 FineTuneJobs" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200)])
def test_durations_are_read(text: str, seconds: float) -> None:
    assert SECONDS.convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1s", "1d", "m"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        SECONDS.convert(text, None, None)
