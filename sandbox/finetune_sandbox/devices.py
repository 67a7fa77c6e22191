"""Which of a node's GPUs belong to which pod: what a device plugin does, for `nvidia.com/gpu` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_sandbox.quantity import container_requests, pod_requests

GPU = "nvidia.com/gpu"


class DevicesTaken(Exception):
    """More devices are asked for than are free."""


class Devices:
    """Hands out device numbers; containers see theirs as CUDA_VISIBLE_DEVICES.

    On a node without this resource the variable is not set; on a node with it, a container that asks for none
    sees none.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = list(range(count))
        self._held: dict[str, list[int]] = {}

    def acquire(self, uid: str, pod: Mapping[str, Any]) -> None:
        wanted = int(pod_requests(pod).get(GPU, 0))
        if wanted > len(self._free):
            raise DevicesTaken(
                f"Allocate failed due to requested number of devices unavailable for {GPU}. "
                f"Requested: {wanted}, Available: {len(self._free)}, which is unexpected"
            )
        self._held[uid], self._free = self._free[:wanted], self._free[wanted:]

    def release(self, uid: str) -> None:
        self._free = sorted([*self._free, *self._held.pop(uid, [])])

    def variables(self, uid: str, container: Mapping[str, Any]) -> dict[str, str]:
        if not self._count:
            return {}
        wanted = int(container_requests(container).get(GPU, 0))
        numbers = ",".join(str(number) for number in self._held.get(uid, [])[:wanted])
        return {"CUDA_VISIBLE_DEVICES": numbers}
