"""What a real control plane says when it cannot start. (That it does start is what every suite relies on.)"""

from pathlib import Path

import pytest

from finetune_sandbox.controlplane import ControlPlane, ControlPlaneError, assets_from_environment, find_programs


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("value", "expected"), [(None, None), ("", None), ("/opt/kube", Path("/opt/kube"))])
def test_the_variable_names_the_folder(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: Path | None
) -> None:
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    if value is not None:
        monkeypatch.setenv("KUBEBUILDER_ASSETS", value)
    assert assets_from_environment() == expected


def test_every_missing_program_is_named(tmp_path: Path) -> None:
    program(tmp_path / "etcd", "true")
    (tmp_path / "kube-apiserver").write_text("not executable")
    with pytest.raises(ControlPlaneError) as caught:
        find_programs(tmp_path, scheduler=True)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path} ($KUBEBUILDER_ASSETS) has no executable")
    assert message.endswith("kube-apiserver, kube-controller-manager, kube-scheduler")


async def test_a_program_that_dies_early_shows_the_end_of_its_log(tmp_path: Path) -> None:
    assets = tmp_path / "assets"
    assets.mkdir()
    program(assets / "etcd", "exec sleep 60")
    program(assets / "kube-apiserver", "echo unknown flag >&2; exit 3")
    program(assets / "kube-controller-manager", "exec sleep 60")
    plane = ControlPlane(assets, tmp_path / "data")
    with pytest.raises(ControlPlaneError) as caught:
        await plane.__aenter__()
    assert str(caught.value).startswith("kube-apiserver ended with exit code 3;")
    assert str(caught.value).endswith("unknown flag")
    plane.check()  # nothing is left to have died: all of it was stopped


def test_what_is_secret_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    for name in ("etcd", "kube-apiserver", "kube-controller-manager"):
        program(tmp_path / name, "true")
    plane = ControlPlane(tmp_path, tmp_path / "data")
    readable = {path.name for path in plane.directory.iterdir() if path.stat().st_mode & 0o077}
    assert readable == {"ca.crt"}
