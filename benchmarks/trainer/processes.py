"""What can be seen of a contender from outside."""

import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gpu_memory(device: str) -> Iterator[list[float]]:
    """Megabytes in use on the first GPU, at most, beyond what was in use before: asked of the driver now and then."""
    most, done = [0.0], threading.Event()

    def used() -> float:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
        return float(subprocess.run(query, check=True, capture_output=True, text=True).stdout)

    def watch(before: float) -> None:
        while not done.wait(0.3):
            most[0] = max(most[0], used() - before)

    watcher = threading.Thread(target=watch, args=(used(),)) if device == "CUDA" else None
    if watcher:
        watcher.start()
    try:
        yield most
    finally:
        done.set()
        if watcher:
            watcher.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
