"""The threat model names tests that are there, and every attempt has one."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text()
ROWS = [line for line in TEXT.split("## What is defended")[1].split("\n## ")[0].splitlines() if "| `" in line]


def test_every_attempt_names_tests_that_exist() -> None:
    assert len(ROWS) > 15
    for row in ROWS:
        named = re.findall(r"`(tests/[\w/]+\.py)`", row)
        assert named, row
        assert [path for path in named if not (ROOT / path).is_file()] == []
        for path in named:
            assert "def test_" in (ROOT / path).read_text()


def test_it_says_who_what_and_what_not() -> None:
    headings = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    assert headings == [
        "Assets",
        "Actors",
        "What is defended",
        "Without ValidatingAdmissionPolicies",
        "What is not",
    ]
