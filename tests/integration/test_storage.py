"""Storage against a real S3 protocol: pins, ranges, refusals, races, connections that break."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import StorageConfig
from finetune_trainer.publish import fetch_verified, publish
from finetune_trainer.storage import PART, Store, Wanted
from finetune_trainer.storage_errors import AlreadyExists, ObjectChanged, ObjectMissing
from finetune_trainer.traffic import of_pod
from support.s3 import S3, running_proxy, running_s3, unused_port

pytestmark = pytest.mark.integration
SCRATCH = "s3://bucket/out/.scratch/11111111-2222/"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture
def store(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with make_store(s3.endpoint) as opened:
        yield opened


def make_store(endpoint: str, attempts: int = 2) -> Store:
    return Store(StorageConfig(endpoint=endpoint, region="us-east-1", addressing_style="path"), attempts=attempts)


def pattern(size: int) -> bytes:
    return bytes(range(251)) * (size // 251 + 1)


def test_a_large_file_goes_up_in_parts_and_comes_back_in_ranges(store: Store, tmp_path: Path) -> None:
    data = pattern(PART * 2)[: PART * 2 + 12345]
    (tmp_path / "in").write_bytes(data)
    sent = store.upload(tmp_path / "in", "s3://bucket/large/in")
    assert sent.size == len(data)
    pinned = store.pin("s3://bucket/large/in")
    seen: list[int] = []
    assert store.download(Wanted(pinned, tmp_path / "sub" / "out", sent.sha256), seen.append) == sent.sha256
    assert (tmp_path / "sub" / "out").read_bytes() == data
    assert sum(seen) == len(data)
    assert store.get_range(pinned, PART - 3, 7) == data[PART - 3 : PART + 4]
    assert list((tmp_path / "sub").iterdir()) == [tmp_path / "sub" / "out"]


def test_what_is_moved_is_counted_by_all_of_a_pod(
    s3: S3, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_WORK_DIR", str(tmp_path / "work"))
    assert of_pod() == (0, 0)
    data = pattern(PART * 2)[: PART * 2 + 12345]
    (tmp_path / "in").write_bytes(data)
    with make_store(s3.endpoint) as first:
        first.upload(tmp_path / "in", "s3://bucket/counted/in")
        pinned = first.pin("s3://bucket/counted/in")
        first.download(Wanted(pinned, tmp_path / "out"))
        read, written = first.moved
        assert read == len(data)
        # What is around the parts is counted too: a checksum's trailer, the list of parts.
        assert len(data) <= written < len(data) * 1.001
    with make_store(s3.endpoint) as second:
        second.put_bytes("s3://bucket/counted/small", b"x" * 100)
        assert second.get_range(pinned, 5, 10) == data[5:15]
        assert of_pod() == (len(data) + 10, written + second.moved.written)
    assert second.moved.written >= 100
    assert of_pod().read == len(data) + 10
    assert store.moved == (0, 0)


def test_an_empty_object_is_an_object(store: Store, s3: S3, tmp_path: Path) -> None:
    s3.put("s3://bucket/empty", b"")
    pinned = store.pin("s3://bucket/empty")
    store.download(Wanted(pinned, tmp_path / "empty"))
    assert (tmp_path / "empty").read_bytes() == b""
    assert store.get_bytes(pinned, 0) == b""


def test_a_prefix_is_listed_over_pages_and_pinned(store: Store, s3: S3) -> None:
    for key in ("many/0", "many/1", "many/2", "many/20", "many/folder/"):
        s3.put(f"s3://bucket/{key}", b"x")
    store.page_size = 2
    assert [item.uri[-2:] for item in store.list("s3://bucket/many/")] == ["/0", "/1", "/2", "20"]
    assert [item.uri[-2:] for item in store.pin_all(["s3://bucket/many/2", "s3://bucket/many/1"])] == ["/2", "/1"]


def test_what_changed_after_it_was_pinned_is_refused(store: Store, s3: S3, tmp_path: Path) -> None:
    s3.put("s3://bucket/moving", b"first")
    pinned = store.pin("s3://bucket/moving")
    s3.put("s3://bucket/moving", b"other")
    with pytest.raises(ObjectChanged, match=r"s3://bucket/moving: the object changed since this job pinned it"):
        store.download(Wanted(pinned, tmp_path / "moving"))
    assert not (tmp_path / "moving").exists()


def test_a_version_stays_readable_after_it_was_overwritten(store: Store, s3: S3) -> None:
    s3.client().create_bucket(Bucket="versioned")
    s3.client().put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    s3.put("s3://versioned/x", b"first")
    pinned = store.pin("s3://versioned/x")
    s3.put("s3://versioned/x", b"other")
    assert store.get_bytes(pinned, 100) == b"first"


def test_other_content_than_expected_leaves_no_file(store: Store, s3: S3, tmp_path: Path) -> None:
    s3.put("s3://bucket/hashed", b"data")
    with pytest.raises(ObjectChanged, match="SHA-256"):
        store.download(Wanted(store.pin("s3://bucket/hashed"), tmp_path / "hashed", "0" * 64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "reason", "text"),
    [
        ("s3://no-such-bucket/a/b", Reason.STORAGE_DENIED, r"cannot read s3://no-such-bucket/a/b: .*\(NoSuchBucket\)"),
        (
            "s3://bucket/nothing",
            Reason.DATA_INVALID,
            r"cannot read s3://bucket/nothing: .*no such object \(NoSuchKey\)",
        ),
        ("s3://forbidden/x", Reason.STORAGE_DENIED, r"cannot read s3://forbidden/x: .*do not allow .*\(AccessDenied\)"),
    ],
)
def test_refusals_name_bucket_key_and_code(store: Store, uri: str, reason: Reason, text: str) -> None:
    with pytest.raises(FineTuneError, match=text) as caught:
        store.pin(uri)
    assert caught.value.reason == reason


def test_writing_and_listing_are_refused_with_the_same_words(store: Store, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    with pytest.raises(FineTuneError, match=r"cannot write s3://forbidden/y: .*\(AccessDenied\)"):
        store.upload(tmp_path / "f", "s3://forbidden/y")
    with pytest.raises(FineTuneError, match=r"cannot list s3://no-such-bucket/: .*\(NoSuchBucket\)"):
        list(store.list("s3://no-such-bucket/"))


@pytest.mark.parametrize(
    ("variable", "value", "code"),
    [
        ("AWS_ACCESS_KEY_ID", "AKIAUNKNOWNUNKNOWN00", "InvalidAccessKeyId"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", "SignatureDoesNotMatch"),
    ],
)
def test_wrong_credentials_are_named(
    s3: S3, store: Store, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, code: str
) -> None:
    monkeypatch.setenv(variable, value)
    with make_store(s3.endpoint) as other, pytest.raises(FineTuneError, match=rf"{variable}.*{code}") as caught:
        other.pin("s3://bucket/x")
    assert caught.value.reason == Reason.STORAGE_DENIED


def test_missing_credentials_are_told(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in s3.environment:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with make_store(s3.endpoint) as store, pytest.raises(FineTuneError, match="no complete credentials") as caught:
        store.pin("s3://bucket/x")
    assert caught.value.reason == Reason.STORAGE_DENIED


def test_an_endpoint_that_is_not_there_is_named(store: Store) -> None:
    endpoint = f"http://127.0.0.1:{unused_port()}"
    with make_store(endpoint) as other, pytest.raises(FineTuneError, match=r"127.0.0.1:.* cannot be reached") as caught:
        other.pin("s3://bucket/x")
    assert caught.value.reason == Reason.STORAGE_UNAVAILABLE


def test_a_body_that_breaks_off_is_continued_where_it_stopped(store: Store, s3: S3, tmp_path: Path) -> None:
    data = pattern(3 * 2**20)
    s3.put("s3://bucket/cut", data)
    pinned = store.pin("s3://bucket/cut")
    with running_proxy(s3.endpoint) as proxy, make_store(proxy.endpoint) as other:
        proxy.cuts, proxy.after = 3, 700_000
        other.download(Wanted(pinned, tmp_path / "cut"))
        assert proxy.connections >= 4
    assert (tmp_path / "cut").read_bytes() == data


def test_bodies_that_never_come_exhaust_the_budget(store: Store, s3: S3) -> None:
    s3.put("s3://bucket/never", pattern(100_000))
    pinned = store.pin("s3://bucket/never")
    with running_proxy(s3.endpoint) as proxy, make_store(proxy.endpoint) as other:
        proxy.cuts, proxy.after = 10_000, 1
        with pytest.raises(FineTuneError, match="cannot read s3://bucket/never") as caught:
            other.get_bytes(pinned, 1_000_000)
    assert caught.value.reason == Reason.STORAGE_UNAVAILABLE


def test_of_many_writers_of_one_key_one_wins(store: Store, s3: S3) -> None:
    outcomes: list[str] = []

    def write(index: int) -> None:
        try:
            store.put_if_absent("s3://bucket/race", f"writer {index}".encode())
            outcomes.append("won")
        except AlreadyExists:
            outcomes.append("lost")

    threads = [threading.Thread(target=write, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == ["lost"] * 7 + ["won"]


def test_writing_the_same_again_is_success(store: Store) -> None:
    store.put_if_absent("s3://bucket/same", b"1")
    store.put_if_absent("s3://bucket/same", b"1")
    with pytest.raises(AlreadyExists, match="s3://bucket/same: it exists already"):
        store.put_if_absent("s3://bucket/same", b"2")


def test_a_key_of_ones_own_encrypts_all_that_is_written(store: Store, s3: S3, tmp_path: Path) -> None:
    config = StorageConfig(endpoint=s3.endpoint, region="us-east-1", addressing_style="path", kms_key_id="key-1")
    (tmp_path / "f").write_bytes(b"x")
    with Store(config) as encrypting:
        encrypting.upload(tmp_path / "f", "s3://bucket/kms/f")
        encrypting.put_if_absent("s3://bucket/kms/manifest.json", b"{}")
    for key in ("kms/f", "kms/manifest.json"):
        answer = s3.client().head_object(Bucket="bucket", Key=key)
        assert (answer["ServerSideEncryption"], answer["SSEKMSKeyId"]) == ("aws:kms", "key-1")


def test_only_a_jobs_own_scratch_prefix_can_be_deleted(store: Store, s3: S3) -> None:
    s3.put(f"{SCRATCH}checkpoints/step-1/x", b"1")
    s3.put(f"{SCRATCH}data/index.json", b"1")
    for prefix, scratch in (
        ("s3://bucket/out/", SCRATCH),
        ("s3://bucket/", "s3://bucket/"),
        ("s3://bucket/out/.scratch/", "s3://bucket/out/.scratch/"),
        (f"{SCRATCH}checkpoints", SCRATCH),
    ):
        with pytest.raises(ValueError, match="is not a prefix within"):
            store.delete_prefix(prefix, scratch)
    assert store.delete_prefix(f"{SCRATCH}checkpoints/", SCRATCH) == 1
    assert s3.keys("bucket", "out/.scratch/") == ["out/.scratch/11111111-2222/data/index.json"]


def make_artifact(directory: Path) -> Path:
    (directory / "sub").mkdir(parents=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "sub" / "weights").write_bytes(pattern(5000))
    return directory


def test_what_is_published_is_fetched_and_verified(store: Store, s3: S3, tmp_path: Path) -> None:
    artifact, uri = make_artifact(tmp_path / "a"), "s3://bucket/published/one"
    done = publish(store, artifact, uri, kind="Adapter", step=3, created_time="2026-01-01T00:00:00Z")
    s3.put(f"{uri}/stranger", b"not of ours")
    manifest = fetch_verified(store, f"{uri}/manifest.json", tmp_path / "b", sha256=done.manifest_sha256)
    assert [entry.key for entry in manifest.files] == ["adapter_config.json", "sub/weights"]
    assert (tmp_path / "b" / "sub" / "weights").read_bytes() == pattern(5000)
    assert not (tmp_path / "b" / "stranger").exists()
    again = publish(store, artifact, uri, kind="Adapter", step=3, created_time="2026-02-02T00:00:00Z")
    assert again == done
    (artifact / "adapter_config.json").write_text('{"r": 8}')
    with pytest.raises(AlreadyExists, match="other files are published there already"):
        publish(store, artifact, uri, kind="Adapter", step=3, created_time="2026-01-01T00:00:00Z")
    assert s3.get(f"{uri}/adapter_config.json") == b"{}"


def test_a_file_that_was_tampered_with_is_refused(store: Store, s3: S3, tmp_path: Path) -> None:
    uri = "s3://bucket/published/two"
    publish(store, make_artifact(tmp_path / "a"), uri, kind="Adapter", step=3, created_time="2026-01-01T00:00:00Z")
    s3.put(f"{uri}/adapter_config.json", b"[]")
    with pytest.raises(ObjectChanged, match=r"adapter_config.json.*SHA-256"):
        fetch_verified(store, f"{uri}/manifest.json", tmp_path / "b")
    s3.put(f"{uri}/adapter_config.json", b"longer")
    with pytest.raises(ObjectChanged, match="6 bytes are there, the manifest says 2"):
        fetch_verified(store, f"{uri}/manifest.json", tmp_path / "c")
    with pytest.raises(ObjectMissing):
        fetch_verified(store, "s3://bucket/published/none/manifest.json", tmp_path / "d")


def test_a_manifest_cannot_name_what_lies_elsewhere(store: Store, s3: S3, tmp_path: Path) -> None:
    entry = '{"key": "../x", "size": 1, "sha256": "%s"}' % ("0" * 64)
    head = '{"version": "v1", "kind": "Adapter", "step": 1, "createdTime": "2026-01-01T00:00:00Z"'
    s3.put("s3://bucket/published/evil/manifest.json", f'{head}, "files": [{entry}]}}'.encode())
    with pytest.raises(FineTuneError, match="names a key outside its prefix"):
        fetch_verified(store, "s3://bucket/published/evil/manifest.json", tmp_path / "b")
