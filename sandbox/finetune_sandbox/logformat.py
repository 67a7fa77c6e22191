"""The log of the sandbox's processes: whatever a line quotes, it stays one line."""

import logging


class Formatter(logging.Formatter):
    """Control characters, line separators and marks of direction are escapes; a stack is indented below its line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _printable(super().formatMessage(record))

    def formatException(self, ei: object) -> str:
        return "\n".join(f"    {_printable(line)}" for line in super().formatException(ei).split("\n"))  # type: ignore[arg-type]


def configure_logging() -> None:
    """Everything from INFO on, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
