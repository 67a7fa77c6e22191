"""Each request to the store that saving, publishing and pulling make, broken in each way: the end is that of a run
without faults, or one clear sentence and nothing torn, and the next attempt makes it good."""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import RunConfig
from finetune_trainer.prepare import prepare
from finetune_trainer.publish import fetch_verified, publish
from finetune_trainer.pull import pull
from finetune_trainer.storage import Store
from finetune_trainer.storage_errors import ObjectMissing
from finetune_trainer.workdir import WorkDir
from support.faulty_s3 import PASSING, Fault, FaultyS3, Request, Rule, running_faulty_s3
from support.runs import JOB_UID, make_run_config
from support.s3 import S3, running_s3
from support.stored import artifact, clean, contents, hurry, impatient, unfinished
from support.tally import Tally
from support.tiny import make_tiny_model

pytestmark = pytest.mark.faults
TIME = "2026-01-01T00:00:00Z"
LASTING: tuple[Fault, ...] = ("unavailable", "reset", "cut", "expired", "no bucket")
"""What goes on until the budget is spent, or is believed at once."""
SCRATCH = f"s3://bucket/work/.scratch/{JOB_UID}/"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with running_s3() as server:
        for path in make_tiny_model(tmp_path_factory.mktemp("model")).iterdir():
            server.put(f"s3://bucket/models/tiny/{path.name}", path.read_bytes())
        rows = "".join(f'{{"prompt": "q {i}", "completion": "a {i}"}}\n' for i in range(10))
        server.put("s3://bucket/data/pairs.jsonl", rows.encode())
        yield server


@pytest.fixture(scope="module")
def proxy(s3: S3) -> Iterator[FaultyS3]:
    with running_faulty_s3(s3.endpoint) as started:
        yield started


