"""Tells the progress server how far training is, without ever slowing or ending it.

A thread of its own posts the newest status, at most one every MIN_SECONDS; what is overtaken is never sent. A failure
is logged once per kind and the next post tries again.
"""

import datetime
import json
import os
import ssl
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from finetune_api.figures import foremost
from finetune_api.progress import CheckpointStatus, Metric, Phase, ProgressReport, TrainerStatus
from finetune_trainer import heartbeat, log

MIN_SECONDS = 2.0
TIMEOUT_SECONDS = 10.0
MAX_METRICS, MAX_NAME = 64, 64
"""The bounds of status.trainerStatus.metrics; what is left out is of slices and datasets first."""
MAX_WARNING = 253
"""The bound of status.trainerStatus.warning."""
MEANINGS = {
    403: "the token is not one of a pod of this job",
    404: "the job does not exist",
    409: "this attempt is not the job's current one, or the job is finished",
    413: "the report is too long",
    422: "the report is not valid",
    429: "too many reports",
}


class Server:
    """Where to report to: KUBEFLOW_TRAINER_SERVER_URL, …_CA_CERT and …_TOKEN (both files)."""

    def __init__(self, url: str, token: Path | None, ca: Path | None) -> None:
        self._url, self._token, self._ca = url, token, ca

    def post(self, status: TrainerStatus) -> None:
        """Raises OSError (urllib's errors are) where it was not taken."""
        headers = {"Content-Type": "application/json"}
        if self._token:
            # Token and CA are read anew each time: the kubelet replaces a projected token long before it expires.
            headers["Authorization"] = f"Bearer {self._token.read_text().strip()}"
        body = json.dumps(ProgressReport(trainer_status=status).to_json()).encode()
        tls = ssl.create_default_context(cafile=self._ca) if self._url.startswith("https://") else None
        request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS, context=tls) as answer:
            answer.read()


class Reporter:
    """The status of this run. `server` None: it goes to the log alone; not `enabled`: nowhere."""

    def __init__(self, server: Server | None, enabled: bool = True, min_seconds: float = MIN_SECONDS) -> None:
        self._server, self._enabled, self._min_seconds = server, enabled, min_seconds
        self._status = TrainerStatus()
        self._before, self._share = 0.0, 1.0
        self._changed = threading.Condition()
        self._dirty = self._urgent = self._closing = False
        self._failures: set[str] = set()
        self._warnings: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="report", daemon=True)
        if server:
            self._thread.start()

    @classmethod
    def from_env(cls, enabled: bool) -> "Reporter":
        """`enabled`: one rank of the gang reports."""
        url = os.environ.get("KUBEFLOW_TRAINER_SERVER_URL")
        if not enabled or not url:
            return cls(None, enabled)
        token, ca = (os.environ.get(f"KUBEFLOW_TRAINER_SERVER_{name}") for name in ("TOKEN", "CA_CERT"))
        return cls(Server(url, Path(token) if token else None, Path(ca) if ca else None))

    def stage(self, name: str, before: float, share: float) -> None:
        """The stage that the reports are of; `before` and `share`: what lies before it, and what it is, of the job."""
        self._before, self._share = before, share
        if name:
            self._update(stage=name)

    def phase(self, phase: Phase) -> None:
        """Sent at once: people wait for it, and the launcher's deadlines go by it."""
        heartbeat.enter(phase)
        if self._enabled:
            log.event("phase", phase=phase)
        self._update(urgent=True, phase=phase)

    def progress(self, step: int, total_steps: int, metrics: dict[str, float], remaining_seconds: float | None) -> None:
        self._update(
            step=step,
            total_steps=total_steps,
            progress_percentage=min(100, int(100 * (self._before + self._share * step / max(1, total_steps)) + 1e-9)),
            estimated_remaining_seconds=None if remaining_seconds is None else max(0, round(remaining_seconds)),
            metrics=told(metrics),
        )

    def warn(self, topic: str, message: str) -> None:
        """What goes wrong without ending the run; empty: nothing any more. The newest of each topic is shown."""
        with self._changed:
            self._warnings[topic] = message
            shown = "; ".join(filter(None, self._warnings.values()))
        if shown != (self._status.warning or ""):
            self._update(warning=shown if len(shown) <= MAX_WARNING else f"{shown[: MAX_WARNING - 1]}…")

    def checkpoint(self, uri: str, step: int) -> None:
        self._update(urgent=True, checkpoint=CheckpointStatus(uri=uri, step=step, time=_now()))

    def close(self, timeout: float = TIMEOUT_SECONDS) -> None:
        """Sends what is left, waiting for it at most `timeout` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _update(self, urgent: bool = False, **fields: Any) -> None:
        with self._changed:
            self._status = self._status.model_copy(update=fields | {"last_updated_time": _now()})
            self._dirty, self._urgent = True, self._urgent or urgent
            self._changed.notify_all()

    def _run(self) -> None:
        sent = -self._min_seconds
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._closing)
                wait = self._min_seconds - (time.monotonic() - sent)
                if wait > 0:
                    self._changed.wait_for(lambda: self._urgent or self._closing, timeout=wait)
                if not self._dirty:
                    return
                status, self._dirty, self._urgent = self._status, False, False
            self._post(status)
            sent = time.monotonic()

    def _post(self, status: TrainerStatus) -> None:
        assert self._server
        try:
            self._server.post(status)
            self._failures.clear()
        except urllib.error.HTTPError as error:
            self._failed(f"HTTP {error.code}", MEANINGS.get(error.code, error.reason))
        except (OSError, ValueError) as error:
            self._failed(type(error).__name__, str(error))

    def _failed(self, kind: str, message: str) -> None:
        if kind not in self._failures:
            self._failures.add(kind)
            log.event("report failed", level="warning", kind=kind, message=message)


def told(metrics: dict[str, float]) -> list[Metric]:
    fitting = {name: value for name, value in metrics.items() if len(name) <= MAX_NAME}
    return [Metric(name=name, value=f"{value:.6g}") for name, value in foremost(fitting, MAX_METRICS).items()]


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
