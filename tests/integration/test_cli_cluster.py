"""The commands against an API server: what they send, what they print, how they end."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from finetune_api import crd
from finetune_api.profile import DEFAULT_ANNOTATION
from finetune_cli import __main__ as entry
from finetune_cli import cluster as clusters
from finetune_cli import follow, laptop
from finetune_cli.cluster import JOBS, Cluster, Target
from finetune_cli.jobview import Snapshot
from support.manifests import job_manifest

if TYPE_CHECKING:
    from finetune_sandbox.up import Sandbox

pytestmark = pytest.mark.integration

Run = Callable[..., int]


@pytest.fixture(scope="module")
def kubeconfig(cluster: "Sandbox") -> Path:
    """The shared API server, with the CRDs."""

    async def install(connection: Cluster) -> None:
        for definition in crd.crds():
            await connection.apply(laptop.CRDS, definition)
            await laptop.established(connection, definition["metadata"]["name"])

    clusters.run(Target(str(cluster.kubeconfig)), install, timeout=30)
    return cluster.kubeconfig


@pytest.fixture
def space(kubeconfig: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own, created through `submit`'s own path."""
    name = f"cli-{abs(hash(request.node.name)) % 10**10}"
    manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}

    async def create(connection: Cluster) -> None:
        await connection.apply(await connection.resource_of(manifest), manifest)

    clusters.run(Target(str(kubeconfig)), create, timeout=30)
    yield name

    async def delete(connection: Cluster) -> None:
        await connection.delete(await connection.resource_of(manifest), None, name)

    clusters.run(Target(str(kubeconfig)), delete, timeout=30)


