"""Which attempt of a job publishes: one, and once; a pod that comes back late finds the place taken.

<scratch>/fence/<attempt>      a register that is written once, with the first of these two:
    {"fenced": 3}              by a later attempt, when it starts: this one may not publish any more
    {"manifest": …, "uri": …}  by the attempt itself, when all its files are there: it publishes, and nobody else does

<scratch>/fence/<attempt>.uri  where the attempt publishes: unfinished uploads below it are swept once it is fenced

Who finds a manifest in a register writes it where it belongs, since its writer may have died in between, and takes its
result for the job's. So one artifact is published, however many attempts thought that they were the last.

A register is written with `If-None-Match` where the store honours it, which `prepare` has tried. Elsewhere a writer
looks, writes, waits as long as a write may be under way, and believes what it then reads.
"""

import contextlib
import os
import time
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from finetune_api.failures import FineTuneError, Reason, TrainingResult
from finetune_api.manifest import MANIFEST_KEY, Manifest
from finetune_api.run import RunConfig
from finetune_trainer.publish import MANIFEST_LIMIT, Published, encode_manifest, parse_manifest, published
from finetune_trainer.storage import Store, join
from finetune_trainer.storage_errors import AlreadyExists, ObjectMissing

SETTLED = 10.0
"""Seconds after which a write that was sent has arrived, or will not: for stores that ignore conditions."""


class Entry(BaseModel):
    """What a register says."""

    model_config = ConfigDict(extra="forbid")
    fenced: int | None = None
    """The attempt that did it."""
    uri: str = ""
    manifest: str = ""
    """As it is, or will be, at `uri`."""


class Superseded(FineTuneError):
    """A later attempt runs, or has run: there is nothing left to do here."""

    def __init__(self, attempt: int, by: int) -> None:
        super().__init__(
            Reason.PREEMPTED, f"attempt {attempt} publishes nothing: attempt {by} has begun in the meantime"
        )


class Fence(NamedTuple):
    """One attempt's view; `conditional`: whether the store honours `If-None-Match`."""

    store: Store
    scratch_uri: str
    output_uri: str
    attempt: int
    attempt_uid: str
    conditional: bool = True
    settled: float = SETTLED

    @classmethod
    def of(cls, store: Store, config: RunConfig) -> "Fence | None":
        """Of the attempt whose pod this is; None where nobody counts attempts."""
        if config.attempt is None:
            return None
        conditional = config.prepared is None or config.prepared.conditional_writes
        uid = os.environ["FINETUNE_ATTEMPT_UID"]
        return cls(store, config.scratch_uri, config.output_uri, config.attempt, uid, conditional)

    @classmethod
    def check_own(cls, store: Store, config: RunConfig) -> None:
        """Before what a later attempt may have stored is replaced. Raises Superseded."""
        if fence := cls.of(store, config):
            fence.check()

    @property
    def uri(self) -> str:
        """Where this attempt publishes."""
        return f"{self.output_uri.rstrip('/')}/{self.attempt_uid}/"

    def enter(self) -> TrainingResult | None:
        """At an attempt's start: no earlier one publishes from now on. The result of the one that has, if any.

        Raises Superseded where a later attempt has begun.
        """
        self.check()
        found = {item.uri.rpartition("/")[2] for item in self.store.list(self._folder)}
        for earlier in range(self.attempt):
            known = self._read(earlier) if str(earlier) in found else None
            entry = known or self._write(earlier, Entry(fenced=self.attempt))
            if entry.fenced is None:
                return self._roll_forward(entry)
            if known is None and f"{earlier}.uri" in found:
                self._sweep(earlier)
        self.store.sweep_uploads(self.scratch_uri)
        self.store.put_bytes(f"{self._uri(self.attempt)}.uri", self.uri.encode())
        return None

    def published(self) -> bool:
        """Whether an earlier attempt has published; it changes nothing."""
        entries = (self._read(earlier) for earlier in range(self.attempt))
        return any(entry is not None and entry.fenced is None for entry in entries)

    def check(self) -> None:
        """Raises Superseded where a later attempt has begun."""
        entry = self._read(self.attempt)
        if entry and entry.fenced is not None:
            raise Superseded(self.attempt, entry.fenced)

    def commit(self, manifest: Manifest, uri: str) -> Published:
        """`publish.Commit`: the manifest is this attempt's, or that of another pod of the same. Raises Superseded."""
        entry = self._write(self.attempt, Entry(uri=uri, manifest=encode_manifest(manifest).decode()))
        if entry.fenced is not None:
            raise Superseded(self.attempt, entry.fenced)
        self._roll_forward(entry)
        return published(entry.manifest.encode(), entry.uri)

    @property
    def _folder(self) -> str:
        return join(self.scratch_uri, "fence/")

    def _uri(self, attempt: int) -> str:
        return join(self._folder, str(attempt))

    def _read(self, attempt: int) -> Entry | None:
        try:
            return Entry.model_validate_json(self.store.get_bytes(self._uri(attempt), MANIFEST_LIMIT))
        except ObjectMissing:
            return None

    def _write(self, attempt: int, entry: Entry) -> Entry:
        """What the register says in the end."""
        if (known := self._read(attempt)) is not None:
            return known
        data = entry.model_dump_json(exclude_none=True).encode()
        with contextlib.suppress(AlreadyExists):
            self.store.put_if_absent(self._uri(attempt), data)
        if not self.conditional:
            time.sleep(self.settled)
        found = self._read(attempt)
        if found is None:
            raise FineTuneError(Reason.STORAGE_UNAVAILABLE, f"{self._uri(attempt)} was written and is not there")
        return found

    def _roll_forward(self, entry: Entry) -> TrainingResult:
        data = entry.manifest.encode()
        self.store.put_if_absent(join(entry.uri, MANIFEST_KEY), data)
        manifest, done = parse_manifest(data, entry.uri), published(data, entry.uri)
        return TrainingResult(
            uri=entry.uri,
            manifest_sha256=done.manifest_sha256,
            size_bytes=done.size,
            metrics=manifest.run.metrics if manifest.run else {},
        )

    def _sweep(self, earlier: int) -> None:
        """Of an attempt that cannot publish any more."""
        uri = self.store.get_bytes(f"{self._uri(earlier)}.uri", 4096).decode()
        # Only what this job may write.
        if uri.startswith(f"{self.output_uri.rstrip('/')}/"):
            self.store.sweep_uploads(uri)
