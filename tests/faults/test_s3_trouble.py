"""What befalls a pod's work with the store: renewed and expired keys, a slow body, a full disk, uploads left behind."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.failures import FineTuneError, Reason
from finetune_trainer.storage import Store, Wanted
from support.faulty_s3 import Fault, FaultyS3, Request, running_faulty_s3
from support.s3 import S3, running_s3
from support.stored import clean, hurry, impatient, unfinished

pytestmark = pytest.mark.faults
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        server.put("s3://bucket/x", b"x")
        yield server


@pytest.fixture
def proxy(s3: S3) -> Iterator[FaultyS3]:
    with running_faulty_s3(s3.endpoint) as started:
        yield started


@pytest.fixture
def store(s3: S3, proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    hurry(monkeypatch)
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with impatient(proxy.endpoint) as opened:
        yield opened


def write(volume: Path, keys: dict[str, str]) -> None:
    """As the kubelet does: the files of one moment lie behind one link, which is exchanged."""
    place = volume / f"..{len(list(volume.iterdir()))}"
    (place / "credentials").mkdir(parents=True)
    for name, value in keys.items():
        (place / "credentials" / name).write_text(value + "\n")
    (volume / "..new").symlink_to(place.name)
    (volume / "..new").rename(volume / "..data")
    if not (volume / "credentials").exists():
        (volume / "credentials").symlink_to("..data/credentials")


def new_keys(s3: S3) -> dict[str, str]:
    """Of a user of their own, who may do anything with objects."""
    iam, name = s3.client("iam"), f"user-{secrets.token_hex(4)}"
    iam.create_user(UserName=name)
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    iam.put_user_policy(UserName=name, PolicyName="s3", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return {"user": name, KEYS[0]: key["AccessKeyId"], KEYS[1]: key["SecretAccessKey"]}


@pytest.mark.parametrize("call", ["pin", "read", "write", "list"])
def test_keys_that_are_renewed_while_the_pod_runs_are_taken_up(
    s3: S3, proxy: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    hurry(monkeypatch)
    for name in KEYS:
        # What the pod was started with.
        monkeypatch.setenv(name, "AKIAOUTOFDATEOUTOFDA")
    monkeypatch.setenv("FINETUNE_CREDENTIALS", str(tmp_path / "credentials"))
    old, new = new_keys(s3), new_keys(s3)
    write(tmp_path, old)
    with impatient(proxy.endpoint, attempts=10) as store:
        pinned = store.pin("s3://bucket/x")
        s3.client("iam").delete_access_key(UserName=old["user"], AccessKeyId=old[KEYS[0]])

        def kubelet(request: Request) -> Fault | None:
            if len(proxy.requests) == 3:
                write(tmp_path, new)
            return None

        proxy.start(kubelet)
        calls = {
            "pin": lambda: store.pin("s3://bucket/x"),
            "read": lambda: store.get_bytes(pinned, 10),
            "write": lambda: store.put_bytes("s3://bucket/y", b"y"),
            "list": lambda: list(store.list("s3://bucket/")),
        }
        calls[call]()
        assert len(proxy.requests) >= 4


def test_keys_that_were_never_good_are_refused_at_once(
    proxy: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CREDENTIALS", str(tmp_path / "credentials"))
    write(tmp_path, {KEYS[0]: "AKIAUNKNOWNUNKNOWN00", KEYS[1]: "wrong"})
    with impatient(proxy.endpoint) as store, pytest.raises(FineTuneError, match="AWS_ACCESS_KEY_ID") as caught:
        store.pin("s3://bucket/x")
    assert caught.value.reason == Reason.STORAGE_DENIED
    assert len(proxy.requests) <= 3


def test_expired_keys_are_named_with_what_to_renew(store: Store, proxy: FaultyS3) -> None:
    proxy.start(lambda request: "expired")
    with pytest.raises(FineTuneError, match=r"expired \(AWS_SESSION_TOKEN\); renew the Secret of spec.cred") as caught:
        store.pin("s3://bucket/x")
    assert caught.value.reason == Reason.STORAGE_DENIED
    # boto3 asks after the bucket by itself where a HEAD is refused.
    assert [request.operation for request in proxy.requests] == ["HeadObject", "HeadBucket", "GetObject"]


def test_a_body_that_hardly_moves_is_asked_for_anew(store: Store, s3: S3, proxy: FaultyS3, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    s3.put("s3://bucket/slow", data)
    proxy.after = 300_000
    proxy.start(lambda request: "trickle" if request.operation == "GetObject" and request.number < 2 else None)
    store.download(Wanted(store.pin("s3://bucket/slow"), tmp_path / "slow"))
    assert (tmp_path / "slow").read_bytes() == data
    assert len([request for request in proxy.requests if request.operation == "GetObject"]) == 3


def test_a_body_that_never_moves_is_given_up(s3: S3, store: Store, proxy: FaultyS3) -> None:
    s3.put("s3://bucket/slow", bytes(100_000))
    pinned = store.pin("s3://bucket/slow")
    proxy.after = 10
    proxy.start(lambda request: "trickle")
    with (
        impatient(proxy.endpoint, attempts=2) as other,
        pytest.raises(FineTuneError, match="s3://bucket/slow") as caught,
    ):
        other.get_bytes(pinned, 1_000_000)
    assert caught.value.reason == Reason.STORAGE_UNAVAILABLE


_DOWNLOAD = """
import json, subprocess, sys
from pathlib import Path
from finetune_trainer.storage import Wanted
from finetune_api.failures import FineTuneError
from support.stored import impatient
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], check=True)
with impatient(sys.argv[2]) as store:
    try:
        store.download(Wanted(store.pin("s3://bucket/big"), disk / "model" / "big"))
    except FineTuneError as error:
        print(json.dumps([error.reason, str(error), [str(path) for path in disk.rglob("*") if path.is_file()]]))
