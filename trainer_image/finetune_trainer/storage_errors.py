"""What an object store's refusals mean, as one sentence that names bucket and key.

FineTuneError
  ├─ ObjectMissing   there is no such key
  ├─ ObjectChanged   the key no longer holds what was pinned
  └─ AlreadyExists   a conditional write found the key taken by something else
"""

from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import (
    ConnectionError as StoreConnectionError,
)

from finetune_api.failures import FineTuneError, Reason


class ObjectMissing(FineTuneError):
    """There is no such key."""


class ObjectChanged(FineTuneError):
    """The key no longer holds what was pinned."""


class AlreadyExists(FineTuneError):
    """The key is taken, by other content."""


_DENIED = {
    "AccessDenied": "the credentials do not allow this",
    "403": "the credentials do not allow this",
    "Forbidden": "the credentials do not allow this",
    "InvalidAccessKeyId": "the access key is not known to the store (AWS_ACCESS_KEY_ID)",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key (AWS_SECRET_ACCESS_KEY)",
    "ExpiredToken": "the session token has expired (AWS_SESSION_TOKEN)",
    "InvalidToken": "the session token is not valid (AWS_SESSION_TOKEN)",
    "NoSuchBucket": "this bucket does not exist",
}
_MISSING = {"NoSuchKey", "NoSuchVersion", "404", "NotFound"}
_PRECONDITION = {"PreconditionFailed", "412"}
BROKEN = (HTTPClientError, StoreConnectionError, IncompleteReadError)
"""What boto3 raises where a connection failed: worth another try."""
RETRYABLE_STATUS = {408, 409, 425, 429}


def code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "Unknown"))


def status_of(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_precondition(error: ClientError) -> bool:
    return code_of(error) in _PRECONDITION or status_of(error) == 412


def explain(error: Exception, action: str, uri: str) -> FineTuneError:
    """`error`, raised by boto3 while `action` (a verb: "read") was done to `uri`, as ours."""
    if isinstance(error, FineTuneError):
        return error
    if isinstance(error, ClientError):
        return _explain_answer(error, action, uri)
    return _explain_silence(error, action, uri)


def _explain_answer(error: ClientError, action: str, uri: str) -> FineTuneError:
    code, status = code_of(error), status_of(error)
    if code in _DENIED:
        return FineTuneError(Reason.STORAGE_DENIED, f"cannot {action} {uri}: {_DENIED[code]} ({code})")
    if code in _MISSING:
        return ObjectMissing(Reason.DATA_INVALID, f"cannot {action} {uri}: there is no such object ({code})")
    if is_precondition(error):
        return changed(uri, action)
    message = str(error.response.get("Error", {}).get("Message", "")).strip()
    said = f"{code}: {message}" if message and message != code else code
    # 501: the store does not know the operation, and will not know it the next time.
    if (300 <= status < 500 and status not in RETRYABLE_STATUS) or status == 501:
        return FineTuneError(Reason.STORAGE_DENIED, f"cannot {action} {uri}: the store refused with {said}")
    return FineTuneError(Reason.STORAGE_UNAVAILABLE, f"cannot {action} {uri}: the store failed with {said}")


def _explain_silence(error: Exception, action: str, uri: str) -> FineTuneError:
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return FineTuneError(
            Reason.STORAGE_DENIED,
            f"cannot {action} {uri}: no complete credentials were found (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or a service account's identity)",
        )
    # Before HTTPClientError's kind: this one knows the endpoint.
    if isinstance(error, EndpointConnectionError):
        endpoint = getattr(error, "kwargs", {}).get("endpoint_url", "the endpoint")
        return FineTuneError(Reason.STORAGE_UNAVAILABLE, f"cannot {action} {uri}: {endpoint} cannot be reached")
    kind = type(error).__name__
    if isinstance(error, BROKEN):
        return FineTuneError(Reason.STORAGE_UNAVAILABLE, f"cannot {action} {uri}: the connection failed ({kind})")
    if isinstance(error, BotoCoreError):
        return FineTuneError(Reason.STORAGE_DENIED, f"cannot {action} {uri}: {error}")
    return FineTuneError(Reason.STORAGE_UNAVAILABLE, f"cannot {action} {uri}: {kind}: {error}")


def changed(uri: str, action: str = "read", detail: Any = None) -> ObjectChanged:
    tail = f" ({detail})" if detail else ""
    return ObjectChanged(
        Reason.DATA_INVALID,
        f"cannot {action} {uri}: the object changed since this job pinned it{tail}; submit the job again to use "
        "what is there now",
    )
