"""Alerts and dashboards in a real Prometheus: which alerts fire when, and that every panel shows something.

Needs `prometheus` and `promtool`, on the PATH or in $PROMETHEUS_ASSETS. What can be known without them is in
tests/contract/test_observability.py.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from finetune_operator.metrics import Metrics
from finetune_operator.scrape import Access, MetricsServer
from finetune_operator.serving import Listening
from support.scraped import BORN, everything
from support.waiting import eventually

pytestmark = pytest.mark.integration
FILES = Path(__file__).parents[2] / "charts/finetune-operator/files"
RULES = FILES / "alerts.yaml"
NAME, TOKEN = "ft-progress.finetune-system.svc", "scraper"
MINUTES = 150
RISING = f"0+60x{MINUTES}"
"""A timestamp that is always now."""
JOB = 'job_namespace="team-a",job_name="bot"'
BUDGET = '{pod="a",job_namespace="team-a",profile="p"}'
WELL: Mapping[str, str] = {
    'leader{pod="a"}': f"1x{MINUTES}",
    'leader{pod="b"}': f"0x{MINUTES}",
    'resync_timestamp_seconds{pod="a"}': RISING,
    'resync_timestamp_seconds{pod="b"}': f"0x{MINUTES}",
    'watch_events_total{pod="a",kind="FineTuneJob"}': f"0+30x{MINUTES}",
    'progress_writes_total{pod="b",result="written"}': f"0+12x{MINUTES}",
    'reconciles_total{pod="a",result="success"}': f"0+60x{MINUTES}",
    'reconcile_errors_total{pod="a",kind="NotYet"}': f"0+30x{MINUTES}",
    'api_requests_total{pod="a",verb="GET",resource="jobs",code="200"}': f"0+60x{MINUTES}",
    f"budget_gpu_hours{BUDGET}": f"100x{MINUTES}",
    f"budget_spent_gpu_hours{BUDGET}": f"50x{MINUTES}",
    f"budget_expected_gpu_hours{BUDGET}": f"40x{MINUTES}",
    'admission_reviews_total{pod="a",result="failed"}': f"0x{MINUTES}",
    'admission_reviews_total{pod="a",result="denied"}': f"0+5x{MINUTES}",
    'queue_seconds_bucket{pod="a",le="0.1"}': f"0+60x{MINUTES}",
    'queue_seconds_bucket{pod="a",le="+Inf"}': f"0+60x{MINUTES}",
    'oldest_timestamp_seconds{pod="a",job_namespace="team-a",state="Running"}': f"0x{MINUTES}",
    'oldest_timestamp_seconds{pod="a",job_namespace="team-a",state="Queued"}': f"0x{MINUTES}",
    f'job_info{{pod="a",{JOB},profile="p",state="Running"}}': f"1x{MINUTES}",
    f'job_step_timestamp_seconds{{pod="a",{JOB}}}': RISING,
    f'job_report_timestamp_seconds{{pod="a",{JOB}}}': RISING,
    f'job_checkpoint_timestamp_seconds{{pod="a",{JOB}}}': RISING,
    'jobs_ended_total{pod="a",job_namespace="team-a",state="Complete"}': f"0+1x{MINUTES}",
    'jobs_ended_total{pod="a",job_namespace="team-a",state="Failed"}': f"0x60 4x{MINUTES}",
    'jobs_ended_total{pod="a",job_namespace="team-b",state="Failed"}': f"0x60 1x{MINUTES}",
    'attempts_ended_total{pod="a",outcome="Preempted",reason="Preempted"}': f"0+1x{MINUTES}",
}
INFO = f'job_info{{pod="a",{JOB},profile="p",state="Running"}}'
CASES: Mapping[str, tuple[Mapping[str, str | None], Mapping[str, int]]] = {
    # What is otherwise than well (None: it is not there), and how many of which alerts fire at the end.
    "all is well": ({}, {}),
    "no operator": ({'leader{pod="a"}': None, 'leader{pod="b"}': None}, {"FineTuneOperatorAbsent": 1}),
    "all stand by": ({'leader{pod="a"}': f"0x{MINUTES}"}, {"FineTuneOperatorAbsent": 1}),
    "LISTs fail": ({'resync_timestamp_seconds{pod="a"}': f"0x{MINUTES}"}, {"FineTuneOperatorDeaf": 1}),
    "watches are silent": (
        {'watch_events_total{pod="a",kind="FineTuneJob"}': f"5x{MINUTES}"},
        {"FineTuneOperatorWatchDeaf": 1},
    ),
    "nothing happens": (
        {
            'watch_events_total{pod="a",kind="FineTuneJob"}': f"5x{MINUTES}",
            'progress_writes_total{pod="b",result="written"}': f"5x{MINUTES}",
        },
        {},
    ),
    "reconciles fail": (
        {'reconcile_errors_total{pod="a",kind="TimeoutError"}': f"0+20x{MINUTES}"},
        {"FineTuneOperatorFailing": 1},
    ),
    "a right is missing": (
        {'api_requests_total{pod="a",verb="POST",resource="jobs",code="403"}': f"0+1x{MINUTES}"},
        {"FineTuneOperatorForbidden": 1},
    ),
    "jobs wait for a worker": (
        {
            'queue_seconds_bucket{pod="a",le="0.1"}': f"0+6x{MINUTES}",
            'queue_seconds_bucket{pod="a",le="30"}': f"0+60x{MINUTES}",
        },
        {"FineTuneOperatorSlow": 1},
    ),
    "reviews fail": (
        {'admission_reviews_total{pod="a",result="failed"}': f"0+1x{MINUTES}"},
        {"FineTuneAdmissionFailing": 1},
    ),
    "two tenants' jobs are stuck": (
        {
            f'oldest_timestamp_seconds{{pod="a",job_namespace="{team}",state="{state}"}}': f"0x{MINUTES}"
            for team, state in (("team-a", "Preparing"), ("team-b", "Starting"))
        },
        {"FineTuneJobStuck": 2},
    ),
    "a day in the queue": (
        {'oldest_timestamp_seconds{pod="a",job_namespace="team-a",state="Queued"}': f"-86400x{MINUTES}"},
        {"FineTuneJobQueuedLong": 1},
    ),
    "no step": ({f'job_step_timestamp_seconds{{pod="a",{JOB}}}': f"0x{MINUTES}"}, {"FineTuneJobStalled": 1}),
    "no step while it evaluates": (
        {
            f'job_step_timestamp_seconds{{pod="a",{JOB}}}': f"0x{MINUTES}",
            INFO: None,
            INFO.replace("Running", "Evaluating"): f"1x{MINUTES}",
        },
        {},
    ),
    "no report": ({f'job_report_timestamp_seconds{{pod="a",{JOB}}}': f"0x{MINUTES}"}, {"FineTuneJobSilent": 1}),
    "no new checkpoint": (
        {f'job_checkpoint_timestamp_seconds{{pod="a",{JOB}}}': f"-7200x{MINUTES}"},
        {"FineTuneCheckpointOld": 1},
    ),
    "a tenant fails": (
        {'jobs_ended_total{pod="a",job_namespace="team-b",state="Failed"}': f"0x60 4x{MINUTES}"},
        {"FineTuneTenantFailing": 1},
    ),
    "much of a budget is spent": (
        {f"budget_spent_gpu_hours{BUDGET}": f"85x{MINUTES}", f"budget_expected_gpu_hours{BUDGET}": f"0x{MINUTES}"},
        {"FineTuneBudgetNear": 1},
    ),
    "jobs will not end within a budget": (
        {f"budget_expected_gpu_hours{BUDGET}": f"60x{MINUTES}"},
        {"FineTuneBudgetShort": 1},
    ),
    "a budget is spent": ({f"budget_spent_gpu_hours{BUDGET}": f"101x{MINUTES}"}, {"FineTuneBudgetSpent": 1}),
    "nodes fail": (
        {'attempts_ended_total{pod="a",outcome="Retryable",reason="NodeLost"}': f"0+0.2x{MINUTES}"},
        {"FineTuneAttemptsFailing": 1},
    ),
}


def tool(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ.get('PROMETHEUS_ASSETS', '')}:{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"there is no {name}, on the PATH or in $PROMETHEUS_ASSETS")
    return path


def scenarios() -> Iterator[dict[str, Any]]:
    for name, (otherwise, fire) in CASES.items():
        series = {key: values for key, values in {**WELL, **otherwise}.items() if values is not None}
        found = [{"labels": f'{{alertname="{alert}"}}', "value": count} for alert, count in fire.items()]
        yield {
            "name": name,
            "interval": "1m",
            "input_series": [{"series": f"finetune_operator_{key}", "values": v} for key, v in series.items()],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": f"{MINUTES}m",
                    "exp_samples": found,
                }
            ],
        }


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    promtool, told = tool("promtool"), tmp_path / "alerts_test.yaml"
    told.write_text(
        yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": list(scenarios())})
    )
    ended = subprocess.run([promtool, "test", "rules", told], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    tried = {alert for _, fire in CASES.values() for alert in fire}
    assert {rule["alert"] for rule in rules} == tried, "alerts that no case lets fire"


class Prometheus:
    """A real one that scrapes a port of this machine each second: as the chart's ServiceMonitor says, over TLS by the
    certificate's name, with a token."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url

    async def get(self, path: str, **query: str) -> Any:
        async with self._session.get(f"{self._url}/api/v1/{path}", params=query) as answer:
            assert answer.status != 503, "not ready yet"
            body = await answer.json()
        assert body["status"] == "success", f"{query}: {body.get('error')}"
        return body["data"]

    async def query(self, expression: str) -> list[dict[str, Any]]:
        return list((await self.get("query", query=expression))["result"])

    @classmethod
    @asynccontextmanager
    async def running(cls, folder: Path, target: int) -> AsyncIterator["Prometheus"]:
        scrape = {
            "job_name": "operator",
            "scheme": "https",
            "tls_config": {"ca_file": str(folder / "ca.crt"), "server_name": NAME},
            "authorization": {"credentials": TOKEN},
            "static_configs": [{"targets": [f"127.0.0.1:{target}"], "labels": {"pod": "a"}}],
        }
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [scrape],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with (folder / "prometheus.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                tool("prometheus"),
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                "--web.listen-address=127.0.0.1:0",
                stdout=log,
                stderr=log,
            )
        try:
            async with aiohttp.ClientSession() as session:
                yield cls(session, await cls._address(folder / "prometheus.log", process))
        finally:
            process.terminate()
            await process.wait()

    @staticmethod
    async def _address(log: Path, process: asyncio.subprocess.Process) -> str:
        """The port is the kernel's choice, and the log says it."""

        async def found() -> str:
            if process.returncode is not None:
                pytest.fail(await asyncio.to_thread(log.read_text))
            said = re.search(r'msg="Listening on".* address=(\S+)', await asyncio.to_thread(log.read_text))
            return f"http://{said[1]}" if said else ""

        return await eventually(found, "listening Prometheus", timeout=60)


