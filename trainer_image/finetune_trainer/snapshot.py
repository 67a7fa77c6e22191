"""A copy of the training state in shared memory, laid out as the safetensors files that it becomes.

Training stands still while tensors are copied here, and for nothing else: the pages are there from the start (and
pinned, where a GPU copies), and another process turns them into files. Its descriptors are all that it is handed.
"""

import json
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from math import prod

import torch

PART_BYTES = 4 * 2**30
"""Of one file: what is larger is written in parts, with an index."""
INDEX = ".index.json"
_ALIGNMENT = 64

Shapes = Mapping[str, Sequence[int]]


class Region:
    """One file in memory: float32 tensors by name, in the order of `shapes`."""

    def __init__(self, name: str, shapes: Shapes) -> None:
        self.name = name
        header, size = _header(shapes)
        self.descriptor = os.memfd_create(name)
        os.truncate(self.descriptor, len(header) + size)
        self._memory = mmap.mmap(self.descriptor, len(header) + size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._memory[: len(header)] = header
        self.tensors, start = {}, len(header)
        for key, shape in shapes.items():
            count = prod(shape)
            flat = torch.frombuffer(self._memory, dtype=torch.float32, count=count, offset=start)
            self.tensors[key] = flat.view(list(shape))
            start += 4 * count
        if torch.cuda.is_available():
            # Copies into pages that are pinned are several times as fast; where that is refused they work, too.
            whole = torch.frombuffer(self._memory, dtype=torch.uint8)
            torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.numel(), 0)  # type: ignore[no-untyped-call]


class Snapshot:
    """Several files in memory; `texts` are written anew each time."""

    def __init__(self, files: Mapping[str, Shapes], texts: Sequence[str], part_bytes: int = PART_BYTES) -> None:
        self._regions: list[Region] = []
        self._texts: dict[str, int] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        """Where each tensor is copied to."""
        for name, shapes in files.items():
            for part in (regions := [Region(part, own) for part, own in in_parts(name, shapes, part_bytes).items()]):
                self.tensors |= part.tensors
            self._regions += regions
            if len(regions) > 1:
                self.write(name + INDEX, json.dumps({"weight_map": {k: p.name for p in regions for k in p.tensors}}))
        for name in texts:
            self.write(name, "")

    @property
    def descriptors(self) -> dict[str, int]:
        """By the name of the file."""
        return {region.name: region.descriptor for region in self._regions} | self._texts

    def write(self, name: str, text: str) -> None:
        descriptor = self._texts.setdefault(name, -1)
        if descriptor < 0:
            descriptor = self._texts[name] = os.memfd_create(name)
        data = text.encode()
        os.truncate(descriptor, len(data))
        while data:
            # Written from the start: the offset is the other process's as well.
            done = os.pwrite(descriptor, data, os.fstat(descriptor).st_size - len(data))
            data = data[done:]

    def put(self, name: str, value: torch.Tensor) -> None:
        self.tensors[name].copy_(value, non_blocking=True)

    def finish(self) -> None:
        """Until all that was put is there."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def in_parts(name: str, shapes: Shapes, part_bytes: int) -> dict[str, dict[str, Sequence[int]]]:
    """`a.safetensors`, or `a-00001-of-00003.safetensors` and so on: whole tensors, in their order."""
    parts: list[dict[str, Sequence[int]]] = [{}]
    room = part_bytes
    for key, shape in shapes.items():
        size = 4 * prod(shape)
        if parts[-1] and size > room:
            parts.append({})
            room = part_bytes
        parts[-1][key] = shape
        room -= size
    if len(parts) == 1:
        return {name: parts[0]}
    stem, _, ending = name.rpartition(".")
    return {f"{stem}-{i:05d}-of-{len(parts):05d}.{ending}": part for i, part in enumerate(parts, 1)}


def _header(shapes: Shapes) -> tuple[bytes, int]:
    """The beginning of the file, and how many bytes of numbers follow (github.com/huggingface/safetensors#format)."""
    entries, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * prod(shape)
        entries[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, end
