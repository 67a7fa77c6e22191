"""A termination message never exceeds what Kubernetes keeps of one, and says the most telling first."""

import math
from typing import Any

import pytest

from finetune_api.failures import LIMIT, Reason, TerminationMessage, TrainingResult
from support.world import PREPARED

SHA = "a" * 64


def message(text: str, figures: int, uri: str = "s3://bucket/k/", name: str = "evalLoss.tickets.slice-{}") -> Any:
    metrics = {name.format(i): 1 / (i + 3) for i in range(figures)} | {"evalLoss": 1.25, "evalLossBefore": 2.5}
    result = TrainingResult(uri=uri, manifest_sha256=SHA, size_bytes=2**40, metrics=metrics)
    return TerminationMessage(reason=Reason.GATE_NOT_MET, message=text, exit_code=78, rank=0, step=10**6, result=result)


@pytest.mark.parametrize("figures", [0, 1, 60, 127, 500])
@pytest.mark.parametrize("text", ["", "short", "x" * 2048, "é" * 2048, "\x01" * 2048, '"\n' * 1024, "🙂" * 512])
@pytest.mark.parametrize("name", ["evalLoss.tickets.slice-{}", "rougeL.ünïcödé.\x01\x02\x03{}"])
def test_it_fits_and_can_be_read(figures: int, text: str, name: str) -> None:
    data = message(text, figures, "s3://bucket/" + "k" * 1000 + "/", name).encode()
    assert len(data) <= LIMIT
    read = TerminationMessage.decode(data.decode())
    assert read
    assert read.reason == Reason.GATE_NOT_MET
    assert read.exit_code == 78
    assert read.result
    assert read.result.manifest_sha256 == SHA
    assert read.result.metrics["evalLoss"] == 1.25
    assert len(read.result.metrics) <= 128
    assert text.startswith(read.message.removesuffix("…"))
    assert bool(read.message) == bool(text)


def test_what_is_left_out_are_slices_first() -> None:
    metrics = {f"{base}{where}": 0.123456789 for base in ("evalLoss", "rougeL") for where in ("", ".a", ".b")}
    metrics |= {f"evalLoss.a.{'s' * 30}{i}": 0.123456789 for i in range(200)}
    said = TerminationMessage(
        message="m" * 2048,
        result=TrainingResult(uri="s3://bucket/k/", manifest_sha256=SHA, size_bytes=1, metrics=metrics),
    )
    read = TerminationMessage.decode(said.encode().decode())
    assert read
    assert read.result
    kept = list(read.result.metrics)
    assert set(kept[:6]) == {"evalLoss", "rougeL", "evalLoss.a", "evalLoss.b", "rougeL.a", "rougeL.b"}
    assert 20 < len(kept) < 128
    assert len(read.message.encode()) == 1024


def test_a_short_one_is_told_whole() -> None:
    said = message("why", 5)
    read = TerminationMessage.decode(said.encode().decode())
    assert read == said


def test_a_figure_that_is_no_number_does_not_cost_the_others() -> None:
    result = TrainingResult(
        uri="s3://bucket/", manifest_sha256=SHA, size_bytes=1, metrics={"a": math.nan, "evalLoss": 1.0}
    )
    read = TerminationMessage.decode(TerminationMessage(result=result).encode().decode())
    assert read
    assert read.result
    assert read.result.metrics == {"evalLoss": 1.0}


def test_what_prepare_tells_is_cut_too() -> None:
    long = "s3://" + "b" * 60 + "/" + "k" * 950
    prepared = PREPARED.model_copy(update={"message": "🙂" * 512, "index_uri": long, "report_uri": long})
    data = TerminationMessage(prepared=prepared).encode()
    assert len(data) <= LIMIT
    read = TerminationMessage.decode(data.decode())
    assert read
    assert read.prepared
    assert read.prepared.index_uri == long


def test_of_a_newer_trainer_what_is_known_is_read() -> None:
    read = TerminationMessage.decode('{"reason": "Hung", "message": "rank 3", "rank": 3, "powerUsed": 12}')
    assert read
    assert (read.reason, read.rank) == (Reason.HUNG, 3)
