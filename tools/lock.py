"""What goes into the images: lock files with every version and hash (`make lock`, which asks an index), and of each an
SBOM (`make sbom`).

torch is left to its own layer of the trainer's image: which build of it is installed is the image's variant.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

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


def write_sbom(image: str, target: Path) -> None:
    """CycloneDX, of all entries of the image's locks; the same for the same locks."""
    every = dict.fromkeys(entry for lock in IMAGES[image] for entry in entries((ROOT / lock).read_text()))
    if image == "trainer":
        every[TORCH] = None
    target.parent.mkdir(parents=True, exist_ok=True)
    options = ("--output-reproducible", "--spec-version", "1.6", "--output-format", "JSON", "--output-file", target)
    command = [BIN / "cyclonedx-py", "requirements", *options, "--pyproject", "pyproject.toml", "-"]
    subprocess.run(command, cwd=ROOT, input="".join(sorted(every)), text=True, check=True)


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
