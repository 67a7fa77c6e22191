"""`finetune sandbox`: up, status, cp, ls, down, with the operator in it; and logs of pods that run there."""

import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_cli import __main__ as entry
from finetune_cli import cluster as clusters
from finetune_cli import laptop
from finetune_cli.cluster import JOBS, PROFILES, Cluster, Target
from finetune_sandbox.client import PODS
from support.manifests import job_manifest

pytestmark = pytest.mark.integration


def finetune(*arguments: object) -> int:
    return entry.run(entry.cli, "finetune", [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A sandbox as `finetune sandbox up` leaves it."""
    directory = tmp_path_factory.mktemp("laptop")
    laptop.start(directory)
    yield directory
    laptop.stop(directory)


def test_up_twice_keeps_what_runs(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = laptop.running(directory)
    assert finetune("sandbox", "up", "--directory", directory) == 0
    assert laptop.running(directory) == before
    assert f"export KUBECONFIG={before.kubeconfig}" in capsys.readouterr().out
    assert finetune("sandbox", "status", "--directory", directory) == 0
    assert "Operator        running" in capsys.readouterr().out


def test_a_default_profile_and_working_keys_are_there(directory: Path) -> None:
    async def read(cluster: Cluster) -> Any:
        return await cluster.get(PROFILES, None, laptop.PROFILE)

    info = laptop.running(directory)
    profile = clusters.run(Target(info.kubeconfig), read, timeout=30)
    assert profile["spec"]["storage"]["endpoint"] == info.s3_endpoint
    assert "accelerator" not in profile["spec"]


def test_files_and_folders_are_copied(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "deep" / "x.bin").write_bytes(b"12345")
    here = ("--directory", directory)
    assert finetune("sandbox", "cp", tmp_path / "model", "s3://finetune/m/", *here) == 0
    assert finetune("sandbox", "cp", tmp_path / "model" / "config.json", "s3://finetune/m/other.json", *here) == 0
    assert finetune("sandbox", "cp", tmp_path / "model" / "config.json", "s3://finetune/m/in/", *here) == 0
    capsys.readouterr()
    assert finetune("sandbox", "ls", "s3://finetune/m/", *here) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(size, uri.removeprefix("s3://finetune/m/")) for size, _, uri in listed] == [
        ("2", "config.json"),
        ("5", "deep/x.bin"),
        ("2", "in/config.json"),
        ("2", "other.json"),
    ]
    assert finetune("sandbox", "cp", tmp_path / "model", "s3://elsewhere/m/", *here) == 2
    assert "has no bucket elsewhere; it has finetune" in capsys.readouterr().err


def pod(name: str, worker: int, words: str) -> dict[str, Any]:
    labels = {
        "finetune.dev/job-name": "talker",
        "finetune.dev/attempt": "0",
        "batch.kubernetes.io/job-completion-index": str(worker),
    }
    container = {"name": "main", "image": "none", "command": ["sh", "-c", words]}
    spec = {"restartPolicy": "Never", "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


def test_logs_are_followed_to_the_end_of_every_worker(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kubeconfig = laptop.running(directory).kubeconfig
    # Suspended, and of a profile that does not exist: the operator leaves it alone.
    job = job_manifest("talker", "default", profile="none", runPolicy={"suspend": True})

    async def create(cluster: Cluster) -> None:
        await cluster.apply(JOBS, job)
        for worker in (0, 1):
            body = pod(f"talker-0-{worker}", worker, f"echo first {worker}; echo ünïcödé; printf last")
            await cluster.create(PODS, "default", body)

    clusters.run(Target(kubeconfig), create, timeout=30)
    here = ("--kubeconfig", kubeconfig, "--attempt", "0")
    assert finetune("logs", "talker", "-f", *here) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("[0]")] == ["[0] first 0", "[0] ünïcödé", "[0] last"]
    assert [line for line in lines if line.startswith("[1]")] == ["[1] first 1", "[1] ünïcödé", "[1] last"]
    assert finetune("logs", "talker", "--worker", "1", "--tail", "1", *here) == 0
    assert capsys.readouterr().out == "last\n"
    assert finetune("logs", "talker", "--worker", "7", *here) == 1
    assert "has no worker 7 of attempt 0" in capsys.readouterr().err
    assert finetune("logs", "talker", "--kubeconfig", kubeconfig, "--attempt", "prepare") == 1
    assert "has no pods of prepare" in capsys.readouterr().err


def test_an_operator_that_a_killed_sandbox_left_behind_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        killed = laptop.start(tmp_path)
        orphan = laptop.Operator(tmp_path).process
        ended = os.pidfd_open(killed.pid)
        os.kill(killed.pid, signal.SIGKILL)
        assert select.select([ended], [], [], 10)[0], "a killed process ends"
        os.close(ended)
        laptop.start(tmp_path)
        assert laptop.Operator(tmp_path).process not in (None, orphan)
    finally:
        assert finetune("sandbox", "down", "--directory", tmp_path) == 0
    assert laptop.Operator(tmp_path).process is None
    assert finetune("sandbox", "status", "--directory", tmp_path) == 3
    assert finetune("sandbox", "down", "--directory", tmp_path) == 0
    assert "no sandbox runs in" in capsys.readouterr().out
