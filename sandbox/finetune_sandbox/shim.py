"""Runs one command as the first process of a "container" and leaves nothing behind.

Started as a file (`python -I -S shim.py PARENT CGROUP NICE COMMAND…`), so it imports only the standard library. It
adopts every orphan below it (a child subreaper), so that when the command ends, or the shim's parent dies, all that the
command started is killed, whatever process group or session it moved to: what a PID namespace does, without privileges.

- SIGTERM goes on to the command alone, as a kubelet signals only PID 1.
- SIGUSR1 kills the command and everything below it.
- SIGHUP is what the kernel sends when the parent dies (PDEATHSIG): the same, then exit.
- The shim ends as the command did: same exit code, or killed by the same signal.

PARENT is the process id of the starter, CGROUP the folder of a cgroup that the command joins, or "-". Linux only.
"""

import ctypes
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def descendants(root: int) -> list[int]:
    """All living processes below `root`, by /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
            children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found.extend(below)
        queue.extend(below)
    return found


def kill_all() -> None:
    """Kills and reaps until this process has no child left; what was forked meanwhile is caught in the next round."""
    while True:
        for pid in descendants(os.getpid()):
            try:  # noqa: SIM105  contextlib would double the time to start
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            os.waitpid(-1, 0)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return


def reap(main: int) -> int | None:
    """Reaps all that ended; the wait status of `main` where it is among them."""
    status = None
    while True:
        try:
            pid, ended = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == main:
            status = ended


def set_niceness(niceness: int) -> None:
    """Where the kernel groups sessions, a process's own niceness counts only within its session: the group's, too."""
    os.nice(niceness)
    try:
        with open("/proc/self/autogroup", "w") as file:
            file.write(str(niceness))
    except OSError:
        return  # this kernel has no groups


def start(cgroup: str, niceness: int, command: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        if cgroup != "-":
            with open(os.path.join(cgroup, "cgroup.procs"), "w") as file:
                file.write(str(os.getpid()))
        set_niceness(niceness)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # the interpreter ignores them, and exec would keep that
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        os.execvpe(command[0], command, os.environ)
    except OSError as error:
        os.write(2, f"cannot run {command[0]}: {error}\n".encode())
    os._exit(126)


def main() -> None:
    parent, cgroup, niceness, command = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
    signal.pthread_sigmask(signal.SIG_SETMASK, SIGNALS)
    prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:
        sys.exit(1)  # the parent died before it was watched
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pid = start(cgroup, niceness, command)
    status = None
    while status is None:
        number = signal.sigwait(SIGNALS)
        if number == signal.SIGTERM:
            os.kill(pid, signal.SIGTERM)  # not yet reaped, so the number is still its own
        elif number == signal.SIGUSR1:
            os.kill(pid, signal.SIGKILL)
        elif number == signal.SIGHUP:
            kill_all()
            sys.exit(1)
        else:
            status = reap(pid)
    kill_all()
    if os.WIFSIGNALED(status):
        ended_by = os.WTERMSIG(status)
        if ended_by != signal.SIGKILL:
            signal.signal(ended_by, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, set())
        os.kill(os.getpid(), ended_by)
    sys.exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
