"""A confined program: what it says, what kills it, and whose fault that is."""

import os
import signal
import threading
import time

import pytest

from finetune_api.failures import FineTuneError, Reason, TerminationMessage
from finetune_trainer import confined as module
from finetune_trainer.confined import MIB, confined, during, lane, mark

DONE = TerminationMessage(message="done")


def refusal(work: object) -> FineTuneError:
    with pytest.raises(FineTuneError) as caught:
        confined(work)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return caught.value


def fill(size: int) -> list[bytearray]:
    """Takes memory piece by piece, so that it is there."""
    return [bytearray(b"x" * MIB) for _ in range(size // MIB)]


def abort_for_memory(size: int) -> None:
    """What a library does that cannot have its memory: it takes what there is, then ends the process."""
    taken = []
    try:
        for _ in range(size // MIB):
            taken.append(bytearray(b"x" * MIB))
    except MemoryError:
        os.abort()


def test_it_says_what_the_program_says() -> None:
    assert confined(lambda: DONE) == DONE


def test_it_happens_in_another_process() -> None:
    assert confined(lambda: TerminationMessage(message=str(os.getpid()))).message != str(os.getpid())
    assert module._board is None


def test_its_error_keeps_its_reason_and_becomes_one_line() -> None:
    def work() -> TerminationMessage:
        raise FineTuneError(Reason.DATA_LEAKAGE, "a\nb\ud800")

    error = refusal(work)
    assert (error.reason, str(error)) == (Reason.DATA_LEAKAGE, "a b\ufffd")


def test_an_error_of_our_own_is_told_with_its_place() -> None:
    message = confined(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    assert message.reason == Reason.RANK_FAILED
    assert "ZeroDivisionError" in message.message
    assert "test_confined.py" in message.message


def test_what_a_library_raises_is_its_files_fault() -> None:
    def work() -> TerminationMessage:
        with during(Reason.MODEL_INVALID, "s3://b/m/x.json cannot be read"):
            raise LookupError("unknown encoding: nope")

    error = refusal(work)
    assert (error.reason, str(error)) == (
        Reason.MODEL_INVALID, "s3://b/m/x.json cannot be read: LookupError: unknown encoding: nope")  # fmt: skip


def test_a_panic_of_rust_is_its_files_fault() -> None:
    class PanicException(BaseException):
        """What pyo3 raises: no Exception."""

    def work() -> TerminationMessage:
        with during(Reason.MODEL_INVALID, "it cannot be read"):
            raise PanicException("index out of bounds")

    assert str(refusal(work)) == "it cannot be read: index out of bounds"


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL])
def test_a_library_that_ends_the_process_is_told_with_its_file(number: signal.Signals) -> None:
    def work() -> TerminationMessage:
        with during(Reason.MODEL_INVALID, "spec.baseModel.uri"), during(Reason.MODEL_INVALID, "x.json cannot be read"):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return DONE

    error = refusal(work)
    assert error.reason == Reason.MODEL_INVALID
    assert str(error).startswith(
        f"spec.baseModel.uri: x.json cannot be read: a library ended the process ({number.name})"
    )


@pytest.mark.parametrize("take", [fill, abort_for_memory])
def test_a_file_that_takes_too_much_memory_is_told(take: object) -> None:
    def work() -> TerminationMessage:
        with during(Reason.DATA_INVALID, "x cannot be read", memory=64 * MIB, advice="it is a bomb"):
            take(512 * MIB)  # type: ignore[operator]
        return DONE

    error = refusal(work)
    assert error.reason == Reason.DATA_INVALID
    assert "64 MiB of memory; it is a bomb" in str(error)


def test_what_was_allowed_to_take_memory_is_free_afterwards() -> None:
    def work() -> TerminationMessage:
        with during(Reason.DATA_INVALID, "x cannot be read", memory=64 * MIB):
            pass
        return TerminationMessage(message=str(len(fill(128 * MIB))))

    assert confined(work).message == "128"


def test_a_pod_that_is_full_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pod_memory", lambda: 400 * MIB)
    kept: list[object] = []

    def work() -> TerminationMessage:
        module._look()
        for number in range(1000):
            mark(Reason.DATA_INVALID, f"line {number}")
            kept.append(fill(8 * MIB))
            module._look()
        return DONE

    error = refusal(work)
    assert error.reason == Reason.HOST_OUT_OF_MEMORY
    assert "spec.prepare.memory of the profile" in str(error)


def test_a_row_that_takes_half_of_the_pod_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "pod_memory", lambda: 400 * MIB)

    def work() -> TerminationMessage:
        module._look()
        mark(Reason.DATA_INVALID, "line 7")
        fill(2000 * MIB)
        return DONE

    error = refusal(work)
    assert error.reason == Reason.DATA_INVALID
    assert str(error) == "line 7: it takes more than 180 MiB of memory"


def spin() -> None:
    while True:
        pass


def test_what_takes_too_long_is_ended_and_told() -> None:
    def work() -> TerminationMessage:
        with during(Reason.MODEL_INVALID, "x cannot be read", seconds=0.2, advice="look at its patterns"):
            spin()
        return DONE

    error = refusal(work)
    assert str(error) == "x cannot be read: it takes more than 0.2 seconds of CPU time; look at its patterns"


def test_who_waits_takes_no_time() -> None:
    def work() -> TerminationMessage:
        with during(Reason.MODEL_INVALID, "x", seconds=0.2):
            threading.Event().wait(1.0)
        return DONE

    assert confined(work) == DONE


def test_of_two_threads_the_one_that_encodes_is_the_cause() -> None:
    def encode() -> None:
        with lane("encode"), during(Reason.DATA_INVALID, "lines 1 to 9 cannot be encoded", seconds=0.2):
            spin()

    def work() -> TerminationMessage:
        mark(Reason.DATA_INVALID, "line 10", seconds=0.2)
        threading.Thread(target=encode, daemon=True).start()
        time.sleep(60)
        return DONE

    assert str(refusal(work)).startswith("lines 1 to 9 cannot be encoded: it takes more than")


def test_a_child_ends_with_its_parent() -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)

        def work() -> TerminationMessage:
            os.write(writing, f"{os.getpid()}\n".encode())
            signal.pause()
            return DONE

        confined(work)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        child = int(stream.readline())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        # The other end is closed when the last process that has it is gone.
        assert stream.read() == ""
    assert child != pid


def test_what_died_without_a_note_is_our_own_failure() -> None:
    def work() -> TerminationMessage:
        os.kill(os.getpid(), signal.SIGSEGV)
        return DONE

    error = refusal(work)
    assert error.reason == Reason.RANK_FAILED
    assert "SIGSEGV" in str(error)
