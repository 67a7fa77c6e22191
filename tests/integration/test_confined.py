"""The memory limit that floods are tried under does limit, and its peak is the process's own."""

import asyncio
import sys

from support.confined import Confinement, chart_limit_mib, confined, resident_peak_mib

ALLOCATE = "import sys; held = b'x' * (int(sys.argv[1]) * 2**20); print(len(held), flush=True); sys.stdin.read()"


async def _allocate(place: Confinement, mebibytes: int) -> asyncio.subprocess.Process:
    command = place.command(sys.executable, "-c", ALLOCATE, str(mebibytes))
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)


async def test_what_fits_lives_and_its_peak_is_told() -> None:
    with confined(128) as place:
        process = await _allocate(place, 48)
        assert process.stdout
        assert int(await process.stdout.readline()) == 48 * 2**20
        assert 48 < place.peak_mib(process.pid) < 128
        assert 48 < resident_peak_mib(process.pid) < 128
        await process.communicate(b"")
        assert (process.returncode, place.oom_killed()) == (0, False)


async def test_what_does_not_fit_is_killed_and_the_group_removed() -> None:
    with confined(64) as place:
        process = await _allocate(place, 200)
        await process.communicate(b"")
        assert (process.returncode, place.oom_killed()) == (-9, True)
    assert not place.group.exists()


def test_the_limit_is_the_charts() -> None:
    assert chart_limit_mib() >= 512
