"""PURE. A job that the operator fails on: what its status and an Event say of it.

The next reconcile that succeeds takes it back.
"""

import datetime
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from finetune_api.failures import Reason
from finetune_api.model import problems_of
from finetune_operator.status import Note

Object = Mapping[str, Any]


def note(error: Exception, place: str) -> Note:
    """The Event. `place`: what the log calls the error."""
    if isinstance(error, ValidationError):
        found = "; ".join(map(str, problems_of(error)[:5]))
        why = f"what the operator has to read of it cannot be read: {found}"
    else:
        why = f"the operator fails on it ({place}); its log has the stack"
    text = f"{why}; the job is tried again after growing pauses, and goes on when the cause is gone"
    return Note("Warning", Reason.INTERNAL_ERROR.value, text[:1024])


def stalled(raw: Object, told: Note, now: datetime.datetime) -> dict[str, Any]:
    """The merge patch of a FineTuneJob's status; empty where it says so already. All other conditions stay as they are,
    since nothing is known of what they stand for."""
    conditions = (raw.get("status") or {}).get("conditions") or []
    before: Object = next((c for c in conditions if c["type"] == "Stalled"), {})
    if before.get("status") == "True" and before.get("message") == told.message:
        return {}
    since = before["lastTransitionTime"] if before.get("status") == "True" else now.isoformat().replace("+00:00", "Z")
    condition = {
        "type": "Stalled",
        "status": "True",
        "reason": told.reason,
        "message": told.message,
        "lastTransitionTime": since,
        "observedGeneration": raw["metadata"].get("generation") or 0,
    }
    others = [c for c in conditions if c["type"] != "Stalled"]
    return {"message": told.message, "conditions": [*others, condition]}
