"""Processes under a memory limit of their own, as a container is, and how much of it they used."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from finetune_sandbox.cgroup import MemoryGroups

MIB = 2**20
VALUES = Path(__file__).parents[2] / "charts" / "finetune-operator" / "values.yaml"
_PEAKS = ("memory.peak", "memory.max_usage_in_bytes")
"""The highest usage so far, page cache included: of cgroup v2 (Linux 5.19 and later) and of v1."""
_ENTER = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True)
class Confinement:
    """A memory cgroup. Commands from `command` run inside it, with all that they start."""

    groups: MemoryGroups
    group: Path

    def command(self, *command: str) -> tuple[str, ...]:
        """Arguments that run `command` inside the group, under the process id that they are started with."""
        return ("/bin/sh", "-c", _ENTER, str(self.group / "cgroup.procs"), *command)

    def oom_killed(self) -> bool:
        """True once the kernel has killed a process of the group for its memory."""
        return self.groups.out_of_memory(self.group)

    def peak_mib(self, pid: int | None = None) -> float:
        """Highest usage so far in MiB. On a kernel that keeps none for the group: that of the live process `pid`."""
        for file in _PEAKS:
            if (self.group / file).exists():
                return int((self.group / file).read_text()) / MIB
        assert pid is not None, "this kernel keeps no peak of a group; pass the id of the process"
        return resident_peak_mib(pid)


@contextmanager
def confined(mebibytes: int, name: str = "confined") -> Iterator[Confinement]:
    """A group of so many MiB, removed at the end: by then its processes must have ended.

    Skips the test where this machine lets us make no memory cgroup, neither of version 1 nor 2.
    """
    groups = MemoryGroups(name)
    if (group := groups.create("limit", mebibytes * MIB)) is None:
        pytest.skip(f"this machine lets us make no memory cgroup: {groups.reason}")
    try:
        yield Confinement(groups, group)
    finally:
        groups.remove(group)


def chart_limit_mib() -> int:
    """Memory limit in MiB that the chart gives the operator's container."""
    limit: str = yaml.safe_load(VALUES.read_text())["resources"]["limits"]["memory"]
    assert limit.endswith("Mi"), f"{VALUES}: resources.limits.memory is {limit}, this test reads Mi alone"
    return int(limit.removesuffix("Mi"))


def resident_peak_mib(pid: int) -> float:
    """Highest resident memory so far of a live process in MiB (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"process {pid} has ended")
