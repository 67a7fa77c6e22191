"""A process that leaves nothing behind, however it or its starter ends. Linux only, as the node is."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from finetune_sandbox import process

T = TypeVar("T")
HAS_GROUPS = Path("/proc/self/autogroup").exists()
SLEEP = "import time; time.sleep(1000)"
# Prints its own process id, then that of a grandchild which left the session and whose parent is gone.
FAMILY = """
import os, subprocess, sys, time
script = '''
import subprocess
print(subprocess.Popen(["sleep", "1000"], start_new_session=True).pid, flush=True)
'''
print(os.getpid(), flush=True)
subprocess.run([sys.executable, "-c", script])
"""


def start(tmp_path: Path, script: str) -> process.Process:
    env = process.interpreter_environment()
    return process.start([sys.executable, "-c", script], env=env, cwd=tmp_path, output=tmp_path / "log")


def alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def wait_for(probe: Callable[[], T]) -> T:
    deadline = time.monotonic() + 10
    while not (value := probe()):
        assert time.monotonic() < deadline, "not within 10 s"
        time.sleep(0.01)
    return value


async def eventually(probe: Callable[[], T]) -> T:
    return await asyncio.to_thread(wait_for, probe)


def family(log: Path) -> list[int]:
    words = log.read_text().split() if log.exists() else []
    return [int(word) for word in words] if len(words) == 2 else []


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("print('out')", 0),
        ("raise SystemExit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("import os; os.abort()", -6),
    ],
)
async def test_it_ends_as_its_command_did(tmp_path: Path, script: str, code: int) -> None:
    assert await start(tmp_path, script).wait() == code


async def test_a_program_that_cannot_run_says_so(tmp_path: Path) -> None:
    started = process.start(["/no/such"], env={}, cwd=tmp_path, output=tmp_path / "log")
    assert await started.wait() == 126
    assert "cannot run /no/such" in (tmp_path / "log").read_text()


async def test_what_the_command_left_running_is_killed_when_it_ends(tmp_path: Path) -> None:
    started = start(tmp_path, FAMILY)
    assert await started.wait() == 0
    main, grandchild = family(tmp_path / "log")
    assert not alive(main)
    assert not alive(grandchild)


async def test_terminate_reaches_the_command_alone_and_kill_all(tmp_path: Path) -> None:
    started = start(
        tmp_path, f"import signal; signal.signal(signal.SIGTERM, lambda *_: print('t', flush=True))\n{FAMILY}{SLEEP}"
    )
    main, grandchild = await eventually(lambda: family(tmp_path / "log"))
    assert started.command_pid() == main
    started.terminate()
    await eventually(lambda: "t" in (tmp_path / "log").read_text())
    assert alive(main)
    assert alive(grandchild)
    started.kill()
    assert await started.wait() == -9
    assert not alive(main)
    assert not alive(grandchild)
    started.kill()  # after the end: nothing to do, and no other process's number is signalled


def test_killing_the_starter_kills_everything(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from finetune_sandbox import process\n"
        "async def main():\n"
        "    env = process.interpreter_environment()\n"
        "    folder = Path(sys.argv[1])\n"
        "    started = process.start([sys.executable, '-c', sys.argv[2]], env=env, cwd=folder, output=folder / 'log')\n"
        "    await started.wait()\n"
        "asyncio.run(main())\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), FAMILY + SLEEP])
    pids = wait_for(lambda: family(tmp_path / "log"))
    assert all(alive(pid) for pid in pids)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    wait_for(lambda: not any(alive(pid) for pid in pids))


async def test_it_gives_way_to_what_started_it(tmp_path: Path) -> None:
    script = "import os; print(os.nice(0))"
    if HAS_GROUPS:
        script += "; print(open('/proc/self/autogroup').read())"
    command = [sys.executable, "-c", script]
    env = process.interpreter_environment()
    own = os.nice(0)
    started = process.start(command, env=env, cwd=tmp_path, output=tmp_path / "log", niceness=5)
    assert await started.wait() == 0
    first, *group = (tmp_path / "log").read_text().splitlines()
    assert int(first) == own + 5
    assert not group or group[0].endswith("nice 5")


def test_the_environment_is_not_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "x")
    monkeypatch.setenv("PYTHONPATH", "/x")
    env = process.interpreter_environment()
    assert set(env) <= {"PATH", "LANG", "LD_LIBRARY_PATH"}
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
