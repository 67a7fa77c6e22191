"""What goes into the images: lock files with every version and hash (`make lock`, which asks an index), and of each an
SBOM (`make sbom`).

torch is left to its own layer of the trainer's image: which build of it is installed is the image's variant.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
HEAD = "# Made by tools/lock.py from pyproject.toml and constraints.txt: `make lock`.\n"
BUILD = "setuptools\nwheel\npackaging\nhatchling\n"
"""What sdists among the trainer's dependencies are built with."""
OPTIONS = (
    *("--quiet", "--generate-hashes", "--no-annotate", "--no-header", "--allow-unsafe", "--strip-extras"),
    *("--no-emit-index-url", "--no-emit-trusted-host", "--no-emit-find-links", "--no-emit-options"),
    *("--constraint", "constraints.txt"),
)
TORCH = "torch==2.13.0\n"
IMAGES = {
    "operator": ("operator/requirements.txt",),
    "trainer": ("trainer_image/requirements-build.txt", "trainer_image/requirements.txt"),
}
SERIALS = uuid.UUID("5c2f8c5e-7d0f-5b0e-9a53-2f6f0e0c7a11")
"""Of the serial numbers, each of which is made of what its SBOM lists."""


def compiled(*sources: str) -> str:
    """The lock of these sources."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "requirements.txt"
        command = [BIN / "pip-compile", *OPTIONS, "--output-file", output, *sources]
        # deepspeed's metadata tells of its CUDA operators otherwise, which need a compiler.
        subprocess.run(command, cwd=ROOT, env=os.environ | {"DS_BUILD_OPS": "0"}, check=True)
        return output.read_text()


def entries(text: str) -> list[str]:
    """`name==version` with its hashes, one text each."""
    found: list[str] = []
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            found[-1] += f"{line}\n"
        elif line and not line.startswith(("#", "-")):
            found.append(f"{line}\n")
    return found


def sbom(image: str, entries: list[str]) -> str:
    """CycloneDX 1.6, the same for the same entries: each a `name==version` with the hashes of its files."""
    components = [_component(entry) for entry in entries]
    bom = Bom(components=components, serial_number=uuid.uuid5(SERIALS, "".join(sorted(entries))))
    bom.metadata.timestamp = None  # or no two would be the same
    root = Component(name=f"finetune-{image}", type=ComponentType.CONTAINER, bom_ref="image")
    bom.metadata.component = root
    bom.register_dependency(root, components)
    return json.dumps(json.loads(JsonV1Dot6(bom).output_as_string()), indent=2, sort_keys=True) + "\n"


def _component(entry: str) -> Component:
    found = re.match(r"(\S+)==(\S+)", entry)
    assert found, entry
    purl = PackageURL("pypi", name=found[1], version=found[2])
    # One version is many files, of which an installation takes one.
    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=text) for text in re.findall(r"--hash=sha256:(\S+)", entry)]
    files = ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(purl.to_string()), hashes=hashes)
    return Component(
        name=found[1],
        version=found[2],
        type=ComponentType.LIBRARY,
        bom_ref=purl.to_string(),
        purl=purl,
        external_references=[files] if hashes else [],
    )


def write_sbom(image: str, target: Path) -> None:
    """Of all entries of the image's locks."""
    every = dict.fromkeys(entry for lock in IMAGES[image] for entry in entries((ROOT / lock).read_text()))
    if image == "trainer":
        every[TORCH] = None
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(sbom(image, list(every)))


def write_locks() -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".in") as build:
        build.write(BUILD)
        build.flush()
        locks = {
            "operator/requirements.txt": compiled("--all-build-deps", "pyproject.toml"),
            "trainer_image/requirements-build.txt": compiled(build.name),
            "trainer_image/requirements.txt": compiled("--extra", "trainer", "pyproject.toml"),
        }
    for path, text in locks.items():
        kept = [entry for entry in entries(text) if not entry.startswith("torch==")]
        (ROOT / path).write_text(HEAD + "".join(kept))


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            write_locks()
        case ["--sbom", folder]:
            for name in IMAGES:
                write_sbom(name, Path(folder) / f"{name}.cdx.json")
        case _:
            sys.exit("usage: lock.py [--sbom FOLDER]")
