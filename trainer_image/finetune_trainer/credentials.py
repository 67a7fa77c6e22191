"""Keys of the object store that are read again for each request, so that a renewed Secret needs no new pod.

$FINETUNE_CREDENTIALS names a folder with the Secret's keys as files, which the kubelet keeps current; the environment
has what was there when the pod started. Without that folder botocore finds credentials as it always does.
"""

import base64
import binascii
import datetime
import json
import os
from pathlib import Path
from typing import Any, cast

import boto3
import botocore.session
from botocore.credentials import CredentialProvider, Credentials, ReadOnlyCredentials, RefreshableCredentials

VARIABLE = "FINETUNE_CREDENTIALS"
ACCESS_KEY, SECRET_KEY, TOKEN = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"


def _read(folder: Path) -> dict[str, str]:
    """Of one moment: the kubelet exchanges all files at once, by a link that they lie behind."""
    for _ in range(3):
        place = (folder / "..data" if (folder / "..data").exists() else folder).resolve()
        try:
            found = {name: (place / name).read_text().strip() for name in (ACCESS_KEY, SECRET_KEY)}
            if (place / TOKEN).exists():
                found[TOKEN] = (place / TOKEN).read_text().strip()
            return found
        except OSError:
            continue
    return {}


class RotatedCredentials(Credentials):
    """As the files have them at the time of each signature; while they cannot be read, as they were last."""

    def __init__(self, folder: Path, first: dict[str, str]) -> None:
        super().__init__(first[ACCESS_KEY], first[SECRET_KEY], first.get(TOKEN), method="files")
        self._folder, self._last = folder, first

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """What the next request is signed with."""
        # One object, exchanged at once: several threads sign.
        self._last = keys = _read(self._folder) or self._last
        return ReadOnlyCredentials(keys[ACCESS_KEY], keys[SECRET_KEY], keys.get(TOKEN))


class _Files(CredentialProvider):
    METHOD = CANONICAL_NAME = "custom-files"

    def load(self) -> RotatedCredentials | None:
        """None where there is no such folder, or not both keys in it."""
        folder = Path(os.environ.get(VARIABLE) or "/nonexistent")
        first = _read(folder)
        return RotatedCredentials(folder, first) if first else None


def make_session() -> Any:
    """A boto3 session of its own: boto3's default one keeps the first credentials that it saw."""
    session = botocore.session.Session()
    session.get_component("credential_provider").insert_before("env", _Files())
    return boto3.session.Session(botocore_session=session)


def expiry_of(credentials: Any) -> datetime.datetime | None:
    """When credentials that nobody renews end, in UTC; None where they do not, or it cannot be known.

    Known are $AWS_CREDENTIAL_EXPIRATION, and session tokens that are JSON Web Tokens, as MinIO makes them; AWS's own
    tokens do not say it.
    """
    if credentials is None:
        return None
    if isinstance(credentials, RefreshableCredentials) and credentials.method != "env":
        return None
    if told := os.environ.get("AWS_CREDENTIAL_EXPIRATION"):
        try:
            time = datetime.datetime.fromisoformat(told)
        except ValueError:
            return None
        return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)
    return _expiry_of_token(credentials.get_frozen_credentials().token)


def _expiry_of_token(token: str | None) -> datetime.datetime | None:
    parts = (token or "").split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        return datetime.datetime.fromtimestamp(cast(float, claims["exp"]), datetime.UTC)
    except (binascii.Error, ValueError, KeyError, TypeError, OverflowError):
        return None
