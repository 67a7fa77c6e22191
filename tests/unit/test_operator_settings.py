"""Settings from the environment, log lines, and which watch events are worth a look."""

import asyncio
import json
import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

from finetune_operator.__main__ import main, operate
from finetune_operator.logformat import JsonFormatter, PlainFormatter
from finetune_operator.news import job_fingerprint
from finetune_operator.settings import Settings
from support.world import make_job


def test_the_environment_is_read_and_the_rest_of_it_is_not_ours() -> None:
    found = Settings.from_environment(
        {
            "FINETUNE_OPERATOR_NAMESPACES": "team-a team-b",
            "FINETUNE_OPERATOR_WORKERS": "4",
            "FINETUNE_OPERATOR_PROGRESS_URL": "",
            "HOME": "/root",
        }
    )
    assert (found.namespaces, found.workers, found.progress_url) == (("team-a", "team-b"), 4, None)


@pytest.mark.parametrize("environment", [{"FINETUNE_OPERATOR_WORKERS": "0"}, {"FINETUNE_OPERATOR_COLOUR": "red"}])
def test_a_wrong_setting_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Settings.from_environment(environment)


@pytest.mark.parametrize("given", [{}, {"ADMISSION_CLIENT_NAMES": "kube-apiserver"}])
def test_a_webhook_that_cannot_tell_who_calls_does_not_start(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ADMISSION_PORT": "9443", **given}.items():
        monkeypatch.setenv(f"FINETUNE_OPERATOR_{name}", value)
    with pytest.raises(SystemExit) as caught:
        main()
    assert str(caught.value) == (
        "FINETUNE_OPERATOR_ADMISSION_PORT: found 9443 and nothing that tells the API server from a stranger; "
        "set FINETUNE_OPERATOR_ADMISSION_PATHS or FINETUNE_OPERATOR_ADMISSION_CLIENT_CA"
    )


def test_a_wrong_setting_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_OPERATOR_WORKERS", "0")
    with pytest.raises(SystemExit) as caught:
        main()
    assert str(caught.value).startswith("FINETUNE_OPERATOR_WORKERS: found '0'; input should be greater than")


CLUSTER = {
    "current-context": "t",
    "clusters": [{"name": "t", "cluster": {"server": "http://127.0.0.1:1"}}],
    "contexts": [{"name": "t", "context": {"cluster": "t", "user": "t"}}],
    "users": [{"name": "t", "user": {"token": "x"}}],
}


@pytest.mark.parametrize(("kubeconfig", "words"), [({}, "NoCredentials"), (CLUSTER, "Unreachable")])
@pytest.mark.filterwarnings("ignore:coroutine 'authenticator':RuntimeWarning")  # kopf's, where its startup fails
def test_a_start_that_fails_is_one_sentence(
    kubeconfig: object, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "kubeconfig").write_text(json.dumps(kubeconfig))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with pytest.raises(SystemExit, match=f"cannot start: {words}"):
        asyncio.run(operate(Settings(tls_folder=tmp_path / "tls")))


def test_log_lines_name_the_job() -> None:
    record = logging.LogRecord("finetune_operator", logging.INFO, "f", 1, "%s happened", ("much",), None)
    record.namespace, record.job = "team-a", "bot"
    line = json.loads(JsonFormatter().format(record))
    assert (line["namespace"], line["name"], line["level"], line["message"]) == (
        "team-a",
        "bot",
        "info",
        "much happened",
    )
    assert "team-a/bot: much happened" in PlainFormatter().format(record)
    kopfs = logging.LogRecord("kopf.objects", logging.WARNING, "f", 1, "hm", (), None)
    kopfs.k8s_ref = {"namespace": "team-a", "name": "bot", "kind": "FineTuneJob"}
    assert json.loads(JsonFormatter().format(kopfs))["name"] == "bot"


def test_progress_alone_is_no_news() -> None:
    def seen(**trainer: object) -> int:
        raw = make_job().build()
        raw["status"] = {"state": "Running", "trainerStatus": {"attempt": 0, "phase": "Training", **trainer}}
        raw["metadata"]["resourceVersion"] = str(len(trainer))
        return job_fingerprint(raw)

    assert seen(progressPercentage=1) == seen(progressPercentage=2, step=7)
    assert seen() != seen(phase="Publishing")
    assert seen() != seen(checkpoint={"step": 5})
    assert job_fingerprint(make_job().build()) != job_fingerprint(make_job().with_meta(generation=2).build())
    assert job_fingerprint(make_job().build()) != job_fingerprint(make_job().with_meta(uid="another").build())
