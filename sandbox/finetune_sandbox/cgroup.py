"""A memory limit for a process and all below it, where this machine lets us make a cgroup (v2 or v1)."""

from __future__ import annotations

import errno
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from finetune_sandbox.process import left_behind

log = logging.getLogger(__name__)

PREFIX = "finetune-"


@dataclass(frozen=True)
class Layout:
    """The folder that new groups are made in, and the files of this version of cgroups."""

    parent: Path
    version: int

    @property
    def limit(self) -> str:
        return "memory.max" if self.version == 2 else "memory.limit_in_bytes"

    @property
    def events(self) -> str:
        return "memory.events" if self.version == 2 else "memory.oom_control"


def parse_own(text: str, mounts: str) -> Layout | None:
    """The memory cgroup of this process, from /proc/self/cgroup and /proc/self/mounts; None where there is none."""
    folders: dict[int, str] = {}
    for line in mounts.splitlines():
        _, folder, kind, options = line.split()[:4]
        if kind == "cgroup2":
            folders[2] = folder
        elif kind == "cgroup" and "memory" in options.split(","):
            folders[1] = folder
    paths: dict[int, str] = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths[2] = path
        elif "memory" in controllers.split(","):
            paths[1] = path
    # Where version 1 has the memory controller, version 2 of the same machine ("hybrid") does not.
    for version in (1, 2):
        if version in folders and version in paths:
            return Layout(Path(folders[version] + paths[version]), version)
    return None


class MemoryGroups:
    """Makes and removes groups. `reason` says why limits are not enforced; empty where they are."""

    def __init__(self, name: str) -> None:
        self._prefix = f"{PREFIX}{os.getpid()}-{name}"
        self._layout: Layout | None = None
        self.reason = ""
        try:
            layout = parse_own(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mounts").read_text())
            if layout is None:
                self.reason = "there is no memory cgroup"
                return
            probe = self._make(layout, f"{self._prefix}-probe", 64 * 2**20)
            probe.rmdir()
            self._layout = layout
            for group in left_behind(layout.parent, PREFIX):
                self.remove(group)
        except OSError as error:
            self.reason = str(error)

    @staticmethod
    def _make(layout: Layout, name: str, limit: int) -> Path:
        group = layout.parent / name
        group.mkdir()
        try:
            (group / layout.limit).write_text(str(limit))
            for file, value in (("memory.swap.max", "0"), ("memory.oom.group", "1")):
                if layout.version == 2 and (group / file).exists():
                    (group / file).write_text(value)
        except OSError:
            group.rmdir()
            raise
        return group

    def create(self, name: str, limit: int) -> Path | None:
        """The folder of a new group of `limit` bytes; None where limits are not enforced here."""
        return self._make(self._layout, f"{self._prefix}-{name}", limit) if self._layout else None

    def out_of_memory(self, group: Path) -> bool:
        """Whether the kernel killed something in the group for its limit."""
        assert self._layout is not None
        for line in (group / self._layout.events).read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value) > 0
        return False

    def remove(self, group: Path) -> None:
        """Removes a group whose processes have ended; the kernel needs a moment to notice that they have."""
        for attempt in range(20):
            try:
                group.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno != errno.EBUSY or attempt == 19:
                    log.warning("cgroup %s stays behind: %s", group, error)
                    return
                time.sleep(0.005)
