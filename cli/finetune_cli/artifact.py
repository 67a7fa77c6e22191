"""A published adapter on this side of S3: downloaded whole and verified, or not at all."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from finetune_api.manifest import MANIFEST_KEY, FileEntry, Manifest
from finetune_api.signature import SIGNATURE_KEY, SignedStatement
from finetune_cli.errors import CliError
from finetune_cli.objectstore import Location, Store

CHUNK = 1 << 20
PARALLEL = 8
MAX_MANIFEST = 64 << 20


def fetch(
    store: Store,
    location: Location,
    directory: Path,
    manifest_sha256: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
    signed: SignedStatement | None = None,
) -> Manifest:
    """Downloads what the manifest names below `location` into `directory`, which appears only when all of it is right.

    `progress` gets the bytes as they arrive; `signed` is kept beside the manifest. Raises CliError where something is
    missing, more, or different.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CliError(f"{directory} exists and is not an empty folder")
    raw = store.read(location / MANIFEST_KEY, MAX_MANIFEST)
    if raw is None:
        raise CliError(f"{location} holds no {MANIFEST_KEY}: nothing was published there (completely)")
    if manifest_sha256 and hashlib.sha256(raw).hexdigest() != manifest_sha256:
        raise CliError(f"{location / MANIFEST_KEY} is not the manifest that the job published: its SHA-256 differs")
    manifest = parse(raw, location)
    check_keys(manifest.files, (key for key in store.keys(location) if key != MANIFEST_KEY), location)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.parent / f".{directory.name}.{secrets.token_hex(4)}.partial"
    partial.mkdir()
    try:
        (partial / MANIFEST_KEY).write_bytes(raw)
        if signed:
            (partial / SIGNATURE_KEY).write_text(signed.model_dump_json(by_alias=True, indent=1) + "\n")
        with ThreadPoolExecutor(PARALLEL) as pool:
            jobs = [pool.submit(_download, store, location, entry, partial, progress) for entry in manifest.files]
            for job in jobs:
                job.result()
        if directory.exists():
            directory.rmdir()
        os.rename(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def parse(raw: bytes, location: Location) -> Manifest:
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise CliError(f"{location / MANIFEST_KEY} is not a manifest: {field}: {first['msg']}") from error


def check_keys(named: Iterable[FileEntry], present: Iterable[str], location: Location) -> None:
    """The manifest's keys are safe and exactly those that are there. Raises CliError."""
    keys = [entry.key for entry in named]
    for key in keys:
        path = PurePosixPath(key)
        unsafe = (
            path.is_absolute()
            or ".." in path.parts
            or str(path) != key
            or "\\" in key
            or key in (MANIFEST_KEY, SIGNATURE_KEY)
        )
        if unsafe or any(ord(c) < 32 for c in key):
            raise CliError(f"{location} is refused: its manifest names {key!r}, which is no plain relative path")
    if len(set(keys)) != len(keys):
        raise CliError(f"{location} is refused: its manifest names a file twice")
    there = set(present)
    if missing := sorted(set(keys) - there):
        raise CliError(f"{location} is not whole: {missing[0]} is missing ({len(missing)} of {len(keys)} files)")
    if more := sorted(there - set(keys)):
        raise CliError(f"{location} is refused: it holds {more[0]}, which its manifest does not name")


def check_files(directory: Path) -> Manifest:
    """What the manifest of a folder that was fetched says of its files still holds. Raises CliError."""
    location = Location("folder", directory.name)
    try:
        manifest = parse((directory / MANIFEST_KEY).read_bytes(), location)
    except OSError as error:
        raise CliError(f"{directory} has no {MANIFEST_KEY} that can be read: it was not fetched by this") from error
    here = [p.relative_to(directory).as_posix() for p in directory.rglob("*") if not p.is_dir()]
    check_keys(manifest.files, (key for key in here if key not in (MANIFEST_KEY, SIGNATURE_KEY)), location)
    for entry in manifest.files:
        with (directory / entry.key).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise CliError(f"{directory / entry.key} differs from the manifest")
    return manifest


def _download(
    store: Store, location: Location, entry: FileEntry, directory: Path, progress: Callable[[int], None]
) -> None:
    target = directory / entry.key
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with target.open("xb") as file:
        for chunk in store.chunks(location / entry.key, CHUNK):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            progress(len(chunk))
    if size != entry.size:
        raise CliError(f"{location / entry.key} has {size} bytes; the manifest says {entry.size}")
    if digest.hexdigest() != entry.sha256:
        raise CliError(f"{location / entry.key} differs from the manifest: SHA-256 {digest.hexdigest()}")
