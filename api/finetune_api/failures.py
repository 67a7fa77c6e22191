"""Why a job ends: reasons, exit codes, and the one JSON message that a container leaves behind.

The exit code says the class even where the message was lost (a SIGKILL leaves none); the message says the rest. Codes
lie between those of Python and argparse (1, 2) and those of shells and signals (126-255).
"""

import json
import math
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field

from finetune_api.figures import foremost
from finetune_api.model import ApiModel, Figures, S3Uri, Sha256, ShortText
from finetune_api.run import PreparedSummary


class Reason(StrEnum):
    """The closed list of reasons that a status may show."""

    INVALID_SPEC = "InvalidSpec"
    PROFILE_NOT_FOUND = "ProfileNotFound"
    NOT_ALLOWED_BY_PROFILE = "NotAllowedByProfile"
    BUDGET_EXCEEDED = "BudgetExceeded"
    DOES_NOT_FIT = "DoesNotFit"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_ERROR = "ImagePullError"
    PRE_RUNNING_DEADLINE_EXCEEDED = "PreRunningDeadlineExceeded"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    STORAGE_DENIED = "StorageDenied"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    DATA_INVALID = "DataInvalid"
    DATA_LEAKAGE = "DataLeakage"
    MODEL_INVALID = "ModelInvalid"
    OUT_OF_MEMORY = "OutOfMemory"
    HOST_OUT_OF_MEMORY = "HostOutOfMemory"
    DIVERGED = "Diverged"
    HUNG = "Hung"
    RANK_FAILED = "RankFailed"
    PREEMPTED = "Preempted"
    NODE_LOST = "NodeLost"
    GATE_NOT_MET = "GateNotMet"
    MAX_ATTEMPTS_REACHED = "MaxAttemptsReached"
    INTERNAL_ERROR = "InternalError"
    """The operator itself fails on this job. It is not the job's end: it goes on when the cause is gone."""


LIMIT = 4096
"""Bytes of a termination message that Kubernetes keeps."""
MESSAGE_BYTES = 1024
"""What a message is cut to where it and the figures are too long together."""
MAX_FIGURES = 128
"""The bound of status.result.metrics."""

Outcome = Literal["Succeeded", "Preempted", "Retryable", "Permanent"]
"""What an ended attempt means: Preempted costs no attempt, Retryable costs one, Permanent ends the job."""

EXIT_CODES: dict[Reason, int] = {
    Reason.INVALID_SPEC: 65,
    Reason.DATA_INVALID: 66,
    Reason.DATA_LEAKAGE: 67,
    Reason.MODEL_INVALID: 68,
    Reason.DOES_NOT_FIT: 69,
    Reason.STORAGE_DENIED: 70,
    Reason.STORAGE_UNAVAILABLE: 71,
    Reason.OUT_OF_MEMORY: 72,
    Reason.HOST_OUT_OF_MEMORY: 73,
    Reason.DIVERGED: 74,
    Reason.HUNG: 75,
    Reason.RANK_FAILED: 76,
    Reason.PREEMPTED: 77,
    Reason.GATE_NOT_MET: 78,
}
"""The exit code of PID 1 for each reason that a pod can know by itself."""

OUTCOMES: dict[Reason, Outcome] = {
    Reason.PREEMPTED: "Preempted",
    Reason.NODE_LOST: "Retryable",
    Reason.RANK_FAILED: "Retryable",
    Reason.HUNG: "Retryable",
    Reason.STORAGE_UNAVAILABLE: "Retryable",
    Reason.OUT_OF_MEMORY: "Retryable",
    Reason.INTERNAL_ERROR: "Retryable",
}
"""The outcome of an attempt by its reason; a reason that is not named here is Permanent."""


def outcome_of(reason: Reason) -> Outcome:
    return OUTCOMES.get(reason, "Permanent")


