"""Names of checkpoints, which of them are there, and which may go."""

import re
from collections.abc import Collection, Iterable

from finetune_api.manifest import MANIFEST_KEY

_STEP = re.compile(r"/checkpoints/(?:[^/]+/)?step-(\d{8})/([^/]+)$")


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def complete_steps(uris: Iterable[str]) -> list[int]:
    """The steps whose manifest is there, newest first; without one there is no checkpoint, whatever else is there."""
    found = (_STEP.search(uri) for uri in uris)
    return sorted({int(m[1]) for m in found if m and m[2] == MANIFEST_KEY}, reverse=True)


def superfluous(complete: Iterable[int], saved: int, keep: int, held: Collection[int] = ()) -> list[int]:
    """What may go once `saved` is complete: all but the `keep` newest up to it, never `saved` itself nor those held."""
    older = sorted((step for step in complete if step < saved), reverse=True)
    return [step for step in older[max(0, keep - 1) :] if step not in held]