@pytest.fixture
def finetune(kubeconfig: Path, space: str) -> Run:
    """Runs one command line there; its exit code."""

    def call(*arguments: object) -> int:
        words = [*map(str, arguments), "--kubeconfig", str(kubeconfig), "--namespace", space]
        return entry.run(entry.cli, "finetune", words)

    return call


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A job without a namespace: it goes where the command line says."""
    job = job_manifest("bot")
    del job["metadata"]["namespace"]
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job, sort_keys=False))
    return file


def set_status(kubeconfig: Path, namespace: str, name: str, status: dict[str, Any]) -> None:
    """What the operator would write."""

    async def patch(connection: Cluster) -> None:
        await connection.patch(JOBS, namespace, name, {"status": status}, subresource="status")

    clusters.run(Target(str(kubeconfig)), patch, timeout=30)


def condition(kind: str, reason: str, message: str = "") -> dict[str, Any]:
    changed = "2026-01-01T00:00:00Z"
    return {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": changed}


COMPLETE = {
    "state": "Complete",
    "conditions": [condition("Complete", "Published")],
    "attempts": [{"number": 0, "job": "bot-0", "outcome": "Succeeded"}],
    "attemptCount": 1,
    "result": {
        "uri": "s3://adapters/team-a/bot/uid/",
        "manifestSHA256": "0" * 64,
        "sizeBytes": 1024,
        "metrics": {"evalLoss": 1.5, "evalLossBefore": 2.5},
    },
}


def test_a_job_is_submitted_listed_read_and_deleted(
    finetune: Run, manifest: Path, space: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("submit", "-f", manifest) == 0
    assert capsys.readouterr().out == f"FineTuneJob bot in {space}: applied\n"
    assert finetune("submit", "-f", manifest) == 0, "applying again changes nothing"
    capsys.readouterr()
    assert finetune("list") == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["NAME", "STATE"]
    assert row.split()[:2] == ["bot", "Pending"]
    assert finetune("list", "-A", "-o", "json") == 0
    listed = json.loads(capsys.readouterr().out)["items"]
    assert [job["metadata"]["name"] for job in listed if job["metadata"]["namespace"] == space] == ["bot"]
    assert finetune("get", "bot", "-o", "yaml") == 0
    read = yaml.safe_load(capsys.readouterr().out)
    assert read["spec"]["baseModel"]["uri"] == "s3://models/tiny/"
    assert finetune("delete", "bot") == 0
    assert finetune("list", "-o", "name") == 0
    assert capsys.readouterr().out == "bot: deleted\n"


def test_every_document_of_a_file_is_applied(
    finetune: Run, manifest: Path, kubeconfig: Path, space: str, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: s3-creds}\nstringData: {AWS_ACCESS_KEY_ID: key}\n"
    manifest.write_text(secret + "---\n" + manifest.read_text())
    assert finetune("submit", "-f", manifest) == 0
    assert "Secret s3-creds in " in capsys.readouterr().out

    async def read(connection: Cluster) -> Any:
        from finetune_sandbox.client import SECRETS

        return await connection.get(SECRETS, space, "s3-creds")

    assert clusters.run(Target(str(kubeconfig)), read, timeout=30)["data"] == {"AWS_ACCESS_KEY_ID": "a2V5"}


def test_a_refusal_names_the_line(finetune: Run, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("submit", "-f", manifest) == 0
    text = manifest.read_text().replace("s3://models/tiny/", "s3://models/other/")
    manifest.write_text(text)
    line = next(n for n, words in enumerate(text.splitlines(), 1) if "baseModel" in words)
    assert finetune("submit", "-f", manifest) == 2
    error = capsys.readouterr().err
    assert f"{manifest}:{line}:" in error
    assert "baseModel cannot be changed" in error


def test_a_kind_that_the_cluster_does_not_know_is_named(
    finetune: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("apiVersion: example.com/v1\nkind: Widget\nmetadata: {name: a}\n")
    assert finetune("submit", "-f", file) == 1
    assert "does not know the kind Widget of example.com/v1" in capsys.readouterr().err


def test_what_does_not_exist_is_one_sentence(finetune: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["get"], ["wait"], ["logs"], ["suspend"], ["delete"], ["fetch", "-o", "never"]):
        assert finetune(command[0], "nobody", *command[1:]) == 1, command
        assert capsys.readouterr().err == 'error: finetunejobs.finetune.dev "nobody" not found\n', command
    assert finetune("delete", "--ignore-not-found", "nobody") == 0


def test_suspend_and_resume_change_the_one_field(
    finetune: Run, manifest: Path, kubeconfig: Path, space: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune("submit", "-f", manifest)
    for command, value in (("suspend", True), ("resume", False)):
        assert finetune(command, "bot") == 0
        capsys.readouterr()
        finetune("get", "bot", "-o", "json")
        assert json.loads(capsys.readouterr().out)["spec"]["runPolicy"]["suspend"] is value
    set_status(kubeconfig, space, "bot", COMPLETE)
    assert finetune("resume", "bot") == 1
    assert "a finished job never runs again" in capsys.readouterr().err


def test_wait_sees_what_happens_while_it_waits(
    finetune: Run, manifest: Path, kubeconfig: Path, space: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune("submit", "-f", manifest)
    assert finetune("wait", "bot", "--timeout", "0.5s") == 124
    assert "error: bot is not Complete after 0.5 s" in capsys.readouterr().err
    status = {"state": "Running", "conditions": [condition("Running", "Started")]}
    set_status(kubeconfig, space, "bot", status)
    assert finetune("wait", "bot", "--for", "Running", "--timeout", "30s") == 0
    operator = threading.Thread(target=set_status, args=(kubeconfig, space, "bot", COMPLETE))
    operator.start()
    assert finetune("wait", "bot", "--timeout", "30s") == 0
    operator.join()
    assert "Complete" in capsys.readouterr().out
    assert finetune("wait", "bot", "--for", "Failed", "--timeout", "30s") == 1, "it ended otherwise"


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (COMPLETE, 0, ["bot is complete after 1 attempt", "s3://adapters/team-a/bot/uid/", "evalLossBefore"]),
        (
            {"state": "Failed", "conditions": [condition("Failed", "DataInvalid", "line 3 is no JSON")]},
            1,
            ["bot failed after 0 attempts: DataInvalid: line 3 is no JSON"],
        ),
    ],
)
def test_run_ends_with_the_result(
    finetune: Run,
    manifest: Path,
    kubeconfig: Path,
    space: str,
    capsys: pytest.CaptureFixture[str],
    status: dict[str, Any],
    code: int,
    words: list[str],
) -> None:
    finetune("submit", "-f", manifest)
    operator = threading.Thread(target=set_status, args=(kubeconfig, space, "bot", status))
    operator.start()
    assert finetune("run", "-f", manifest, "--timeout", "30s") == code
    operator.join()
    output = capsys.readouterr().out
    for word in words:
        assert word in output


def test_run_says_when_the_job_is_deleted_or_takes_too_long(
    finetune: Run,
    manifest: Path,
    kubeconfig: Path,
    space: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert finetune("run", "-f", manifest, "--timeout", "0.5s") == 124
    assert "`finetune delete bot` ends it" in capsys.readouterr().err

    set_status(kubeconfig, space, "bot", {"state": "Running"})

    async def delete(connection: Cluster) -> None:
        await connection.delete(JOBS, space, "bot")

    class Shown(follow.Lines):
        """Deletes the job once it is being followed: only the watch can tell then."""

        def __call__(self, snapshot: Snapshot) -> None:
            threading.Thread(target=clusters.run, args=(Target(str(kubeconfig)), delete)).start()

    monkeypatch.setattr(follow, "shown", lambda quiet=False: Shown())
    assert finetune("run", "-f", manifest, "--timeout", "30s") == 1
    assert "the job bot was deleted" in capsys.readouterr().err


def test_the_profile_of_a_job_without_one_is_the_default(kubeconfig: Path, space: str) -> None:
    from finetune_cli.commands import fetch

    name = f"{space}-default"
    profile = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneProfile",
        "metadata": {"name": name, "annotations": {DEFAULT_ANNOTATION: "true"}},
        "spec": {"image": "i", "storage": {"endpoint": "http://s3.example"}},
    }

    async def read(connection: Cluster) -> Any:
        await connection.apply(clusters.PROFILES, profile)
        try:
            return await fetch._profile(connection, {"spec": {}})
        finally:
            await connection.delete(clusters.PROFILES, None, name)

    found = clusters.run(Target(str(kubeconfig)), read, timeout=30)
    assert found["metadata"]["annotations"][DEFAULT_ANNOTATION] == "true"
