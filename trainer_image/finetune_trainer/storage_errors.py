"""What an object store's refusals mean, as one sentence that names bucket and key.

FineTuneError
  ├─ ObjectMissing   there is no such key
  ├─ ObjectChanged   the key no longer holds what was pinned
  └─ AlreadyExists   a conditional write found the key taken by something else
"""

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)
from botocore.exceptions import (
    ConnectionError as StoreConnectionError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

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
    "ExpiredToken": "the session token has expired (AWS_SESSION_TOKEN); renew the Secret of spec.credentials",
    "ExpiredTokenException": "the session token has expired (AWS_SESSION_TOKEN); renew the Secret of spec.credentials",
    "TokenRefreshRequired": "the session token has expired (AWS_SESSION_TOKEN); renew the Secret of spec.credentials",
    "InvalidToken": "the session token is not valid (AWS_SESSION_TOKEN)",
    "NoSuchBucket": "this bucket does not exist",
    "AuthorizationHeaderMalformed": "the bucket is in another region than the profile's storage.region",
    "PermanentRedirect": "the bucket is in another region than the profile's storage.region",
    "IllegalLocationConstraintException": "the bucket is in another region than the profile's storage.region",
    "KMS.NotFoundException": "the profile's storage.kmsKeyId names a key that does not exist",
    "KMS.DisabledException": "the key of the profile's storage.kmsKeyId is disabled",
    "KMS.KMSInvalidStateException": "the key of the profile's storage.kmsKeyId cannot be used in its state",
}
_MISSING = {"NoSuchKey", "NoSuchVersion", "404", "NotFound"}
_PRECONDITION = {"PreconditionFailed", "412"}
_NEVER = {501, 505}
"""The store does not know the operation, and will not know it the next time."""
BROKEN = (HTTPClientError, StoreConnectionError, IncompleteReadError, ResponseParserError, HTTPError)
"""What is raised where a connection failed, or an answer arrived in part: worth another try."""
FAILED = (ClientError, BotoCoreError, ResponseParserError)
"""All that a request can end with."""
RETRYABLE_STATUS = {408, 409, 425, 429}
RETRYABLE_CODES = {"RequestTimeout", "XAmzContentSHA256Mismatch", "BadDigest", "IncompleteBody", "RequestTimeTooSkewed"}
"""With status 400 or 403, and yet worth another try: what was sent arrived late, in part or changed."""
REFUSED_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "TokenRefreshRequired",
    "InvalidToken",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
}


def code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "Unknown"))


def status_of(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_precondition(error: ClientError) -> bool:
    return code_of(error) in _PRECONDITION or status_of(error) == 412


def is_passing(status: int, code: str) -> bool:
    """Whether an answer with this status and error code may be another one the next time."""
    if code in _DENIED or code in _MISSING or code in _PRECONDITION:
        return False
    return status in RETRYABLE_STATUS or (status >= 500 and status not in _NEVER)


def explain(error: Exception, action: str, uri: str) -> FineTuneError:
    """`error`, raised by boto3 while `action` (a verb: "read") was done to `uri`, as ours."""
    if isinstance(error, FineTuneError):
        return error
    if isinstance(error, ClientError):
        return _explain_answer(error, action, uri)
    return _explain_silence(error, action, uri)


def _explain_answer(error: ClientError, action: str, uri: str) -> FineTuneError:
    code, status = code_of(error), status_of(error)
    message = str(error.response.get("Error", {}).get("Message", "")).strip()
    if code in _DENIED and (right := re.search(r"\bkms:\w+", message)):
        text = f"the credentials do not allow {right[0]} with the key that encrypts it ({code})"
        return FineTuneError(Reason.STORAGE_DENIED, f"cannot {action} {uri}: {text}")
    if code in _DENIED:
        return FineTuneError(Reason.STORAGE_DENIED, f"cannot {action} {uri}: {_DENIED[code]} ({code})")
    if code in _MISSING:
        return ObjectMissing(Reason.DATA_INVALID, f"cannot {action} {uri}: there is no such object ({code})")
    if is_precondition(error):
        return changed(uri, action)
    said = f"{code}: {message}" if message and message != code else code
    if is_passing(status, code) or code in RETRYABLE_CODES or status < 300:
        return FineTuneError(Reason.STORAGE_UNAVAILABLE, f"cannot {action} {uri}: the store failed with {said}")
    return FineTuneError(Reason.STORAGE_DENIED, f"cannot {action} {uri}: the store refused with {said}")


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
    if isinstance(error, SSLError):
        return FineTuneError(
            Reason.STORAGE_DENIED, f"cannot {action} {uri}: the store's certificate is refused: {error}"
        )
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


def of_disk(error: OSError, path: Path) -> FineTuneError:
    """`error`, raised by the system while a file was written, as ours."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return FineTuneError(Reason.RANK_FAILED, f"cannot write {path}: {error.strerror or error}")
    disk = shutil.disk_usage(path.parent)
    return FineTuneError(
        Reason.DOES_NOT_FIT,
        f"cannot write {path}: the work volume is full ({os.strerror(error.errno)}; {disk.free:,} of {disk.total:,} "
        "bytes are free); spec.resources.ephemeralStorage of the profile says how much a pod gets",
    )
