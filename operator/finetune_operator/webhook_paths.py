"""PURE. The webhook's unguessable paths: which there are, which one the API server is to use, and when they change.

Only the API server knows them, from the webhook's configuration, and the operator's pods, from a file. The file comes
from a Secret, which a kubelet shows some time after it was written. So a path is first added to the Secret, then put
into the configuration, and the one before it dropped last, each in a later run.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from pydantic import AwareDatetime, TypeAdapter, ValidationError

PREFIX = "/validate/"
PATTERN = re.compile(r"/validate/[a-z0-9]{43,128}")
"""256 bits. An API server takes no other segments than names of objects have: lower case, letters and digits."""
SETTLED = timedelta(minutes=10)
"""All pods show a changed Secret by then, and all API servers use a changed configuration."""
LIFETIME = timedelta(minutes=45)
"""A path older than this gets a successor: an API server shows it to the author of an object whose review failed on the
way, so each run is to make a new one where it can."""

MOST = 4
"""Paths at a time: where the configuration cannot be written, successors do not pile up."""


class Entry(NamedTuple):
    """A path that the operator answers to."""

    path: str
    added: AwareDatetime
    used: AwareDatetime | None = None
    """Since when the configuration has it."""


_ENTRIES = TypeAdapter(list[Entry])


class BadPaths(ValueError):
    """A text that is no list of paths."""


def parse(text: bytes) -> list[Entry]:
    """Raises BadPaths."""
    try:
        found = _ENTRIES.validate_json(text)
    except ValidationError:
        raise BadPaths("it must be JSON as the certificates' Job writes it: [[path, added, used], …]") from None
    if not found or not all(PATTERN.fullmatch(entry.path) for entry in found):
        raise BadPaths(f"it must have at least one path, each like {PATTERN.pattern}")
    return found


def render(entries: Iterable[Entry]) -> bytes:
    """The text that `parse` reads."""
    return json.dumps(_ENTRIES.dump_python(list(entries), mode="json"), indent=0).encode()


def rotated(
    known: Sequence[Entry], configured: str | None, now: datetime, make: Callable[[], str]
) -> tuple[list[Entry], str]:
    """The paths that the operator is to answer to, and the one that the configuration is to have.

    `configured` is what it has now; `make` returns a new path.
    """
    entries = list(known)
    if not entries:
        # A Secret that was lost: pods may still show what the API server uses.
        again = configured if configured and PATTERN.fullmatch(configured) else make()
        entries = [Entry(again, now)]
    serving = next((entry for entry in entries if entry.path == configured), None)
    if serving and serving.used and now - serving.used >= SETTLED:
        entries = entries[entries.index(serving) :]
    settled = [entry for entry in entries if now - entry.added >= SETTLED]
    wanted = settled[-1] if settled else serving or entries[0]
    if wanted.path != configured or wanted.used is None:
        entries[entries.index(wanted)] = wanted._replace(used=now)
    if now - entries[-1].added >= LIFETIME and len(entries) < MOST:
        entries.append(Entry(make(), now))
    return entries, wanted.path
