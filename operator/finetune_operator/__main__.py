"""`python -m finetune_operator`: the controller's process."""

import asyncio
import gc
import logging
import os
import resource
import sys
import warnings

import kopf
from pydantic import ValidationError

from finetune_api.model import problems_of
from finetune_api.printable import printable
from finetune_operator.controller import Controller
from finetune_operator.handlers import registry
from finetune_operator.logformat import JsonFormatter, PlainFormatter
from finetune_operator.settings import PREFIX, Settings, operator_version

logger = logging.getLogger("finetune_operator")
MAX_FILES = 16384


def configure_logging(settings: Settings) -> None:
    plain = settings.log_format == "plain" or (settings.log_format == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter() if plain else JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # Warnings quote what they are about.
    logging.captureWarnings(True)
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
        raise SystemExit(printable(controller.failure))


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
