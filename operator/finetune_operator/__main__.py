"""`python -m finetune_operator`: the controller's process."""

import asyncio
import gc
import json
import logging
import os
import resource
import sys
import warnings
from datetime import UTC, datetime

import kopf
from pydantic import ValidationError

from finetune_api.model import problems_of
from finetune_operator.controller import Controller
from finetune_operator.handlers import registry
from finetune_operator.settings import PREFIX, Settings, operator_version

logger = logging.getLogger("finetune_operator")
MAX_FILES = 16384


class JsonFormatter(logging.Formatter):
    """One object for each line, with the namespace and name of the job that it is about."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_subject(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class PlainFormatter(logging.Formatter):
    """For a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        subject = "/".join(_subject(record).values())
        text = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower():7} "
        text += f"{subject}: {record.getMessage()}" if subject else record.getMessage()
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _subject(record: logging.LogRecord) -> dict[str, str]:
    """Ours name it in `extra`, kopf's in `k8s_ref`."""
    ref = getattr(record, "k8s_ref", {})
    found = {
        "namespace": getattr(record, "namespace", None) or ref.get("namespace"),
        "name": getattr(record, "job", None) or ref.get("name"),
    }
    return {key: value for key, value in found.items() if value}


def configure_logging(settings: Settings) -> None:
    plain = settings.log_format == "plain" or (settings.log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter() if plain else JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(settings.log_level)


async def operate(settings: Settings) -> None:
    """Runs until a signal comes or a part fails."""
    controller = Controller(settings)
    logger.info("finetune-operator %s serves %s", operator_version(), " ".join(settings.namespaces) or "all namespaces")
    try:
        await kopf.operator(
            registry=registry(controller),
            standalone=True,
            clusterwide=not settings.namespaces,
            namespaces=settings.namespaces,
            stop_flag=controller.over,
        )
    except Exception:
        # Where we know why, one sentence says it better than kopf's stack.
        if controller.failure is None:
            raise
    if controller.failure:
        raise SystemExit(controller.failure)


def main() -> None:
    try:
        settings = Settings.from_environment(os.environ)
    except ValidationError as error:
        text = "; ".join(
            f"{PREFIX}{str(p.path[0]).upper()}: {p.message}" if p.path else p.message for p in problems_of(error)
        )
        raise SystemExit(text) from None
    configure_logging(settings)
    warnings.filterwarnings("ignore", category=FutureWarning, module="kopf")
    # Strangers may hold a thousand connections on each of the servers.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(MAX_FILES, most), most))
    # What was imported stays: the collector need not go through it again and again.
    gc.freeze()
    try:
        asyncio.run(operate(settings))
    except asyncio.CancelledError:
        return


if __name__ == "__main__":
    main()
