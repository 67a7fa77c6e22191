"""What a program says while it works."""

import json

import pytest

from finetune_trainer import log


def test_an_event_is_one_line_of_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    log.event("saved", level="warning", step=4, where="a\nb")
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    found = json.loads(line)
    assert (found["event"], found["level"], found["rank"]) == ("saved", "warning", 3)
    assert (found["step"], found["where"]) == (4, "a\nb")
    assert found["time"].endswith("Z")


def test_half_a_character_is_written_as_its_escape(capsys: pytest.CaptureFixture[str]) -> None:
    log.event("saved", where="\ud800")
    assert json.loads(capsys.readouterr().out)["where"] == "\ud800"


def test_words_on_a_terminal_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    log.event("saved", where="a\nerror: failed\x1b[2J\ud800 ü")
    assert capsys.readouterr().out == "saved where=a\\nerror: failed\\x1b[2J\\ud800 ü\n"


def test_progress_without_a_terminal_is_lines_at_intervals_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    progress = log.Progress("pull", 10, "bytes", every=3600)
    for _ in range(5):
        progress.add(2)
    assert capsys.readouterr().out == ""
    progress.close()
    found = json.loads(capsys.readouterr().out)
    assert (found["event"], found["done"], found["total"], found["unit"]) == ("pull", 10, 10, "bytes")


def test_progress_on_a_terminal_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    progress = log.Progress("pull", 10, "bytes")
    progress.add(5)
    progress.close()
    assert "\rpull " + "█" * 15 + "░" * 15 + " 5/10 bytes" in capsys.readouterr().out
