"""The launcher with real processes: who failed first, what a signal does, what the last word says."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from finetune_api.failures import EXIT_CODES, FineTuneError, Reason
from finetune_trainer.launch import resolve
from finetune_trainer.supervise import Supervisor
from support.launching import alive, kill, launched


def test_ranks_are_told_where_they_are_and_success_carries_rank_0s_result(tmp_path: Path) -> None:
    rank = """
import json
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT".split()
print(json.dumps({name: os.environ[name] for name in names}))
if rank == 0:
    result = {"uri": "s3://bucket/out/x", "manifestSHA256": "a" * 64, "sizeBytes": 9, "metrics": {"evalLoss": 1.5}}
    say(step=7, result=result)
"""
    with launched(tmp_path, rank) as launch:
        message = launch.wait()
    assert launch.process.returncode == 0
    assert message.reason is None
    assert message.step == 7
    assert message.result is not None
    assert message.result.metrics == {"evalLoss": 1.5}
    assert message.node == "node-1"
    lines = launch.output.splitlines()
    first = json.loads(next(line for line in lines if line.startswith('{"RANK"')))
    assert first == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    second = next(line for line in lines if line.startswith("[rank 1] {"))
    assert json.loads(second.removeprefix("[rank 1] "))["RANK"] == "1"


def test_the_second_pod_counts_its_ranks_on_and_has_no_result(tmp_path: Path) -> None:
    env = {"FINETUNE_WORKER_INDEX": "1", "FINETUNE_MASTER_ADDR": "localhost"}
    with launched(tmp_path, 'print("I am", rank, os.environ["WORLD_SIZE"])\n', workers=2, env=env) as launch:
        message = launch.wait()
    assert (launch.process.returncode, message.result) == (0, None)
    assert "[rank 2] I am 2 4" in launch.output
    assert "[rank 3] I am 3 4" in launch.output


MOVING = """
from finetune_trainer.traffic import Traffic
traffic = Traffic.from_env()
traffic.read(1000 if rank < 0 else 10)
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_last_word_has_what_all_processes_moved_the_killed_ones_too(tmp_path: Path) -> None:
    with launched(tmp_path, MOVING, pull=MOVING) as launch:
        message = launch.wait()
    assert message.reason == Reason.RANK_FAILED
    assert (message.read_bytes, message.written_bytes) == (1020, 0)


STAGES = [{"name": "sft"}, {"name": "dpo"}, {"name": "more"}]
SAYING = """
stage = os.environ["FINETUNE_STAGE"]
print(f"stage {stage} of rank {rank} at {os.environ['MASTER_PORT']} {os.getpid()}")
if rank == 0:
    say(step=10 + int(stage))
"""


def test_stages_run_one_after_the_other_each_in_processes_of_its_own(tmp_path: Path) -> None:
    with launched(tmp_path, SAYING, stages=STAGES) as launch:
        message = launch.wait()
    assert (message.reason, message.step) == (None, 12)
    said = [line.removeprefix("[rank 1] ").split() for line in launch.output.splitlines() if "of rank" in line]
    places = [(stage, rank, port) for _, stage, _, _, rank, _, port, _ in said]
    assert [stage for stage, _, _ in places] == ["0", "0", "1", "1", "2", "2"]
    assert set(places) == {(str(s), str(r), str(29500 + s)) for s in range(3) for r in range(2)}
    assert len({pid for *_, pid in said}) == 6


def test_stages_that_are_finished_are_left_out(tmp_path: Path) -> None:
    with launched(tmp_path, SAYING, pull='(work / "finished").write_text("2")\n', stages=STAGES) as launch:
        assert launch.wait().step == 12
    assert {line.split()[-7] for line in launch.output.splitlines() if "of rank" in line} == {"2"}


def test_a_stage_that_fails_is_the_last_and_says_nothing_of_the_one_before(tmp_path: Path) -> None:
    rank = SAYING + "if stage == '1': os._exit(9)\n"
    rank = rank.replace("    say(", "    if stage == '0': say(")
    with launched(tmp_path, rank, stages=STAGES) as launch:
        message = launch.wait()
    assert (message.reason, message.step) == (Reason.RANK_FAILED, None)
    assert "ended with exit code 9" in message.message
    assert "stage 2" not in launch.output


