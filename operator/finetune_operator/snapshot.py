"""PURE. What of its profile still decides about a job once its pods are made: it is written beside each attempt."""

import json
from typing import Annotated, Any

from pydantic import Field, ValidationError

from finetune_api.model import ApiModel
from finetune_api.profile import FineTuneProfile

ANNOTATION = "finetune.dev/profile-snapshot"


class Snapshot(ApiModel):
    """All else of a profile is in the pods themselves. A profile that changes alters nothing that runs."""

    scheduling_grace_seconds: Annotated[int, Field(ge=0, le=86_400)]
    max_active_deadline_seconds: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    defaults: dict[str, Any] = {}

    @classmethod
    def of(cls, profile: FineTuneProfile) -> "Snapshot":
        spec = profile.spec
        return cls(
            scheduling_grace_seconds=spec.scheduling_grace_seconds,
            max_active_deadline_seconds=spec.limits.max_active_deadline_seconds,
            defaults=spec.defaults or {},
        )

    def encode(self) -> str:
        return json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> "Snapshot | None":
        """None where it is not one: whoever may write Jobs may have changed it."""
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            return None
