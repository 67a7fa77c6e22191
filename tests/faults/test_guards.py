"""The suite can fail: with any one of the guards gone, the tests that are about it do."""

import asyncio
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from faults import guards, guards_s3
from faults.guards import Guard
from support.process import run

if TYPE_CHECKING:
    from support.tally import Tally

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
GUARDS = (*guards.GUARDS, *guards_s3.GUARDS)
TESTS_FAILED = 1
"""pytest's exit code; others mean that it could not test."""


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_the_list_is_up_to_date(guard: Guard) -> None:
    assert (ROOT / guard.file).read_text().count(guard.text) == 1


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
async def test_without_it_the_suite_turns_red(tally: "Tally", whole: bool, guard: Guard, tmp_path: Path) -> None:
    if not whole and guard not in GUARDS[10::5]:
        pytest.skip("in the long form")
    tally.count("guards removed, and the suite turned red", {guard.name: await green(guard, tmp_path)})


async def green(guard: Guard, folder: Path) -> str:
    """Why the suite does not tell that this guard is gone; empty: it does."""
    source = ROOT / guard.file
    package = source.relative_to(ROOT).parts[:2]
    copy = folder / package[0]
    shutil.copytree(ROOT.joinpath(*package), copy / package[1], ignore=shutil.ignore_patterns("__pycache__"))
    changed = folder / guard.file
    changed.write_text(changed.read_text().replace(guard.text, guard.without))
    environment = os.environ | {"PYTHONPATH": str(copy)}
    module = guard.file.removeprefix(f"{package[0]}/").removesuffix(".py").replace("/", ".")
    code = f"import {module} as found; assert found.__file__.startswith({str(copy)!r}), found.__file__"
    await run("env", f"PYTHONPATH={copy}", sys.executable, "-c", code, timeout=120)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"),
        *(f"--basetemp={folder / 'tests'}", "--tb=line", *guard.tests),
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        told, _ = await asyncio.wait_for(process.communicate(), 500)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == TESTS_FAILED:
        return ""
    return f"pytest ended with {process.returncode}:\n{told.decode(errors='replace')[-2000:]}"
