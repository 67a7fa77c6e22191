"""Who may report on a job: a live pod of its current attempt, by a token that was made for this job alone."""

import base64
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

from finetune_api.progress import audience
from finetune_operator.progress_state import JobKey

Object = dict[str, Any]
T = TypeVar("T")


class User(Protocol):
    """Whose token it is; `pod_*` are None where the token is bound to no pod."""

    @property
    def username(self) -> str: ...
    @property
    def pod_name(self) -> str | None: ...
    @property
    def pod_uid(self) -> str | None: ...


class ProgressCluster(Protocol):
    """What the progress server asks of a cluster."""

    async def token_review(self, token: str, audiences: tuple[str, ...]) -> User | None:
        """The token's user, or None where it is not valid for one of the audiences."""

    async def get_pod(self, namespace: str, name: str) -> Object | None: ...

    async def get_job(self, namespace: str, name: str) -> Object | None:
        """The FineTuneJob, or None."""

    async def patch_trainer_status(
        self, namespace: str, name: str, uid: str, trainer_status: Object, resource_version: str | None = None
    ) -> bool:
        """Merge-patches status.trainerStatus and nothing else. False: the job is gone, or is not at that version."""


class Refused(Exception):
    """The request is answered with a metav1.Status of this code and reason; `retry_after` in seconds."""

    def __init__(self, code: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.retry_after = retry_after


class CurrentAttempt(NamedTuple):
    """The attempt of a FineTuneJob that runs now."""

    job_uid: str
    number: int
    job_name: str
    """Name and UID of its batch/v1 Job."""
    uid: str


class Identity(NamedTuple):
    """What a TokenReview said, for the job whose UID was in the audience."""

    job_uid: str
    pod_name: str
    pod_uid: str


def current_attempt(job: Object) -> CurrentAttempt:
    """The attempt that may report. Raises Refused (409) where the job is finished, or none runs."""
    name, status = job["metadata"]["name"], job.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            raise Refused(409, "Conflict", f"FineTuneJob {name} is finished and takes no more progress")
    running = [attempt for attempt in status.get("attempts") or [] if not attempt.get("outcome")]
    if not running or not running[-1].get("uid"):
        raise Refused(409, "Conflict", f"FineTuneJob {name} has no attempt that runs", retry_after=2)
    newest = running[-1]
    return CurrentAttempt(job["metadata"]["uid"], newest["number"], newest["job"], newest["uid"])


def check_pod(pod: Object | None, identity: Identity, attempt: CurrentAttempt, name: str) -> None:
    """Raises Refused (403) where the token's pod is not a live one of this attempt of the FineTuneJob `name`."""
    if pod is None or pod["metadata"]["uid"] != identity.pod_uid:
        raise _forbidden(f"the token's pod {identity.pod_name} does not exist any more")
    labels: Mapping[str, str] = pod["metadata"].get("labels") or {}
    found = labels.get("finetune.dev/job-name"), labels.get("finetune.dev/attempt")
    if found != (name, str(attempt.number)):
        raise _forbidden(
            f"pod {identity.pod_name} is labelled as attempt {found[1]} of {found[0]}; "
            f"only pods of attempt {attempt.number} of {name} may report"
        )
    owners = [owner for owner in pod["metadata"].get("ownerReferences") or [] if owner.get("controller")]
    if [(owner["kind"], owner["uid"]) for owner in owners] != [("Job", attempt.uid)]:
        raise _forbidden(f"pod {identity.pod_name} is not owned by Job {attempt.job_name}")
    if (phase := (pod.get("status") or {}).get("phase")) in ("Succeeded", "Failed"):
        raise _forbidden(f"pod {identity.pod_name} is finished ({phase})")


def _forbidden(message: str) -> Refused:
    return Refused(403, "Forbidden", message)


def expiry(token: str) -> float | None:
    """When a JWT expires, in seconds since the epoch, unverified (the API server verifies); None for what is no JWT."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        return float(claims["exp"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


class Authenticator:
    """TokenReviews, remembered for `seconds` and never beyond the token's expiry, at most `limit` of them.

    What is remembered is a hash of the token; refusals are remembered apart, so that they cannot push out the others.
    """

    def __init__(
        self, cluster: ProgressCluster, *, clock: Callable[[], float], seconds: float = 60.0, limit: int = 4096
    ) -> None:
        """`clock`: seconds since the epoch."""
        self._cluster, self._clock, self._seconds, self._limit = cluster, clock, seconds, limit
        self._known: OrderedDict[bytes, tuple[float, Identity]] = OrderedDict()
        self._familiar: OrderedDict[bytes, tuple[float, None]] = OrderedDict()
        """Tokens that a review once found good, to their expiry."""
        self._refused: OrderedDict[bytes, tuple[float, str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known) + len(self._refused)

    def known(self, key: JobKey, token: str) -> Identity | None:
        """What an earlier review of this token for this job said, while it holds."""
        digest = _digest(key, token)
        until, identity = self._known.get(digest, (0.0, None))
        if identity is None or self._clock() >= until:
            self._known.pop(digest, None)
            return None
        return identity

    def familiar(self, key: JobKey, token: str) -> bool:
        """Whether a review has ever found this token good for this job: its holder is no stranger, and is reviewed
        again all the same."""
        digest = _digest(key, token)
        until, _ = self._familiar.get(digest, (0.0, None))
        if self._clock() >= until:
            self._familiar.pop(digest, None)
            return False
        return True

    async def identify(self, key: JobKey, job_uid: str, token: str) -> Identity:
        """Who holds the token. Raises Refused: 401 where it is not valid for this job, 403 where it is of no pod."""
        identity = self.known(key, token)
        if identity is not None and identity.job_uid == job_uid:
            return identity
        digest = _digest(key, token)
        until, message = self._refused.get(digest, (0.0, ""))
        if self._clock() < until:
            raise Refused(401, "Unauthorized", message)
        self._refused.pop(digest, None)
        wanted = audience(job_uid)
        user = await self._cluster.token_review(token, (wanted,))
        if user is None:
            message = f"the token is not valid for audience {wanted}"
            # A short time: the next review may find that the server has caught up with a new pod.
            self._remember(self._refused, digest, min(5.0, self._seconds), token, message)
            raise Refused(401, "Unauthorized", message)
        if not user.username.startswith(f"system:serviceaccount:{key.namespace}:"):
            raise _forbidden(f"the token is of {user.username}, which is not a ServiceAccount of {key.namespace}")
        if not user.pod_name or not user.pod_uid:
            raise _forbidden("the token is bound to no pod; use the one that is projected into the trainer's pod")
        identity = Identity(job_uid, user.pod_name, user.pod_uid)
        self._remember(self._known, digest, self._seconds, token, identity)
        self._remember(self._familiar, digest, math.inf, token, None)
        return identity

    def _remember(
        self, table: OrderedDict[bytes, tuple[float, T]], digest: bytes, seconds: float, token: str, value: T
    ) -> None:
        end = expiry(token)
        if end is None:
            return
        table[digest] = (min(self._clock() + seconds, end), value)
        table.move_to_end(digest)
        while len(table) > self._limit:
            table.popitem(last=False)


def _digest(key: JobKey, token: str) -> bytes:
    return hashlib.sha256("\0".join((key.namespace, key.name, token)).encode(errors="surrogatepass")).digest()
