"""Metrics: what they say, and that nothing makes them grow without bound."""

import aiohttp
import pytest
from prometheus_client import generate_latest

from finetune_operator.metrics import Metrics
from finetune_operator.scrape import MetricsServer


def series(metrics: Metrics) -> int:
    return sum(len(list(family.samples)) for family in metrics.registry.collect())


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"finetune_operator_{name}", labels or None)


def test_labels_are_bounded() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.reconciled(0.1, type(f"Error{number}", (Exception,), {})())
        metrics.api_call(f"VERB{number}", f"resource{number}", number, 0.1)
        metrics.report(f"Reason{number}")
        metrics.progress_write(f"result{number}")
    text = generate_latest(metrics.registry).decode()
    assert text.count("finetune_operator_reconcile_errors_total{") == 33
    assert text.count("finetune_operator_progress_reports_total{") == 17
    assert 'finetune_operator_reconcile_errors_total{kind="other"} 968.0' in text
    before = series(metrics)
    for number in range(1000, 2000):
        metrics.api_call(f"VERB{number}", f"resource{number}", number, 0.1)
    assert series(metrics) - before <= 1


def test_reconciles_and_calls_are_counted() -> None:
    metrics = Metrics()
    metrics.reconciled(0.02)
    metrics.reconciled(0.2, TimeoutError())
    metrics.api_call("PATCH", "finetunejobs", 200, 0.01)
    metrics.queue_depth.set_function(lambda: 7)
    metrics.waited(0.3)
    metrics.watched("Pod")
    assert value(metrics, "reconciles_total", result="success") == 1
    assert value(metrics, "reconciles_total", result="error") == 1
    assert value(metrics, "reconcile_errors_total", kind="TimeoutError") == 1
    assert value(metrics, "reconcile_seconds_count") == 2
    assert value(metrics, "api_requests_total", verb="PATCH", resource="finetunejobs", code="200") == 1
    assert value(metrics, "queue_depth") == 7
    assert value(metrics, "queue_seconds_sum") == 0.3
    assert value(metrics, "watch_events_total", kind="Pod") == 1
    assert value(metrics, "watch_events_total", kind="FineTuneJob") == 0


def test_when_the_api_server_and_the_jobs_were_last_seen() -> None:
    times = iter(range(100, 200))
    metrics = Metrics(clock=lambda: next(times))
    metrics.answer()
    metrics.looked_at_all()
    assert value(metrics, "api_answer_timestamp_seconds") == 101
    assert value(metrics, "resync_timestamp_seconds") == 102


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/metrics", 200), ("HEAD", "/metrics", 200), ("POST", "/metrics", 405), ("GET", "/", 404)],
)
async def test_the_server_answers(method: str, path: str, status: int) -> None:
    async with (
        MetricsServer(Metrics(), "127.0.0.1") as server,
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session,
        session.request(method, path) as response,
    ):
        assert response.status == status
        if (method, status) == ("GET", 200):
            assert 'finetune_operator_jobs{reason="",state="Running"} 0.0' in await response.text()
            assert response.headers["Content-Type"].startswith("text/plain")
