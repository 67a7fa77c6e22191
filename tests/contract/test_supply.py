"""What goes into the images: every dependency at one version, every file by its hash, all of it in an SBOM."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCKS = ("operator/requirements.txt", "trainer_image/requirements-build.txt", "trainer_image/requirements.txt")


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "tools" / "lock.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOCK = tool()


def locked(path: str) -> dict[str, str]:
    """Version by name."""
    found = {}
    for entry in LOCK.entries((ROOT / path).read_text()):
        name, version = re.match(r"(\S+)==(\S+)", entry).groups()  # type: ignore[union-attr]
        assert canonicalize_name(name) not in found, "twice"
        found[canonicalize_name(name)] = version
    return found


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in lines if "==" in line)}


def declared(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *(r for extra in extras for r in project["optional-dependencies"][extra])]
    return [Requirement(text) for text in every]


@pytest.mark.parametrize("path", LOCKS)
def test_every_file_is_known_by_its_hash_and_every_version_is_the_pinned_one(path: str) -> None:
    entries = LOCK.entries((ROOT / path).read_text())
    assert len(entries) > 5
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry.splitlines()[0]
    pins = pinned()
    # Of what only other platforms, or building, needs there may be no pin.
    differ = {
        name: (version, pins[name]) for name, version in locked(path).items() if pins.get(name, version) != version
    }
    assert differ == {}


@pytest.mark.parametrize(("paths", "extras"), [(LOCKS[:1], ()), (LOCKS[1:], ("trainer",))], ids=["operator", "trainer"])
def test_what_is_declared_is_locked(paths: tuple[str, ...], extras: tuple[str, ...]) -> None:
    known: dict[str, str] = {}
    for path in paths:
        known |= locked(path)
    for requirement in declared(*extras):
        name = canonicalize_name(requirement.name)
        if name != "torch":
            assert Version(known[name]) in requirement.specifier, requirement


def test_the_images_install_nothing_else() -> None:
    for path, files in {"operator/Dockerfile": LOCKS[:1], "trainer_image/Dockerfile": LOCKS[1:]}.items():
        text = (ROOT / path).read_text().replace("\\\n", " ")
        installs = re.findall(r"pip install[^&\n]*", text)
        assert len(installs) >= 2
        for install in installs:
            hashed = "--require-hashes" in install and any(file in install for file in files)
            torch = re.search(r"\btorch==", install)
            own = "--no-index --no-deps" in install
            assert hashed or torch or own, install
        for file in files:
            assert f"-r {file}" in text


@pytest.mark.parametrize("image", ["operator", "trainer"])
def test_the_sbom_names_all_of_it(image: str, tmp_path: Path) -> None:
    target = tmp_path / "sbom" / f"{image}.cdx.json"
    LOCK.write_sbom(image, target)
    sbom = json.loads(target.read_text())
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    wanted: dict[str, str] = {}
    for path in LOCK.IMAGES[image]:
        wanted |= locked(path)
    if image == "trainer":
        wanted["torch"] = LOCK.TORCH.strip().partition("==")[2]
    assert {canonicalize_name(c["name"]): c["version"] for c in sbom["components"]} == wanted
    hashes = [c for c in sbom["components"] if c.get("externalReferences")]
    assert len(hashes) >= len(wanted) - 1
    first = target.read_bytes()
    LOCK.write_sbom(image, target)
    assert target.read_bytes() == first
