"""What all pods of one process node share."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from finetune_sandbox.cgroup import MemoryGroups
from finetune_sandbox.client import Client, Recorder
from finetune_sandbox.devices import Devices
from finetune_sandbox.podstatus import timestamp


@dataclass(frozen=True)
class Host:
    """`seed` tells clusters on one machine apart; `niceness` is added to containers, so that they do not starve the
    control plane beside them; `token_renewal` is the share of a projected token's life after which it is renewed;
    durations are in seconds."""

    client: Client
    recorder: Recorder
    node: str
    address: str
    seed: str
    allocatable: dict[str, str]
    directory: Path
    memory_directory: Path
    devices: Devices
    groups: MemoryGroups
    niceness: int = 5
    retry: float = 2.0
    crash_backoff: float = 10.0
    crash_backoff_max: float = 300.0
    token_renewal: float = 0.8


def now() -> str:
    return timestamp(datetime.now(UTC))
