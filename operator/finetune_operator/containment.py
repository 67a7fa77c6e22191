"""Errors about one object stay with it: they are counted and told once, and everything else goes on.

What is about everybody (the API server is away, a file of ours cannot be read) passes through, and so does whatever is
raised outside of a block that names its object.
"""

import logging
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune_operator.cluster import ApiError
from finetune_operator.tls import TlsError

logger = logging.getLogger(__name__)
Where = Literal["watch", "resync", "reconcile", "budgets", "turns", "metrics", "network-test"]
REMEMBERED = 10_000
"""Errors that are known to be told, the newest."""


@dataclass
class Outcome:
    """How a block ended."""

    error: Exception | None = None


def of_everybody(error: BaseException) -> bool:
    """Whether the error is no object's own: the API server is away, is busy or knows us no more, or a file is missing.

    What it refuses besides is refused for what one object says."""
    if isinstance(error, ApiError):
        return error.status in (0, 401, 403, 429) or error.status >= 500
    return isinstance(error, TlsError | OSError)


def place_of(error: BaseException) -> str:
    """Class, file and line of what was raised: equal for equal mistakes."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{at}"


def named(raw: Any) -> tuple[str, str]:
    """Namespace and name of an object, as far as it has any."""
    meta = raw.get("metadata") if isinstance(raw, dict) else None
    namespace, name = (meta.get(key) if isinstance(meta, dict) else "" for key in ("namespace", "name"))
    return namespace if isinstance(namespace, str) else "", name if isinstance(name, str) else ""


class Containment:
    """One for the process. `on_error(where)` hears of every error, told or not."""

    def __init__(self, on_error: Callable[[Where], None] = lambda where: None) -> None:
        self._on_error = on_error
        self._told: OrderedDict[tuple[str, ...], None] = OrderedDict()

    @contextmanager
    def about(self, where: Where, namespace: str, name: str) -> Iterator[Outcome]:
        """A block that is about this object alone. What it raises is in the outcome, unless it is about everybody."""
        outcome = Outcome()
        try:
            yield outcome
        except Exception as error:
            if of_everybody(error):
                raise
            outcome.error = error
            self.tell(where, namespace, name, error)

    def tell(self, where: Where, namespace: str, name: str, error: Exception) -> bool:
        """Counts an error, and logs the first of its kind about this object with its stack: then True."""
        self._on_error(where)
        kind = where, namespace, name, place_of(error)
        known = kind in self._told
        self._told[kind] = None
        self._told.move_to_end(kind)
        while len(self._told) > REMEMBERED:
            self._told.popitem(last=False)
        if not known:
            extra = {"namespace": namespace, "job": name}
            logger.error(
                "%s: left out, and all else goes on: %s: %s", where, place_of(error), error, exc_info=error, extra=extra
            )
        return not known
