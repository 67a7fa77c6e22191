"""`python -m finetune_trainer nettest`: one pod of the test of a cluster's NetworkPolicies, which finetune_api.nettest
describes. $FINETUNE_WORKER_INDEX says which; it needs no job, no credentials and no store."""

import datetime
import os
import socket
import sys
import time
from pathlib import Path

from finetune_api.nettest import LISTENER, Reach

PAUSE = 1.0


def main() -> int:
    index, port = int(os.environ["FINETUNE_WORKER_INDEX"]), int(os.environ["FINETUNE_MASTER_PORT"])
    seconds = float(os.environ["FINETUNE_NETTEST_SECONDS"])
    if index == LISTENER:
        # Longer than the others try: they may start later.
        listen(os.environ["FINETUNE_POD_IP"], port, 1.5 * seconds)
        return 0
    found = attempt(os.environ["FINETUNE_MASTER_ADDR"], port, seconds)
    Path(os.environ["FINETUNE_TERMINATION_LOG"]).write_text(found.model_dump_json(by_alias=True, exclude_none=True))
    return 0


def listen(address: str, port: int, seconds: float) -> None:
    """Takes connections and says nothing."""
    deadline = time.monotonic() + seconds
    with socket.create_server((address, port), family=_family(address)) as server:
        while (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                server.accept()[0].close()
            except TimeoutError:
                return


def attempt(host: str, port: int, seconds: float) -> Reach:
    """Tries all the time, whether it succeeds or not: a policy may take effect late, and end early."""
    started, deadline, reached = _now(), time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=min(3.0, seconds)).close()
            reached = reached or _now()
        except OSError:
            # Not yet, or never: which of them is what the test is about.
            pass
        time.sleep(min(PAUSE, seconds / 10))
    return Reach(started=started, ended=_now(), reached=reached)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


if __name__ == "__main__":
    sys.exit(main())
