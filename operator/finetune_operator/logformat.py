"""Lines of the log, for machines and for people. Whatever a line quotes, it stays one line."""

import json
import logging
from datetime import UTC, datetime

from finetune_api.printable import indented, printable


class JsonFormatter(logging.Formatter):
    """One object for each line, with the namespace and name of the job that it is about. All of it is ASCII."""

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
    """For a person at a terminal; a stack is indented below its line."""

    def format(self, record: logging.LogRecord) -> str:
        subject = "/".join(_subject(record).values())
        message = f"{subject}: {record.getMessage()}" if subject else record.getMessage()
        text = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower():7} {printable(message)}"
        return f"{text}\n{indented(self.formatException(record.exc_info))}" if record.exc_info else text


def _subject(record: logging.LogRecord) -> dict[str, str]:
    """Ours name it in `extra`, kopf's in `k8s_ref`."""
    ref = getattr(record, "k8s_ref", {})
    found = {
        "namespace": getattr(record, "namespace", None) or ref.get("namespace"),
        "name": getattr(record, "job", None) or ref.get("name"),
    }
    return {key: str(value) for key, value in found.items() if value}