@pytest.fixture(autouse=True)
def pod(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FINETUNE_WORK_DIR", str(tmp_path / "prepare"))
    hurry(monkeypatch)


class Work(NamedTuple):
    """Something that is done with the store, and what there is at the end."""

    run: Callable[[Store], None]
    end: Callable[[], object]
    reset: Callable[[], None]
    whole: Callable[[Store], str]
    """What is wrong with what can be seen: a manifest must hold."""


def saving(s3: S3, folder: Path, uri: str, older: str | None = None) -> Work:
    """Publishing, and, where there is something `older` to make room for, a checkpoint."""
    prefix = uri.removeprefix("s3://bucket/")
    verified = itertools.count()

    def reset() -> None:
        clean(s3, prefix)
        if older:
            s3.put(older + "manifest.json", b"{}")
            s3.put(older + "adapter.safetensors", b"old")

    def run(store: Store) -> None:
        if older:
            store.delete_prefix(uri, SCRATCH)
        publish(store, folder, uri, kind="Adapter", step=3, created_time=TIME)
        if older:
            store.delete(older + "manifest.json")
            store.delete_prefix(older, SCRATCH)

    def whole(store: Store) -> str:
        try:
            fetch_verified(store, f"{uri}manifest.json", folder.parent / f"verified-{next(verified)}")
        except ObjectMissing as error:
            return "" if str(error).count("manifest.json") else str(error)
        except FineTuneError as error:
            return str(error)
        return ""

    def end() -> object:
        return contents(s3, prefix), unfinished(s3, prefix), s3.keys("bucket", "work/.scratch/")

    return Work(run, end, reset, whole)


def pulling(config: RunConfig, place: Path) -> Work:
    folder = itertools.count()
    current = [place]

    def reset() -> None:
        current[0] = place / str(next(folder))

    def end() -> object:
        return {
            str(path.relative_to(current[0])): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in current[0].rglob("*")
            if path.is_file()
        }

    def whole(store: Store) -> str:
        torn = list(current[0].rglob("*.part"))
        return f"{torn} is left" if torn else ""

    # It connects by itself, with the same patience.
    return Work(lambda store: pull(config, WorkDir(current[0])), end, reset, whole)


def once(name: str, fault: Fault) -> Rule:
    return lambda request: fault if request.name == name else None


def from_then_on(name: str, fault: Fault) -> Rule:
    begun = []

    def rule(request: Request) -> Fault | None:
        begun.extend([1] if request.name == name else [])
        return fault if begun else None

    return rule


def requests_of(work: Work, proxy: FaultyS3, store: Store) -> tuple[list[str], object]:
    work.reset()
    proxy.start()
    work.run(store)
    return list(dict.fromkeys(request.name for request in proxy.requests)), work.end()


_SENDS = {"PutObject", "UploadPart", "CompleteMultipartUpload"}


def cases_of(requests: list[str], faults: tuple[Fault, ...], whole: bool) -> list[tuple[str, Fault]]:
    """All that make a difference, or a sample in which each fault occurs, and nearly each request."""
    cases = [
        (name, fault)
        for name, fault in itertools.product(requests, faults)
        if fault != "flipped on the way there" or name.split()[0] in _SENDS
    ]
    return cases if whole else cases[::29]


@pytest.fixture
def works(s3: S3, proxy: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Work]:
    folder = artifact(tmp_path / "artifact")
    monkeypatch.setattr("finetune_trainer.pull.Store", lambda config: impatient(config.endpoint))
    config = make_run_config(endpoint=s3.endpoint)
    prepared = prepare(config).prepared
    storage = config.storage.model_copy(update={"endpoint": proxy.endpoint})
    old, new = (f"{SCRATCH}checkpoints/step-0000000{step}/" for step in (1, 2))
    return {
        "publish": saving(s3, folder, "s3://bucket/adapters/bot/attempt-uid/"),
        "checkpoint": saving(s3, folder, new, old),
        "pull": pulling(config.model_copy(update={"prepared": prepared, "storage": storage}), tmp_path / "pods"),
    }


@pytest.mark.parametrize("name", ["publish", "checkpoint", "pull"])
@pytest.mark.timeout(1800)
def test_what_passes_is_got_over(works: dict[str, Work], name: str, proxy: FaultyS3, whole: bool, tally: Tally) -> None:
    work, results = works[name], {}
    with impatient(proxy.endpoint) as store:
        requests, smooth = requests_of(work, proxy, store)
        for request, fault in cases_of(requests, PASSING, whole):
            work.reset()
            proxy.after = 10
            proxy.start(once(request, fault))
            try:
                work.run(store)
                wrong = "" if work.end() == smooth else f"the end is another: {work.end()}"
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            results[f"{name}, {request}, {fault}"] = wrong or ("" if proxy.broken else "nothing was broken")
        proxy.start()
    tally.count("S3: a request fails once", results)


@pytest.mark.parametrize("name", ["publish", "checkpoint", "pull"])
@pytest.mark.timeout(1800)
def test_what_lasts_ends_in_one_sentence_and_can_be_made_good(
    works: dict[str, Work], name: str, proxy: FaultyS3, whole: bool, tally: Tally
) -> None:
    work, results = works[name], {}
    with impatient(proxy.endpoint, attempts=2) as store:
        requests, smooth = requests_of(work, proxy, store)
        for request, fault in cases_of(requests, LASTING, whole):
            work.reset()
            proxy.after = 10
            proxy.start(from_then_on(request, fault))
            wrong = ""
            try:
                work.run(store)
            except Exception as error:
                wrong = unclear(error, fault)
            proxy.start()
            wrong = wrong or work.whole(store)
            store.sweep_uploads("s3://bucket/adapters/bot/attempt-uid/")
            store.sweep_uploads(SCRATCH)
            work.run(store)
            wrong = wrong or ("" if work.end() == smooth else f"it was not made good: {work.end()}")
            results[f"{name}, from {request} on, {fault}"] = wrong
    tally.count("S3: the store goes away", results)


def unclear(error: Exception, fault: Fault) -> str:
    if not isinstance(error, FineTuneError):
        return f"{type(error).__name__}: {error}"
    denied = fault in ("expired", "no bucket")
    if error.reason != (Reason.STORAGE_DENIED if denied else Reason.STORAGE_UNAVAILABLE):
        return f"{error.reason}: {error}"
    if not re.search(r"cannot \w+.* s3://bucket/\S+: \w.*", str(error)) or "\n" in str(error):
        return f"it does not say what and where: {error}"
    return ""
