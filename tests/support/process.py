"""Programs that a test runs to their end."""

import asyncio


async def run(*command: str, timeout: float = 30.0) -> str:
    """What the command printed to its standard output; AssertionError with its standard error where it failed."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), timeout)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, f"{' '.join(command)} exited with {process.returncode}: {err.decode()}"
    return out.decode()
