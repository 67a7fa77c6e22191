"""Who hangs: deadlines by phase, which of several is to blame, and the launcher with processes that stop."""

import os
import signal
import time
from pathlib import Path

import pytest

from finetune_api.failures import EXIT_CODES, Reason
from finetune_trainer.hangs import Deadlines, waiting
from finetune_trainer.heartbeat import Beat
from support.launching import alive, launched

DEADLINES = Deadlines(pulling=1, loading=2, first_step=3, step_factor=10, step_least=4, evaluating=5, saving=6)


@pytest.mark.parametrize(
    ("beat", "seconds"),
    [
        ({"phase": "Pulling"}, 1),
        ({"phase": "Loading"}, 2),
        ({"phase": "Training"}, 3),
        ({"phase": "Training", "pace": 0.1}, 4),
        ({"phase": "Training", "pace": 2.0}, 20),
        ({"phase": "Evaluating", "pace": 2.0}, 5),
        ({"phase": "Saving"}, 6),
        ({"phase": "Publishing"}, 3600),
    ],
)
def test_each_phase_has_its_deadline(beat: dict[str, object], seconds: float) -> None:
    assert DEADLINES.of(Beat.model_validate({"pid": 1, "progress": 0, "alive": 0} | beat)) == seconds


WAITS = """Thread 0x00007f (most recent call first):
  File "/x/threading.py", line 355 in wait

Current thread 0x00007e (most recent call first):
  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 3005 in all_reduce
  File "/x/site-packages/torch/distributed/c10d_logger.py", line 81 in wrapper
  File "/x/finetune_trainer/distributed.py", line 50 in any
"""
READS = """Thread 0x00007f (most recent call first):
  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 3005 in all_reduce

Current thread 0x00007e (most recent call first):
  File "/x/finetune_trainer/batches.py", line 120 in collate
  File "/x/finetune_trainer/batches.py", line 100 in __iter__
"""
BACKWARD = """Current thread 0x00007e (most recent call first):
  File "/x/site-packages/torch/autograd/graph.py", line 865 in _engine_run_backward
  File "/x/site-packages/torch/autograd/__init__.py", line 324 in backward
"""


def test_who_waits_for_others_is_told_by_its_main_thread() -> None:
    assert waiting(WAITS)
    assert waiting(BACKWARD)
    assert not waiting(READS)
    assert not waiting("")


BEATING = """
from finetune_trainer import heartbeat
from finetune_trainer.workdir import WorkDir
heartbeat.start(WorkDir.from_env().heartbeat(f"rank-{rank}" if rank >= 0 else "pull"))
(work / f"pid-{rank}").write_text(str(os.getpid()))
def learn(steps):
    heartbeat.enter("Training")
    for step in range(1, steps + 1):
        heartbeat.begin(); time.sleep(0.01); heartbeat.step(step)
    done(f"learned-{rank}")
"""
SHORT = {"step_least": 2.0, "step_factor": 2.0, "loading": 60.0}


def test_a_rank_that_is_stopped_is_named_with_its_phase_and_node(tmp_path: Path) -> None:
    """Its peer waits for it, and is not to blame."""
    rank = BEATING + """
# What the stack of a rank that waits looks like.
exec(compile("import time\\ndef all_reduce(): time.sleep(600)", "/x/torch/distributed/c10d.py", "exec"))
learn(5)
if rank == 1: time.sleep(600)
all_reduce()
"""  # fmt: skip
    with launched(tmp_path, rank, deadlines=SHORT) as launch:
        launch.until_file("learned-0", "learned-1")
        pids = [launch.pid(f"pid-{rank}") for rank in (0, 1)]
        os.kill(pids[1], signal.SIGSTOP)
        message = launch.wait(30)
        assert not any(alive(pid) for pid in pids)
    assert launch.process.returncode == EXIT_CODES[Reason.HUNG]
    assert (message.reason, message.rank, message.node, message.step) == (Reason.HUNG, 1, "node-1", 5)
    assert message.message.startswith("rank 1 on node node-1 has not got on for ")
    assert "in phase Training after step 5; allowed are 2 s; it does not answer (process state T)" in message.message
    assert not message.victim
    assert "in all_reduce" in launch.output
    assert "it does not answer" in launch.output


def test_a_rank_that_does_something_else_is_named_before_one_that_waits(tmp_path: Path) -> None:
    rank = BEATING + """
exec(compile("import time\\ndef all_reduce(): time.sleep(600)", "/x/torch/distributed/c10d.py", "exec"))
def stuck_in_a_read(): time.sleep(600)
if rank == 1: learn(5); stuck_in_a_read()
learn(4); all_reduce()
"""  # fmt: skip
    with launched(tmp_path, rank, deadlines=SHORT) as launch:
        message = launch.wait(30)
    assert (message.reason, message.rank, message.step) == (Reason.HUNG, 1, 5)
    assert "does not answer" not in message.message
    assert "in stuck_in_a_read" in launch.output


def test_a_pod_whose_ranks_only_wait_lets_the_other_speak_first(tmp_path: Path) -> None:
    rank = BEATING + """
exec(compile("import time\\ndef all_reduce(): time.sleep(600)", "/x/torch/distributed/c10d.py", "exec"))
learn(3); all_reduce()
"""  # fmt: skip
    with launched(tmp_path, rank, deadlines=SHORT, processes=1, workers=2) as launch:
        launch.until(lambda: not alive(launch.pid("pid-0")) if (tmp_path / "work" / "pid-0").exists() else False)
        launch.process.send_signal(signal.SIGTERM)
        message = launch.wait(30)
    assert (message.reason, message.rank, message.victim) == (Reason.HUNG, 0, True)
    assert message.message.endswith("it waits for other ranks")


def test_a_download_that_stands_still_is_told(tmp_path: Path) -> None:
    pull = BEATING + "heartbeat.enter('Pulling'); done('pulling'); time.sleep(600)\n"
    with launched(tmp_path, "done('trained')\n", pull=pull, deadlines={"pulling": 1.5}) as launch:
        message = launch.wait(30)
    assert (message.reason, message.rank) == (Reason.HUNG, None)
    assert message.message.startswith("the download of the base model and the data on node node-1 has not got on")
    assert not (tmp_path / "work" / "trained").exists()


def test_who_gets_on_however_slowly_is_left_alone(tmp_path: Path) -> None:
    rank = BEATING + """
learn(3)
deadline = time.monotonic() + 5
while time.monotonic() < deadline: heartbeat.beat(); time.sleep(0.3)
"""  # fmt: skip
    with launched(tmp_path, rank, deadlines=SHORT) as launch:
        assert launch.wait(30).reason is None


def test_a_rank_that_never_says_anything_is_loading(tmp_path: Path) -> None:
    started = time.monotonic()
    with launched(tmp_path, "time.sleep(600)\n", processes=1, deadlines={"loading": 2.0}) as launch:
        message = launch.wait(30)
    assert time.monotonic() - started >= 2
    assert (message.reason, message.rank) == (Reason.HUNG, 0)
    assert "in phase Loading; allowed are 2 s; it does not answer" in message.message
