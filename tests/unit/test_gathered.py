"""What a rank may still take: of the machine, of its pod, and with how many it shares that."""

from pathlib import Path

import psutil
import pytest
import torch

from finetune_trainer.gathered import free_memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")


@pytest.mark.parametrize(("limit", "used", "free"), [("1000\n", "400\n", 600), ("1000\n", "1400\n", 0)])
def test_the_pods_limit_holds(limit: str, used: str, free: int, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text(used)
    assert free_memory(CPU, tmp_path) == free


@pytest.mark.parametrize("limit", [None, "max\n"])
def test_without_one_it_is_the_machines(limit: str | None, tmp_path: Path) -> None:
    if limit:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("400\n")
    assert free_memory(CPU, tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_ranks_of_a_pod_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    (tmp_path / "memory.max").write_text("1000")
    (tmp_path / "memory.current").write_text("200")
    assert free_memory(CPU, tmp_path) == 200