def test_the_first_cause_is_reported_though_a_victim_exits_first(tmp_path: Path) -> None:
    rank = """
if rank == 1:
    say(reason="OutOfMemory", message="CUDA out of memory at step 12", step=12, exit_code=72)
    done("failed")
    await_file("victim"); sys.exit(72)
await_file("failed")
say(reason="RankFailed", message="RuntimeError: Connection closed by peer [127.0.0.1]:4242", exit_code=76)
done("victim"); sys.exit(76)
"""
    with launched(tmp_path, rank) as launch:
        message = launch.wait()
    assert launch.process.returncode == EXIT_CODES[Reason.OUT_OF_MEMORY]
    assert (message.reason, message.rank, message.step, message.exit_code) == (Reason.OUT_OF_MEMORY, 1, 12, 72)


def test_a_victim_lets_the_pod_of_the_cause_end_first(tmp_path: Path) -> None:
    rank = """
say(reason="RankFailed", message="RuntimeError: Connection closed by peer [127.0.0.1]:4242", exit_code=76)
(work / "pid").write_text(str(os.getpid())); sys.exit(76)
"""
    with launched(tmp_path, rank, processes=1, workers=2) as launch:
        launch.until_file("pid")
        launch.until(lambda: not alive(launch.pid("pid")))
        with pytest.raises(subprocess.TimeoutExpired):
            launch.process.wait(0.5)
        # The Job has failed by the other pod: this one is deleted.
        launch.process.send_signal(signal.SIGTERM)
        message = launch.wait(timeout=5)
    assert launch.process.returncode == EXIT_CODES[Reason.RANK_FAILED]
    assert message.victim


def test_a_rank_that_ignores_the_failure_of_another_is_killed_after_the_grace(tmp_path: Path) -> None:
    rank = """
if rank == 1:
    print("ValueError: no such thing", flush=True); sys.exit(3)
(work / "pid").write_text(str(os.getpid()))
time.sleep(600)
"""
    with launched(tmp_path, rank, grace=0.5) as launch:
        message = launch.wait()
        assert not alive(launch.pid("pid"))
    assert launch.process.returncode == EXIT_CODES[Reason.RANK_FAILED]
    assert message.message == "rank 1 ended with exit code 3: ValueError: no such thing"
    assert (message.rank, message.exit_code) == (1, 3)


def test_a_killed_rank_is_named_with_its_signal_and_its_children_end_too(tmp_path: Path) -> None:
    rank = """
import subprocess
if rank == 1:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (work / "child").write_text(str(child.pid))
    (work / "pid.tmp").write_text(str(os.getpid())); (work / "pid.tmp").rename(work / "pid")
time.sleep(600)
"""
    with launched(tmp_path, rank, grace=0.2) as launch:
        launch.until_file("pid")
        kill(launch.pid("pid"))
        message = launch.wait()
        assert not alive(launch.pid("child"))
    assert launch.process.returncode == EXIT_CODES[Reason.RANK_FAILED]
    assert (message.rank, message.exit_code) == (1, -9)
    assert message.message == "rank 1 was killed by signal 9 (SIGKILL)"


def test_a_rank_killed_for_memory_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "cgroup" / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    rank = f"""
Path({str(tmp_path / "cgroup" / "memory.events")!r}).write_text("low 0\\noom 4\\noom_kill 3\\n")
os.kill(os.getpid(), signal.SIGKILL)
"""
    with launched(tmp_path, rank, processes=1) as launch:
        message = launch.wait()
    assert launch.process.returncode == EXIT_CODES[Reason.HOST_OUT_OF_MEMORY]
    assert "memory limit" in message.message


def test_sigterm_reaches_all_ranks_at_once_and_they_save(tmp_path: Path) -> None:
    rank = """
def stop(number, frame):
    done(f"stopped-{rank}")
    await_file(f"stopped-{1 - rank}")  # a collective save: no rank ends before the other was told
    say(reason="Preempted", message="saved step 40", step=40, exit_code=77)
    os._exit(77)
signal.signal(signal.SIGTERM, stop)
done(f"ready-{rank}")
while True: time.sleep(0.05)
"""
    with launched(tmp_path, rank) as launch:
        launch.until_file("ready-0", "ready-1")
        launch.process.send_signal(signal.SIGTERM)
        message = launch.wait()
    assert launch.process.returncode == EXIT_CODES[Reason.PREEMPTED]
    assert (message.reason, message.step, message.message) == (Reason.PREEMPTED, 40, "saved step 40")


def test_ranks_that_do_not_end_are_killed_before_the_pods_grace_is_over(tmp_path: Path) -> None:
    rank = "signal.signal(signal.SIGTERM, signal.SIG_IGN); done(f'ready-{rank}')\nwhile True: time.sleep(1)\n"
    with launched(tmp_path, rank, grace_seconds=2) as launch:
        launch.until_file("ready-0", "ready-1")
        started = time.monotonic()
        launch.process.send_signal(signal.SIGTERM)
        message = launch.wait()
        assert time.monotonic() - started < 2
    assert launch.process.returncode == EXIT_CODES[Reason.PREEMPTED]
    assert "ranks 0, 1 did not end within the grace period" in message.message


