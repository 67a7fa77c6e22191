"""PURE. What of its profile still decides about a job once its pods are made: it is written beside each attempt."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.profile import FineTuneProfile

ANNOTATION = "finetune.dev/profile-snapshot"


@dataclass(frozen=True)
class Snapshot:
    """All else of a profile is in the pods themselves. A profile that changes alters nothing that runs."""

    scheduling_grace_seconds: int
    max_active_deadline_seconds: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, profile: FineTuneProfile) -> "Snapshot":
        spec = profile.spec
        return cls(spec.scheduling_grace_seconds, spec.limits.max_active_deadline_seconds, spec.defaults or {})

    def encode(self) -> str:
        said = {
            "schedulingGraceSeconds": self.scheduling_grace_seconds,
            "maxActiveDeadlineSeconds": self.max_active_deadline_seconds,
            "defaults": self.defaults,
        }
        return json.dumps({key: value for key, value in said.items() if value}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def decode(cls, text: str) -> "Snapshot":
        said = json.loads(text)
        return cls(said["schedulingGraceSeconds"], said.get("maxActiveDeadlineSeconds"), said.get("defaults", {}))