def reason_of_exit_code(code: int) -> Reason:
    """The reason behind an exit code whose message was lost; a code that is not ours is a rank's own."""
    return next((reason for reason, own in EXIT_CODES.items() if own == code), Reason.RANK_FAILED)


class TrainingResult(ApiModel):
    """What was published: status.result."""

    uri: S3Uri
    manifest_sha256: Annotated[Sha256, Field(alias="manifestSHA256")]
    size_bytes: Annotated[int, Field(ge=0)]
    metrics: Figures = {}
    """Final figures by name; `evalLoss` after training, `evalLossBefore` before it."""


def _encodable(text: Any) -> Any:
    """Errors quote what they were given, and a lone surrogate is text that nothing can write."""
    return text.encode(errors="replace").decode() if isinstance(text, str) else text


class TerminationMessage(ApiModel):
    """The one JSON object in a container's termination message; Kubernetes keeps 4,096 bytes of it.

    A profile's image may be newer than the operator: what it says beyond this is ignored, not the whole of it.
    """

    model_config = ApiModel.model_config | {"extra": "ignore"}
    reason: Reason | None = None
    """None where the program did what it was asked to."""
    message: Annotated[str, BeforeValidator(_encodable), Field(max_length=2048)] = ""
    rank: int | None = None
    """The global rank that failed first."""
    exit_code: int = 0
    """The failing process's own exit code, negative for a signal."""
    victim: bool = False
    """It failed because a rank of another pod did: the cause is told elsewhere."""
    step: int | None = None
    """The last optimizer step that was completed."""
    resumed_from_step: int | None = None
    node: ShortText | None = None
    read_bytes: Annotated[int, Field(ge=0, le=2**53)] | None = None
    """Of objects in the store, by all processes of this pod."""
    written_bytes: Annotated[int, Field(ge=0, le=2**53)] | None = None
    result: TrainingResult | None = None
    prepared: PreparedSummary | None = None

    def encode(self) -> bytes:
        """At most 4,096 bytes of JSON: figures are left out, the least telling first, and messages cut."""
        said = self
        if said.result:
            # JSON has no word for what is no number.
            told = {name: value for name, value in said.result.metrics.items() if math.isfinite(value)}
            said = said._with_figures(foremost(told, MAX_FIGURES))
        said = said._with_message(MESSAGE_BYTES) if len(said._json()) > LIMIT else said
        while said.result and said.result.metrics and len(said._json()) > LIMIT:
            said = said._with_figures(dict(list(said.result.metrics.items())[:-1]))
        if (over := len(said._json()) - LIMIT) > 0 and said.prepared:
            text = _cut(said.prepared.message, _size(said.prepared.message) - over)
            said = said.model_copy(update={"prepared": said.prepared.model_copy(update={"message": text})})
        if (over := len(said._json()) - LIMIT) > 0:
            said = said._with_message(_size(said.message) - over)
        return said._json()

    def _json(self) -> bytes:
        return self.model_dump_json(by_alias=True, exclude_none=True).encode()

    def _with_figures(self, metrics: dict[str, float]) -> Self:
        assert self.result
        return self.model_copy(update={"result": self.result.model_copy(update={"metrics": metrics})})

    def _with_message(self, room: int) -> Self:
        return self.model_copy(update={"message": _cut(self.message, room)})

    @classmethod
    def decode(cls, text: str) -> Self | None:
        """The message, or None where the text is not one (a traceback, nothing, half of it)."""
        try:
            return cls.model_validate_json(text)
        except ValueError:
            return None


def _cut(text: str, room: int) -> str:
    """The beginning of it that takes at most `room` bytes of JSON."""
    if _size(text) <= room:
        return text
    kept, left = 0, room - 3
    while (left := left - _size(text[kept])) >= 0:
        kept += 1
    return text[:kept] + "…" * (room >= 3)


def _size(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode()) - 2


class FineTuneError(Exception):
    """An error with a reason of the closed list: its text is one sentence for the person who can act."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
