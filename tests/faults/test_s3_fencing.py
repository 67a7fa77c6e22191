"""A job publishes once: whichever pod comes late, dies in between or believes that it is alone, on any store."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finetune_api.failures import FineTuneError, Reason, TrainingResult
from finetune_api.manifest import RunInfo
from finetune_trainer.fence import Fence, Superseded
from finetune_trainer.probe import probe
from finetune_trainer.publish import Published, fetch_verified, publish
from finetune_trainer.storage import Store
from support.faulty_s3 import Fault, FaultyS3, Request, running_faulty_s3
from support.runs import JOB_UID
from support.s3 import S3, running_s3
from support.stored import clean, contents, hurry, impatient, unfinished
from support.tally import Tally

pytestmark = pytest.mark.faults
SCRATCH, OUTPUT = f"s3://bucket/out/.scratch/{JOB_UID}/", "s3://bucket/out/bot/"
TIME = "2026-01-01T00:00:00Z"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(params=["honours If-None-Match", "ignores If-None-Match"])
def proxy(s3: S3, request: pytest.FixtureRequest) -> Iterator[FaultyS3]:
    with running_faulty_s3(s3.endpoint) as started:
        if request.param.startswith("ignores"):
            started.overwrite = lambda bucket, key: s3.client().delete_object(Bucket=bucket, Key=key)
        yield started
    clean(s3, "out/")


@pytest.fixture
def store(s3: S3, proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    hurry(monkeypatch)
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with impatient(proxy.endpoint) as opened:
        yield opened


class Pod:
    """Of one attempt: it starts, and at its end it publishes what it has."""

    def __init__(self, store: Store, folder: Path, attempt: int, conditional: bool) -> None:
        self.fence = Fence(store, SCRATCH, OUTPUT, attempt, f"uid-{attempt}", conditional, settled=0.0)
        self.folder = folder / f"attempt-{attempt}"
        self.folder.mkdir()
        (self.folder / "adapter_model.safetensors").write_bytes(b"weights of %d" % attempt)
        self.run = RunInfo(
            namespace="team-a",
            job="bot",
            job_uid=JOB_UID,
            attempt=attempt,
            attempt_uid=f"uid-{attempt}",
            spec_sha256="0" * 64,
            base_model_uri="s3://bucket/m/",
            base_model_sha256="0" * 64,
            datasets_sha256={},
            metrics={"evalLoss": float(attempt)},
        )

    def start(self) -> TrainingResult | None:
        return self.fence.enter()

    def end(self) -> Published:
        return publish(
            self.fence.store,
            self.folder,
            self.fence.uri,
            kind="Adapter",
            step=3,
            created_time=TIME,
            run=self.run,
            commit=self.fence.commit,
        )


def manifests(s3: S3) -> list[str]:
    return [key for key in s3.keys("bucket", "out/bot/") if key.endswith("manifest.json")]


@pytest.fixture
def pods(store: Store, proxy: FaultyS3, tmp_path: Path) -> list[Pod]:
    return [Pod(store, tmp_path, attempt, proxy.overwrite is None) for attempt in range(3)]


def test_what_the_store_honours_is_tried_and_not_assumed(store: Store, proxy: FaultyS3, s3: S3) -> None:
    assert probe(store, SCRATCH, "pod-uid", "spec.output.uri") is (proxy.overwrite is None)
    assert s3.keys("bucket", "out/") == []


def test_an_attempt_publishes_under_its_own_uid(pods: list[Pod], store: Store, s3: S3, tmp_path: Path) -> None:
    assert pods[0].start() is None
    done = pods[0].end()
    assert done.uri == f"{OUTPUT}uid-0/"
    assert done == pods[0].end(), "an answer that was lost"
    fetch_verified(store, f"{done.uri}manifest.json", tmp_path / "fetched", sha256=done.manifest_sha256)
    assert sorted(contents(s3, "out/bot/uid-0/")) == ["adapter_model.safetensors", "manifest.json"]


def test_a_pod_that_comes_back_late_publishes_nothing(pods: list[Pod], s3: S3) -> None:
    late, current = pods[0], pods[1]
    assert late.start() is None
    assert current.start() is None
    with pytest.raises(Superseded, match="attempt 0 publishes nothing: attempt 1 has begun") as caught:
        late.end()
    assert caught.value.reason == Reason.PREEMPTED
    current.end()
    with pytest.raises(Superseded):
        late.end()
    with pytest.raises(Superseded):
        late.start()
    assert manifests(s3) == ["out/bot/uid-1/manifest.json"]


def test_what_an_attempt_had_published_is_the_next_ones_result(pods: list[Pod], s3: S3) -> None:
    pods[0].start()
    done = pods[0].end()
    # The pod's last word was lost, so that the operator started another attempt.
    result = pods[1].start()
    assert result == TrainingResult(
        uri=f"{OUTPUT}uid-0/",
        manifest_sha256=done.manifest_sha256,
        size_bytes=done.size,
        metrics={"evalLoss": 0.0},
    )
    assert pods[2].start() == result
    assert manifests(s3) == ["out/bot/uid-0/manifest.json"]


# Elsewhere it would take as long as a write may be under way.
@pytest.mark.parametrize("proxy", ["honours If-None-Match"], indirect=True)
def test_of_two_that_meet_at_a_register_one_has_its_way(pods: list[Pod], s3: S3) -> None:
    for _ in range(8):
        clean(s3, "out/")
        pods[0].start()
        with ThreadPoolExecutor(2) as pool:
            ending, starting = pool.submit(pods[0].end), pool.submit(pods[1].start)
        result = starting.result()
        if ending.exception():
            assert isinstance(ending.exception(), Superseded)
            assert result is None
            assert manifests(s3) == []
        else:
            assert result is not None
            assert result.uri == ending.result().uri
            assert manifests(s3) == ["out/bot/uid-0/manifest.json"]


def test_uploads_of_an_attempt_that_is_over_are_swept(pods: list[Pod], s3: S3) -> None:
    pods[0].start()
    client = s3.client()
    strangers = ["out/bot/uid-9/weights", "out/other/uid-0/weights", "out/.scratch/other/data/x"]
    for key in ("out/bot/uid-0/weights", f"out/.scratch/{JOB_UID}/checkpoints/step-1/w", *strangers):
        client.create_multipart_upload(Bucket="bucket", Key=key)
    pods[1].start()
    assert sorted(unfinished(s3, "out/")) == sorted(strangers)


class Dead(Exception):
    """The pod is gone."""


def dying(proxy: FaultyS3, number: int, fault: Fault) -> None:
    """From its request of this number on the pod reaches nobody; of that one, the store may have heard."""
    count = itertools.count()

    def rule(request: Request) -> Fault | None:
        now = next(count)
        return None if now < number else fault if now == number else "reset"

    proxy.start(rule)


def test_a_pod_that_dies_at_any_moment_leaves_one_artifact_or_none(
    s3: S3, proxy: FaultyS3, store: Store, tmp_path: Path, whole: bool, tally: Tally
) -> None:
    conditional, results = proxy.overwrite is None, {}
    place = tmp_path / "smooth"
    place.mkdir()
    proxy.start()
    pod = Pod(store, place, 0, conditional)
    pod.start()
    pod.end()
    requests = [request.name for request in proxy.requests]
    faults: tuple[Fault, ...] = ("reset", "reset after commit")
    for number, fault in itertools.product(range(len(requests)) if whole else range(0, len(requests), 5), faults):
        clean(s3, "out/")
        place = tmp_path / f"{number}-{fault}"
        place.mkdir()
        dying(proxy, number, fault)
        with impatient(proxy.endpoint, attempts=1) as dead:
            old = Pod(dead, place, 0, conditional)
            try:
                old.start()
                old.end()
            except FineTuneError:
                pass
        proxy.start()
        new = Pod(store, place, 1, conditional)
        result = new.start()
        told = result.uri if result else new.end().uri
        # The node of the first one was not dead after all.
        late = Fence(store, SCRATCH, OUTPUT, 0, "uid-0", conditional, settled=0.0)
        old.fence = late
        try:
            again = old.end().uri
        except Superseded:
            again = ""
        found = manifests(s3)
        wrong = "" if len(found) == 1 and told.endswith(found[0].removeprefix("out/bot/")[:6]) else f"{found}, {told}"
        wrong = wrong or ("" if again in ("", told) else f"{again} was told, and {told}")
        results[f"{requests[number]}, {fault}, {'with' if conditional else 'without'} If-None-Match"] = wrong
    tally.count("S3: an attempt dies and comes back", results)
