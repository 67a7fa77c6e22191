"""The programs as a container runs them: exit code and last word, signals, and what the gang's pull refuses."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import EXIT_CODES, FineTuneError, Reason, TerminationMessage
from finetune_api.run import RunConfig
from finetune_trainer.prepare import prepare
from finetune_trainer.pull import pull
from finetune_trainer.workdir import WorkDir
from support.runs import make_run_config, pod_environment
from support.s3 import S3, running_s3
from support.tiny import make_tiny_model

pytestmark = pytest.mark.integration
ROWS = "".join(json.dumps({"prompt": f"q {i}", "completion": f"a {i}"}) + "\n" for i in range(10)).encode()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with running_s3() as server:
        for path in make_tiny_model(tmp_path_factory.mktemp("model")).iterdir():
            server.put(f"s3://bucket/models/tiny/{path.name}", path.read_bytes())
        server.put("s3://bucket/data/pairs.jsonl", ROWS)
        yield server


def run(program: str, directory: Path, config: RunConfig, s3: S3) -> tuple[int, TerminationMessage, str]:
    """Exit code, termination message and output of `python -X importtime -m finetune_trainer <program>`."""
    command = [sys.executable, "-X", "importtime", "-m", "finetune_trainer", program]
    env = pod_environment(directory, config, **s3.environment)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    message = TerminationMessage.decode((directory / "termination-log").read_text())
    assert message is not None
    return done.returncode, message, done.stdout + done.stderr


def test_prepare_ends_well_and_without_torch(s3: S3, tmp_path: Path) -> None:
    code, message, output = run("prepare", tmp_path, make_run_config(endpoint=s3.endpoint), s3)
    assert (code, message.reason, message.node) == (0, None, "node-1")
    assert message.prepared is not None
    assert message.prepared.train_examples == 10
    assert (message.read_bytes or 0) > 1000
    assert (message.written_bytes or 0) > 1000
    imported = {line.rpartition("|")[2].strip() for line in output.splitlines() if line.startswith("import time:")}
    assert "tokenizers" in imported
    assert not imported & {"torch", "transformers", "datasets"}
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    told = [event["event"] for event in events if event["level"] == "info"]
    assert told == ["base model inspected", "dataset prepared", "prepare", "done"]


def test_prepare_ends_badly_with_its_code_and_one_sentence(s3: S3, tmp_path: Path) -> None:
    config = make_run_config(endpoint=s3.endpoint, baseModel={"uri": "s3://bucket/models/none/"})
    code, message, output = run("prepare", tmp_path, config, s3)
    assert code == EXIT_CODES[Reason.MODEL_INVALID] == message.exit_code
    assert message.message == "spec.baseModel.uri: there is nothing below s3://bucket/models/none/"
    assert "Traceback" not in output


def test_a_gang_without_prepared_data_says_so(s3: S3, tmp_path: Path) -> None:
    code, message, _ = run("train", tmp_path, make_run_config(endpoint=s3.endpoint), s3)
    assert code == EXIT_CODES[Reason.INVALID_SPEC]
    assert message.message == "run.json: `prepared` is required for training"


def test_a_signal_ends_prepare_while_it_waits_for_the_store(s3: S3, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = make_run_config(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        env = pod_environment(tmp_path, config, **s3.environment)
        process = subprocess.Popen([sys.executable, "-m", "finetune_trainer", "prepare"], env=env)
        try:
            silent.settimeout(30)
            connection, _ = silent.accept()
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == EXIT_CODES[Reason.PREEMPTED]
            connection.close()
        finally:
            process.kill()
            process.wait()
    message = TerminationMessage.decode((tmp_path / "termination-log").read_text())
    assert message is not None
    assert message.reason == Reason.PREEMPTED


@pytest.fixture
def prepared(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FINETUNE_WORK_DIR", str(tmp_path / "prepare"))
    config = make_run_config(endpoint=s3.endpoint)
    return config.model_copy(update={"prepared": prepare(config).prepared})


CHANGED: list[tuple[str, Any, Reason, str]] = [
    (
        "models/tiny/config.json",
        b"\n",
        Reason.MODEL_INVALID,
        "spec.baseModel.uri: .*config.json: the object changed since",
    ),
    ("data/train/00000.parquet", b"\n", Reason.DATA_INVALID, "00000.parquet: the object changed since .*SHA-256"),
    ("data/index.json", b" ", Reason.DATA_INVALID, "index.json is not the index that `prepare` wrote for this job"),
]


@pytest.mark.parametrize(("name", "more", "reason", "text"), CHANGED)
def test_what_is_no_longer_what_was_prepared_is_not_pulled(
    s3: S3, prepared: RunConfig, tmp_path: Path, name: str, more: bytes, reason: Reason, text: str
) -> None:
    uri = f"s3://bucket/{name}" if name.startswith("models/") else f"{prepared.scratch_uri}{name}"
    before = s3.get(uri)
    s3.put(uri, before + more)
    try:
        with pytest.raises(FineTuneError, match=text) as caught:
            pull(prepared, WorkDir(tmp_path / "pod"))
    finally:
        s3.put(uri, before)
    assert caught.value.reason == reason
