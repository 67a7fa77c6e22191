"""What the progress client sends, and that no failure of the server's reaches the training."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.report import Reporter, Server, told
from support.s3 import unused_port


@dataclass
class Received:
    """What a server got; `answers` are the codes of the next answers, then 200."""

    url: str = ""
    reports: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def until(self, count: int) -> list[dict[str, Any]]:
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.reports) >= count, timeout=10), self.reports
            return [report["trainerStatus"] for report in self.reports]


@pytest.fixture
def server() -> Iterator[Received]:
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with received.arrived:
                code = received.answers.pop(0) if received.answers else 200
                received.reports.append(body)
                received.tokens.append(self.headers["Authorization"])
                received.arrived.notify_all()
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        received.url = f"http://127.0.0.1:{http.server_address[1]}/status"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield received
        http.shutdown()
        thread.join(5)


@contextlib.contextmanager
def reporting(server: Server | None, min_seconds: float = 0.05) -> Iterator[Reporter]:
    reporter = Reporter(server, min_seconds=min_seconds)
    yield reporter
    reporter.close()


def test_what_is_sent(server: Received) -> None:
    with reporting(Server(server.url, None, None)) as reporter:
        reporter.phase("Training")
        server.until(1)
        reporter.progress(50, 200, {"loss": 1.23456789}, 90.4)
        server.until(2)
        reporter.checkpoint("s3://bucket/c/step-00000050/", 50)
        last = server.until(3)[-1]
    assert last["phase"] == "Training"
    assert (last["step"], last["totalSteps"], last["progressPercentage"]) == (50, 200, 25)
    assert last["estimatedRemainingSeconds"] == 90
    assert last["metrics"] == [{"name": "loss", "value": "1.23457"}]
    assert last["checkpoint"]["uri"] == "s3://bucket/c/step-00000050/"
    assert last["lastUpdatedTime"]


def test_what_is_overtaken_is_never_sent_and_the_last_always_is(server: Received) -> None:
    with reporting(Server(server.url, None, None), min_seconds=60.0) as reporter:
        reporter.phase("Training")
        server.until(1)
        for step in range(1, 101):
            reporter.progress(step, 100, {}, None)
    statuses = server.until(2)
    assert [status.get("step") for status in statuses] == [None, 100]


def test_the_token_is_read_each_time(server: Received, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    with reporting(Server(server.url, token, None)) as reporter:
        reporter.phase("Loading")
        server.until(1)
        token.write_text("second\n")
        reporter.phase("Training")
        server.until(2)
    assert server.tokens == ["Bearer first", "Bearer second"]


def test_a_refusal_is_logged_once_per_kind_and_tried_again(
    server: Received, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers = [409, 409, 500, 200, 409]
    with reporting(Server(server.url, None, None)) as reporter:
        for step in range(1, 6):
            reporter.progress(step, 5, {}, None)
            server.until(step)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    failures = [line for line in lines if line["event"] == "report failed"]
    assert [line["kind"] for line in failures] == ["HTTP 409", "HTTP 500", "HTTP 409"]
    assert failures[0]["message"] == "this attempt is not the job's current one, or the job is finished"


def test_no_server_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    missing = Server(f"http://127.0.0.1:{unused_port()}/", tmp_path / "no-token", None)
    with reporting(missing) as reporter:
        for step in range(1000):
            reporter.progress(step, 1000, {}, None)
        assert time.monotonic() - started < 1.0
    assert "FileNotFoundError" in capsys.readouterr().out


def test_without_a_url_or_on_other_ranks_nothing_is_sent(
    monkeypatch: pytest.MonkeyPatch, server: Received, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    Reporter.from_env(enabled=True).phase("Training")
    assert "Training" in capsys.readouterr().out
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", server.url)
    other = Reporter.from_env(enabled=False)
    other.phase("Training")
    other.close()
    assert capsys.readouterr().out == ""
    assert server.reports == []


def test_of_many_figures_those_over_everything_are_told() -> None:
    many = {f"evalLoss.data.slice-{i}": 1.0 for i in range(500)} | {f"evalLoss.data.{'s' * 64}": 1.0}
    found = told(many | {"loss": 2.0, "evalLoss": 1.5, "evalLossBefore": 2.5})
    assert [metric.name for metric in found[:3]] == ["loss", "evalLoss", "evalLossBefore"]
    assert len(found) == 64
