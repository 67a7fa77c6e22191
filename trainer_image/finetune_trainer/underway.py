"""Whether a process of this pod may still be storing a checkpoint: a lock that the kernel gives back when it ends."""

import contextlib
import fcntl
from collections.abc import Iterator

from finetune_trainer.workdir import WorkDir


@contextlib.contextmanager
def locked(work: WorkDir) -> Iterator[int]:
    """The lock's descriptor, for the uploader to inherit."""
    work.root.mkdir(parents=True, exist_ok=True)
    with work.uploader_lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield file.fileno()


def at_work(work: WorkDir) -> bool:
    """Whether an uploader of this pod has not ended: there may be something that it stores."""
    try:
        with work.uploader_lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
