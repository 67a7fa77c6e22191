"""`finetune fetch` against an S3 server: all of it and verified, or nothing."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_cli import __main__ as entry
from support.s3 import S3, running_s3, unused_port

pytestmark = pytest.mark.integration

FILES = {"adapter_model.safetensors": b"w" * 100_000, "adapter_config.json": b"{}", "deep/er/tokens.json": b"[1]"}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


def manifest(files: dict[str, bytes], **changes: Any) -> bytes:
    entries = [{"key": k, "size": len(v), "sha256": hashlib.sha256(v).hexdigest()} for k, v in files.items()]
    body = {"version": "v1", "kind": "Adapter", "step": 3, "createdTime": "2026-01-01T00:00:00Z", "files": entries}
    return json.dumps(body | changes).encode()


@pytest.fixture
def published(s3: S3, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An adapter under a prefix of the test's own, and the keys for it in the environment."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    prefix = f"s3://bucket/{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}/"
    for key, data in FILES.items():
        s3.put(prefix + key, data)
    s3.put(prefix + "manifest.json", manifest(FILES))
    return prefix


def fetch(s3: S3, uri: str, directory: Path, *more: str) -> int:
    return entry.run(entry.cli, "finetune", ["fetch", uri, "-o", str(directory), "--endpoint", s3.endpoint, *more])


def test_an_adapter_arrives_whole(s3: S3, published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "deep" / "adapter"
    assert fetch(s3, published.rstrip("/"), directory) == 0
    found = {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    assert found == FILES | {"manifest.json": manifest(FILES)}
    assert f"verified 3 files of {published.rstrip('/')} in {directory}" in capsys.readouterr().out
    assert [p.name for p in directory.parent.iterdir()] == ["adapter"], "nothing half-done stays behind"


@pytest.mark.parametrize(
    ("key", "data", "message"),
    [
        ("adapter_model.safetensors", b"v" * 100_000, "adapter_model.safetensors differs from the manifest"),
        ("adapter_config.json", b"{ }", "adapter_config.json has 3 bytes; the manifest says 2"),
        ("surprise.bin", b"x", "it holds surprise.bin, which its manifest does not name"),
        ("manifest.json", b"{}", "is not a manifest"),
        ("manifest.json", manifest(FILES | {"gone": b""}), "is not whole: gone is missing"),
        ("manifest.json", manifest(FILES | {"../up": b""}), "names '../up', which is no plain relative path"),
    ],
)
def test_what_is_not_right_leaves_nothing_behind(
    s3: S3, published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, data: bytes, message: str
) -> None:
    s3.put(published + key, data)
    assert fetch(s3, published, tmp_path / "adapter") == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_prefix_without_a_manifest_holds_nothing(
    s3: S3, published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(s3, published + "none/", tmp_path / "adapter") == 1
    assert "nothing was published there" in capsys.readouterr().err


def test_a_folder_with_files_is_not_touched(
    s3: S3, published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert fetch(s3, published, tmp_path) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://no-such-bucket/a/", "s3://no-such-bucket/a/manifest.json: the object store refused"),
        ("s3://forbidden/a/", "(AccessDenied)"),
    ],
)
def test_a_refusal_of_the_store_is_one_sentence(
    s3: S3, published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], uri: str, message: str
) -> None:
    assert fetch(s3, uri, tmp_path / "adapter") == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_store_that_is_not_there_is_exit_code_3(
    s3: S3, published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = f"http://127.0.0.1:{unused_port()}"
    assert fetch(s3, published, tmp_path / "adapter", "--endpoint", nowhere) == 3
    assert "the object store cannot be reached" in capsys.readouterr().err