class OneToken:
    """The API server's answers, where one token is known."""

    async def authenticate(self, token: str) -> dict[str, Any] | None:
        return {"username": "prometheus"} if token == TOKEN else None

    async def may_get(self, user: Mapping[str, Any], url: str) -> bool:
        return True


@pytest.fixture
async def metrics(tmp_path: Path) -> AsyncIterator[tuple[Metrics, Prometheus]]:
    begun = time.time()
    told = Metrics(clock=lambda: BORN + 100 + time.time() - begun)
    listening = Listening(tmp_path, (NAME,), "127.0.0.1", 0, 64, connection_seconds=30.0)
    async with (
        MetricsServer(told, access=Access(OneToken()), listening=listening) as server,
        Prometheus.running(tmp_path, server.port) as prometheus,
    ):
        yield told, prometheus


def panels() -> Iterator[tuple[str, str]]:
    for path in sorted((FILES / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{path.stem}: {panel['title']}", target["expr"]


@pytest.mark.slow
async def test_every_panel_shows_something_and_every_rule_is_evaluated(metrics: tuple[Metrics, Prometheus]) -> None:
    told, prometheus = metrics
    # What has risen is seen of counters that were scraped before.
    await eventually(lambda: prometheus.query("finetune_operator_leader"), "first scrape", timeout=30)
    everything(told)

    async def empty() -> list[str]:
        queries = {title: plain(expression) for title, expression in panels()}
        return [title for title, expression in queries.items() if not await prometheus.query(expression)]

    await eventually(empty, "panels that all show something", until=lambda found: not found, timeout=60, interval=1)

    async def health() -> set[str]:
        groups = (await prometheus.get("rules"))["groups"]
        return {f"{rule['name']}: {rule['health']} {rule.get('lastError', '')}" for g in groups for rule in g["rules"]}

    await eventually(health, "evaluated rules", until=lambda told: all(": ok" in rule for rule in told))
    series = await prometheus.query('count({__name__=~"finetune_operator_job_.*",job_name="bot"})')
    assert int(series[0]["value"][1]) > 8
    told.jobs.forget(("team-a", "bot"))

    async def left() -> list[dict[str, Any]]:
        return await prometheus.query('{__name__=~"finetune_operator_job_.*",job_name="bot"}')

    await eventually(left, "end of the series of a job that is gone", until=lambda found: not found, timeout=30)


def plain(expression: str) -> str:
    """With what Grafana would put in place of its variables."""
    return expression.replace("$__rate_interval", "5m").replace("$__range", "6h").replace("$tenant", ".*")
