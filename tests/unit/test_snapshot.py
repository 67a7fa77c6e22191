"""The copy of the training state in shared memory: the files that another process makes of it."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from finetune_trainer.snapshot import Snapshot, in_parts
from finetune_trainer.state import Stored, parameters_of
from finetune_trainer.uploader import copy

SHAPES = {"a": [3, 4], "b": [], "c": [7], "d": [2, 2]}


def write(snapshot: Snapshot, directory: Path) -> dict[str, Path]:
    """What the uploader makes of its descriptors."""
    directory.mkdir(exist_ok=True)
    for name, descriptor in snapshot.descriptors.items():
        copy(descriptor, directory / name)
    return {path.name: path for path in directory.iterdir()}


def values(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def test_it_becomes_the_files_that_safetensors_reads(tmp_path: Path) -> None:
    snapshot = Snapshot({"adapter.safetensors": SHAPES}, ["state.json"])
    # What was there before, a longer text among it, leaves nothing behind.
    for seed, text in ((0, '{"step": 1, "more": true}'), (1, '{"step": 2}')):
        for name, value in (wanted := values(seed)).items():
            snapshot.put(name, value)
        snapshot.finish()
        snapshot.write("state.json", text)
        files = write(snapshot, tmp_path)
        found = load_file(files["adapter.safetensors"])
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert files["state.json"].read_text() == text
    assert set(files) == {"adapter.safetensors", "state.json"}


def test_what_is_large_is_in_parts_with_an_index(tmp_path: Path) -> None:
    snapshot = Snapshot({"adapter.safetensors": SHAPES}, [], part_bytes=60)
    for name, value in (wanted := values(0)).items():
        snapshot.put(name, value)
    files = write(snapshot, tmp_path)
    assert len([name for name in files if name.startswith("adapter-")]) == 2
    assert "adapter.safetensors.index.json" in files
    found = parameters_of(tmp_path)
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert Stored(tmp_path, "adapter.safetensors").names == wanted.keys()


def test_a_tensor_is_never_divided() -> None:
    parts = in_parts("x.safetensors", {"large": [100], "small": [1], "other": [1]}, part_bytes=16)
    assert [list(part) for part in parts.values()] == [["large"], ["small", "other"]]
    assert list(parts) == ["x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"]
    assert list(in_parts("x.safetensors", {"a": [1]}, 16)) == ["x.safetensors"]


def test_a_copy_is_whole_wherever_the_descriptor_stands(tmp_path: Path) -> None:
    descriptor = os.memfd_create("x")
    os.write(descriptor, b"0123456789")
    copy(descriptor, tmp_path / "x")
    os.close(descriptor)
    assert (tmp_path / "x").read_bytes() == b"0123456789"
