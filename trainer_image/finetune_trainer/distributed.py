"""The process group: one store on the first pod's own address, gloo or NCCL on top, a gloo group for small decisions.

Rank 0 binds the store's socket itself and hands it over: torch would listen on every address, and two gangs on one
host would fight for the port.
"""

import datetime
import fcntl
import ipaddress
import json
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported where torch has distributed

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import Devices

TIMEOUT = datetime.timedelta(minutes=20)
"""Of one collective: longer than the slowest rank may take to load a model."""
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Ranks:
    """Where this process stands, and what all ranks decide together. Every method but `is_main` is collective."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup
    """gloo, on the CPU: a flag costs no synchronisation with the GPU."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag: is it set on one rank at least?"""
        tensor = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(value) for value in tensor.tolist()]

    def sum(self, values: Sequence[float]) -> list[float]:
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return [float(value) for value in tensor.tolist()]

    def each(self, value: float) -> list[float]:
        """Every rank's value, by rank."""
        found = [torch.zeros(1, dtype=torch.float64) for _ in range(self.world_size)]
        dist.all_gather(found, torch.tensor([value], dtype=torch.float64), group=self.control)
        return [float(tensor) for tensor in found]

    def from_main(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank; what the others pass is ignored."""
        return self.from_rank(0, value)

    def from_rank(self, rank: int, value: Any) -> Any:
        """As `from_main`, of another rank."""
        data = json.dumps(value).encode() if self.rank == rank else b""
        size = torch.tensor([len(data)], dtype=torch.int64)
        dist.broadcast(size, src=rank, group=self.control)
        buffer = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(size), dtype=torch.uint8)
        )
        dist.broadcast(buffer, src=rank, group=self.control)
        return json.loads(bytes(buffer.tolist()))

    def barrier(self) -> None:
        dist.barrier(group=self.control)


def start(devices: Devices, zero: bool) -> Ranks:
    """Join the process group that the environment describes (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    `zero`: also set up DeepSpeed's communication on top. Raises FineTuneError where the gang is not the one asked for.
    """
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world_size != devices.world_size:
        raise FineTuneError(
            Reason.RANK_FAILED, f"WORLD_SIZE: found {world_size}; the job asked for {devices.world_size} processes"
        )
    device = _device(devices, local_rank)
    # accelerate imports DeepSpeed in any case, which would look for a GPU and warn.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    address = os.environ.get("FINETUNE_POD_IP", os.environ["MASTER_ADDR"])
    _bind_gloo(address)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=_store(rank, world_size, address),
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    control = dist.new_group(backend="gloo", timeout=TIMEOUT) if device.type == "cuda" else dist.group.WORLD
    assert control is not None
    if zero:
        _start_deepspeed(device)
    if dist.get_world_size() != devices.world_size:
        raise FineTuneError(
            Reason.RANK_FAILED, f"{dist.get_world_size()} processes joined; the job asked for {devices.world_size}"
        )
    return Ranks(rank, local_rank, world_size, device, control)


def on_any(flag: torch.Tensor) -> bool:
    """Whether it is set on one rank at least: a scalar on the device that models are on. Collective."""
    number = flag.int()
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return bool(number)


def stop(ranks: Ranks) -> None:
    """Leave together: without it gloo aborts some exits."""
    ranks.barrier()
    dist.destroy_process_group()


def _device(devices: Devices, local_rank: int) -> torch.device:
    if devices.kind == "CPU":
        return torch.device("cpu")
    # Without this check each worker would train alone on its CPU, and succeed.
    if torch.cuda.device_count() <= local_rank:
        raise FineTuneError(
            Reason.RANK_FAILED,
            f"process {local_rank} of this pod has no GPU: {torch.cuda.device_count()} found, "
            f"{devices.processes_per_worker} asked for",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _store(rank: int, world_size: int, address: str) -> TCPStore:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank != 0:
        return TCPStore(host, port, world_size, is_master=False, timeout=TIMEOUT, wait_for_workers=False)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(1024)
    return TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        timeout=TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _bind_gloo(address: str) -> None:
    """gloo would ask the hostname's resolver for its interface, which knows nothing of a pod's loopback address."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name = "lo" if ipaddress.ip_address(address).is_loopback else _interface_of(address)
    if name:
        os.environ["GLOO_SOCKET_IFNAME"] = name
        if name == "lo":
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _interface_of(address: str) -> str | None:
    """The interface that owns an IPv4 address; None where none says so (then gloo chooses)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _start_deepspeed(device: torch.device) -> None:
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # The shared-memory kernel would be compiled at start (25-50 s), or crash where there is no compiler.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, timeout=TIMEOUT)