"""


def test_a_disk_that_fills_up_is_said_in_one_sentence(s3: S3, tmp_path: Path) -> None:
    own_mounts = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*own_mounts, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    s3.put("s3://bucket/big", bytes(2**20))
    done = subprocess.run(
        [*own_mounts, sys.executable, "-c", _DOWNLOAD, str(tmp_path), s3.endpoint],
        env=os.environ | s3.environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reason, text, left = json.loads(done.stdout)
    assert reason == Reason.DOES_NOT_FIT
    assert text.startswith(f"cannot write {tmp_path}/model/big: the work volume is full (No space left on device; ")
    assert "spec.resources.ephemeralStorage" in text
    assert left == []


def test_only_uploads_below_the_own_prefix_are_swept(store: Store, s3: S3) -> None:
    client = s3.client()
    for key in ("out/bot/uid-1/weights", "out/bot/uid-1/sub/x", "out/bot/uid-10/weights", "out/other/uid-1/weights"):
        client.create_multipart_upload(Bucket="bucket", Key=key)
    assert store.sweep_uploads("s3://bucket/out/bot/uid-1/") == 2
    assert sorted(unfinished(s3)) == ["out/bot/uid-10/weights", "out/other/uid-1/weights"]
    for prefix in ("s3://bucket/", "s3://bucket", "s3://bucket/out/bot/uid-1"):
        with pytest.raises(ValueError, match="is not the prefix of one job"):
            store.sweep_uploads(prefix)
    clean(s3, "out/")


def test_who_may_not_list_uploads_sweeps_none(store: Store) -> None:
    assert store.sweep_uploads("s3://forbidden/out/") == 0


def test_an_upload_whose_beginning_was_not_answered_leaves_none_behind(
    store: Store, s3: S3, proxy: FaultyS3, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(bytes(5 * 2**20 + 10))
    begins = "CreateMultipartUpload"
    proxy.start(lambda request: "reset after commit" if (request.operation, request.number) == (begins, 0) else None)
    store.upload(tmp_path / "f", "s3://bucket/begun/f")
    assert [request.operation for request in proxy.requests].count(begins) == 2
    assert unfinished(s3, "begun/") == []
    clean(s3, "begun/")
