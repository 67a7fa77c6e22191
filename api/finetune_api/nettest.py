"""Whether a cluster's network plugin enforces NetworkPolicies: what three pods of one Job find out about each other.

Pod 0 listens. Pod 1 is under a policy that allows it nothing but DNS and tries to reach pod 0; pod 2 is under none and
does the same. The plugin enforces policies where pod 2 reached pod 0 while pod 1 tried in vain.
"""

import datetime

from pydantic import ValidationError

from finetune_api.model import ApiModel

LISTENER, DENIED, FREE = 0, 1, 2
PODS = 3


class Reach(ApiModel):
    """What a pod that tries tells in its termination message. Times are UTC, by its node's clock."""

    started: datetime.datetime
    ended: datetime.datetime
    reached: datetime.datetime | None = None
    """When first, if ever."""

    @classmethod
    def read(cls, text: str) -> "Reach | None":
        """None where the text is something else."""
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            return None
