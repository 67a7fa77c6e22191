"""No text of a user ends a line of any log, forges one, or moves a terminal's cursor."""

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.failures import FineTuneError, Reason
from finetune_api.printable import indented, printable
from finetune_cli import jobview
from finetune_operator.logformat import JsonFormatter, PlainFormatter
from finetune_sandbox.logformat import Formatter
from finetune_trainer import log
from finetune_trainer.outcome import guarded
from finetune_trainer.supervise import Supervisor
from support.world import make_job

FORGED = "12:00:00 info    team-b/bot: all is well"
NASTY = (
    f"a\n{FORGED}\r{FORGED}\x0b\x0c\x1c\x1d\x1e\x85{FORGED}\u2028{FORGED}\u2029\0"
    "\x1b[2J\x1b]0;title\x07\x9b31m\x7f\u202etxet\u202c\u2066\u200b\ud800"
)
"""Ends of lines, sequences that a terminal obeys, marks of direction, and what no encoding takes."""


def raised(text: str) -> logging.LogRecord:
    """A record that quotes the text as its argument, as an exception, and as its job's name."""
    try:
        raise ValueError(text)
    except ValueError:
        record = logging.LogRecord("x", logging.WARNING, "f", 1, "refused: %s", (text,), sys.exc_info())
    record.namespace, record.job = "team-a", text
    return record


def is_plain(line: str) -> bool:
    return line.isprintable() and line.splitlines() == [line]


@pytest.mark.parametrize("formatter", [PlainFormatter(), Formatter()], ids=["operator", "sandbox"])
def test_a_plain_line_stays_one_line_and_a_stack_lies_below_it(formatter: logging.Formatter) -> None:
    first, *rest = formatter.format(raised(NASTY)).split("\n")
    assert all(is_plain(line) for line in (first, *rest))
    assert "refused: a\\n12:00:00" in first
    assert any("ValueError: a" in line for line in rest)
    assert all(line.startswith("    ") for line in rest), "a line that begins where others begin can be forged"


def test_a_json_line_is_ascii_and_loses_nothing() -> None:
    text = JsonFormatter().format(raised(NASTY))
    assert text.isascii()
    assert text.isprintable()
    assert json.loads(text)["message"] == f"refused: {NASTY}"


def test_an_event_of_the_trainer_is_one_line_in_both_forms(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log.event("failed", level="error", message=NASTY)
    machine = capsys.readouterr().out
    assert machine.endswith("\n")
    assert machine[:-1].isascii()
    assert is_plain(machine[:-1])
    assert json.loads(machine)["message"] == NASTY
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    log.event("failed", level="error", message=NASTY)
    assert is_plain(capsys.readouterr().out[:-1])


def told(error: Exception) -> Callable[[], None]:
    def program() -> None:
        raise error

    return program


@pytest.mark.parametrize("error", [FineTuneError(Reason.DATA_INVALID, NASTY), ValueError(NASTY)], ids=["ours", "stack"])
def test_what_ends_a_program_is_quoted_without_its_controls(
    error: Exception, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    guarded(told(error), tmp_path / "outcome.json")
    lines = capsys.readouterr().err.rstrip("\n").split("\n")
    assert all(is_plain(line) for line in lines)
    assert not any(line.startswith("12:00:00") for line in lines)


def test_what_a_rank_writes_is_relayed_without_its_controls(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    text = NASTY.replace("\n", "").replace("\r", "").encode(errors="replace").decode(errors="replace")
    with Supervisor() as supervisor:
        child = supervisor.start("rank 1", [sys.executable, "-c", f"print({text!r})"], {"PYTHONIOENCODING": "utf-8"})
        supervisor.run(10.0, 10.0)
    assert child.code == 0
    assert all(is_plain(line) for line in child.tail)
    relayed = capfdbinary.readouterr().out.decode().rstrip("\n")
    assert is_plain(relayed)
    assert relayed.startswith("[rank 1] a12:00:00 info")


def test_what_the_command_line_shows_of_a_job_moves_no_cursor() -> None:
    raw = make_job().build()
    condition = {"type": "Failed", "status": "True", "reason": "DataInvalid", "message": NASTY}
    attempt = {"number": 0, "outcome": "Permanent", "message": NASTY}
    raw["status"] = {"state": "Failed", "message": NASTY, "conditions": [condition], "attempts": [attempt]}
    now = datetime(2026, 3, 1, tzinfo=UTC)
    shown = [jobview.snapshot(raw).text(), *jobview.describe(raw, now), *jobview.result(raw)]
    assert all(line.isprintable() for line in shown)
    assert any("a\\n12:00:00" in line for line in shown)


@given(st.text())
def test_every_text_becomes_one_line_that_can_be_written(text: str) -> None:
    found = printable(text)
    assert found.isprintable()
    assert len(found.splitlines()) <= 1
    found.encode()
    assert all(line.startswith("    ") for line in indented(text).splitlines())


def test_ordinary_text_stays_as_it_is() -> None:
    for text in ("Grüße, 東京, Здравствуй", "s3://bucket/a b", "found 'x'; it must be 1 to 3", "🙂"):
        assert printable(text) == text
