"""Writes the README's file map from the first sentence of each module's docstring: `python tools/filemap.py`."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "api/finetune_api": "the contract: pure models and arithmetic",
    "operator/finetune_operator": "the controller",
    "trainer_image/finetune_trainer": "what runs in a pod",
    "sandbox/finetune_sandbox": "a cluster in one process",
    "cli/finetune_cli": "the command line",
}
BEGIN, END = "<!-- file map: made by tools/filemap.py -->", "<!-- end of file map -->"


def first_sentence(path: Path) -> str:
    """Of a module's docstring. SystemExit where there is none: every file says what it is."""
    text = ast.get_docstring(ast.parse(path.read_text()))
    if not text:
        raise SystemExit(f"{path.relative_to(ROOT)}: has no docstring; the file map is made of their first sentences")
    paragraph = " ".join(text.split("\n\n")[0].split()).removeprefix("PURE. ").removeprefix("PURE: ")
    # A full stop ends it where a capital letter follows: `python -m x.y` does not.
    return re.split(r"(?<=[.])\s+(?=[A-Z`])", paragraph)[0].rstrip(".:").replace("|", "\\|")


def table(package: str, title: str) -> str:
    files = [
        path for path in sorted((ROOT / package).rglob("*.py")) if path.name != "__init__.py" or path.stat().st_size > 0
    ]
    rows = "\n".join(f"| `{path.relative_to(ROOT / package)}` | {first_sentence(path)} |" for path in files)
    return (
        f"<details><summary><code>{package}/</code>: {title}</summary>\n\n| file | |\n|---|---|\n{rows}\n\n</details>\n"
    )


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    made = "\n".join(table(package, title) for package, title in PACKAGES.items())
    readme.write_text(f"{before}{BEGIN}\n\n{made}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