def test_a_signal_while_pulling_ends_the_pod_at_once(tmp_path: Path) -> None:
    with launched(tmp_path, "done('trained')\n", pull="done('pulling'); time.sleep(600)\n") as launch:
        launch.until_file("pulling")
        launch.process.send_signal(signal.SIGTERM)
        message = launch.wait()
    assert launch.process.returncode == EXIT_CODES[Reason.PREEMPTED]
    assert "before training began" in message.message
    assert not (tmp_path / "work" / "trained").exists()


def test_a_failed_pull_says_why_and_starts_no_rank(tmp_path: Path) -> None:
    pull = """
from finetune_api.failures import FineTuneError, Reason
from finetune_trainer.outcome import guarded
def main(): raise FineTuneError(Reason.STORAGE_DENIED, "cannot read s3://bucket/x: no (AccessDenied)")
sys.exit(guarded(main, work / "outcomes" / "pull.json"))
"""
    with launched(tmp_path, "done('trained')\n", pull=pull) as launch:
        message = launch.wait()
    assert launch.process.returncode == EXIT_CODES[Reason.STORAGE_DENIED]
    assert (message.reason, message.rank) == (Reason.STORAGE_DENIED, None)
    assert message.message == "cannot read s3://bucket/x: no (AccessDenied)"
    assert not (tmp_path / "work" / "trained").exists()


def test_a_checkpoint_on_its_way_is_waited_for_though_its_rank_is_gone(tmp_path: Path) -> None:
    rank = """
from finetune_trainer.underway import locked
from finetune_trainer.workdir import WorkDir
import subprocess
program = f"touch {work}/storing; while [ ! -e {work}/go ]; do sleep 0.05; done; sleep 0.5; touch {work}/stored"
with locked(WorkDir.from_env()) as lock:
    subprocess.Popen(["sh", "-c", program], pass_fds=[lock], process_group=0)
await_file("storing"); os.kill(os.getpid(), 9)
"""
    with launched(tmp_path, rank, processes=1) as launch:
        launch.until_file("storing")
        (tmp_path / "work" / "go").touch()
        message = launch.wait()
    assert (tmp_path / "work" / "stored").exists()
    assert (message.reason, message.exit_code) == (Reason.RANK_FAILED, -signal.SIGKILL)


def test_orphans_are_reaped(tmp_path: Path) -> None:
    rank = """
import subprocess
# The shell ends at once; its child becomes an orphan in a session of its own, and ends a little later.
subprocess.run(["setsid", "-f", "sh", "-c", f"echo $$ > {work}/orphan.tmp; mv {work}/orphan.tmp {work}/orphan"])
await_file("enough")
"""
    with launched(tmp_path, rank, processes=1) as launch:
        launch.until_file("orphan")
        launch.until(lambda: not Path(f"/proc/{launch.pid('orphan')}").exists())
        (tmp_path / "work" / "enough").touch()
        assert launch.wait().reason is None


def test_a_signal_while_pod_0_is_waited_for_ends_the_pod(tmp_path: Path) -> None:
    env = {"FINETUNE_WORKER_INDEX": "1", "FINETUNE_MASTER_ADDR": "bot-0-0.bot-0.invalid"}
    pull = "done('pulled')\n"
    with launched(tmp_path, "done('trained')\n", pull=pull, workers=2, env=env) as launch:
        launch.until_file("pulled")
        launch.process.send_signal(signal.SIGTERM)
        assert launch.wait().reason == Reason.PREEMPTED
    assert not (tmp_path / "work" / "trained").exists()


def test_a_name_that_never_resolves_is_told() -> None:
    with Supervisor() as supervisor, pytest.raises(FineTuneError, match=r"pod 0's name x\.invalid cannot be resolved"):
        resolve(supervisor, "x.invalid", limit=0)


def test_a_long_message_is_cut_to_what_kubernetes_keeps(tmp_path: Path) -> None:
    rank = 'say(reason="Diverged", message="ü" * 2048, exit_code=74); sys.exit(74)\n'
    with launched(tmp_path, rank, processes=1) as launch:
        message = launch.wait()
    assert launch.process.returncode == EXIT_CODES[Reason.DIVERGED]
    assert message.message.endswith("…")


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with launched(tmp_path, "", env={"FINETUNE_RUN_CONFIG": str(tmp_path / "none.json")}) as launch:
        message = launch.wait()
    assert launch.process.returncode == EXIT_CODES[Reason.INVALID_SPEC]
    assert "none.json cannot be read" in message.message
