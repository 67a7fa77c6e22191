"""Many files as one thing in S3: each uploaded and hashed, the manifest last and never over another.

Nobody sees half of it: a reader trusts only what a manifest names, and the manifest is written when all else is there.
"""

import datetime
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ValidationError

from finetune_api.failures import FineTuneError, Reason
from finetune_api.manifest import MANIFEST_KEY, FileEntry, Manifest, RunInfo
from finetune_trainer.storage import FILES_AT_ONCE, Store, Wanted, join, sha256_of
from finetune_trainer.storage_errors import AlreadyExists, ObjectMissing, changed

MANIFEST_LIMIT = 16 * 2**20


class Published(NamedTuple):
    manifest_sha256: str
    size: int
    """Bytes of all files, the manifest included."""
    uri: str = ""


def now() -> str:
    """The present in RFC 3339, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def publish(
    store: Store,
    directory: Path,
    uri: str,
    *,
    kind: Literal["Adapter", "Model", "Rows", "Checkpoint"],
    step: int,
    created_time: str,
    run: RunInfo | None = None,
    world_size: int | None = None,
    spec_sha256: str | None = None,
    on_bytes: Callable[[int], None] | None = None,
    commit: "Commit | None" = None,
) -> Published:
    """Publishes every file below `directory` under `uri`, `manifest.json` last with If-None-Match.

    Where a manifest with the same files is there already nothing is written (an answer that was lost); AlreadyExists
    where it names others. `commit` writes the manifest in another way.
    """
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST_KEY)
    if not paths:
        raise ValueError(f"{directory} has no files to publish")
    if (earlier := _earlier(store, directory, paths, uri)) is not None:
        return earlier

    def send(path: Path) -> FileEntry:
        key = path.relative_to(directory).as_posix()
        size, digest = store.upload(path, join(uri, key))
        if on_bytes:
            on_bytes(size)
        return FileEntry(key=key, size=size, sha256=digest)

    with ThreadPoolExecutor(FILES_AT_ONCE, "publish") as pool:
        files = list(pool.map(send, paths))
    manifest = Manifest(
        kind=kind,
        step=step,
        created_time=created_time,
        files=files,
        run=run,
        world_size=world_size,
        spec_sha256=spec_sha256,
    )
    return put_manifest(store, manifest, uri, commit)


def _earlier(store: Store, directory: Path, paths: list[Path], uri: str) -> Published | None:
    try:
        data = store.get_bytes(join(uri, MANIFEST_KEY), MANIFEST_LIMIT)
    except ObjectMissing:
        return None
    manifest = parse_manifest(data, join(uri, MANIFEST_KEY))
    here = {path.relative_to(directory).as_posix(): sha256_of(path) for path in paths}
    if {entry.key: entry.sha256 for entry in manifest.files} != here:
        raise AlreadyExists(Reason.STORAGE_DENIED, f"cannot publish to {uri}: other files are published there already")
    return published(data, uri)


def put_manifest(store: Store, manifest: Manifest, uri: str, commit: "Commit | None" = None) -> Published:
    """Makes files that are there already one thing: their sizes are checked, then the manifest is written."""
    pins = store.pin_all([join(uri, entry.key) for entry in manifest.files])
    for found, entry in zip(pins, manifest.files, strict=True):
        if found.size != entry.size:
            raise changed(found.uri, "publish", f"{found.size:,} bytes are there, {entry.size:,} were sent")
    return (commit or _commit(store))(manifest, uri)


Commit = Callable[[Manifest, str], Published]
"""Writes a manifest at a prefix, all of whose files are there."""


def _commit(store: Store) -> Commit:
    def commit(manifest: Manifest, uri: str) -> Published:
        data = encode_manifest(manifest)
        store.put_if_absent(join(uri, MANIFEST_KEY), data)
        return published(data, uri)

    return commit


def encode_manifest(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(by_alias=True, exclude_none=True, indent=1).encode()


def published(data: bytes, uri: str) -> Published:
    """By the bytes of its manifest."""
    manifest = parse_manifest(data, join(uri, MANIFEST_KEY))
    size = sum(entry.size for entry in manifest.files) + len(data)
    return Published(hashlib.sha256(data).hexdigest(), size, uri)


def read_manifest(store: Store, manifest_uri: str, sha256: str | None = None) -> Manifest:
    """Raises DataInvalid where it is not a manifest, or not the one whose hash is given."""
    data = store.get_bytes(manifest_uri, MANIFEST_LIMIT)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise FineTuneError(Reason.DATA_INVALID, f"{manifest_uri} is not the manifest with SHA-256 {sha256}")
    return parse_manifest(data, manifest_uri)


def parse_manifest(data: bytes, manifest_uri: str) -> Manifest:
    """Raises DataInvalid, also where a key would lead out of the manifest's prefix."""
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise FineTuneError(Reason.DATA_INVALID, f"{manifest_uri} is not a manifest") from error
    for entry in manifest.files:
        if entry.key.startswith("/") or any(part in ("", ".", "..") for part in entry.key.split("/")):
            raise FineTuneError(Reason.DATA_INVALID, f"{manifest_uri} names a key outside its prefix: {entry.key}")
    return manifest


def fetch_verified(
    store: Store,
    manifest_uri: str,
    directory: Path,
    *,
    sha256: str | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Manifest:
    """Downloads what a manifest names, nothing else, and verifies the size and SHA-256 of each file."""
    manifest = read_manifest(store, manifest_uri, sha256)
    prefix = manifest_uri.rpartition("/")[0]
    wanted = []
    pins = store.pin_all([join(prefix, entry.key) for entry in manifest.files])
    for pinned, entry in zip(pins, manifest.files, strict=True):
        if pinned.size != entry.size:
            raise changed(pinned.uri, detail=f"{pinned.size:,} bytes are there, the manifest says {entry.size:,}")
        wanted.append(Wanted(pinned, directory / entry.key, entry.sha256))
    store.download_many(wanted, on_bytes)
    return manifest
