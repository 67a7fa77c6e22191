"""What prepare finds out about the store before it reads anything: places, regions, keys, and how long they last."""

import base64
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.credentials import Credentials

from finetune_api.failures import FineTuneError, Reason
from finetune_api.manifest import RunInfo
from finetune_api.run import RunConfig, StorageConfig
from finetune_trainer.credentials import expiry_of
from finetune_trainer.preflight import check_expiry, check_owner, check_regions
from finetune_trainer.probe import probe
from finetune_trainer.publish import publish
from finetune_trainer.storage import Store
from support.faulty_s3 import Fault, FaultyS3, running_faulty_s3
from support.runs import JOB_UID, make_run_config
from support.s3 import S3, running_s3
from support.stored import clean, hurry, impatient

pytestmark = pytest.mark.faults
NOW = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        where = {"LocationConstraint": "eu-central-1"}
        server.client().create_bucket(Bucket="elsewhere", CreateBucketConfiguration=where)
        yield server


@pytest.fixture
def store(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    hurry(monkeypatch)
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with impatient(s3.endpoint) as opened:
        yield opened
    clean(s3, "out/")


def token(**claims: Any) -> str:
    """A JSON Web Token that nobody signed."""
    parts = ({"alg": "none"}, claims)
    return ".".join([*(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts), "x"])


def test_a_token_that_says_when_it_ends_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(session_token: str | None) -> datetime.datetime | None:
        return expiry_of(Credentials("key", "secret", session_token))

    assert of(token(exp=NOW.timestamp())) == NOW
    for unknown in (None, "FwoGZXIvYXdzEBYaD", "a.b.c", token(sub="x"), token(exp="soon"), token(exp=1e300)):
        assert of(unknown) is None
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", "2026-03-01T12:00:00Z")
    assert of(None) == NOW
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", "tomorrow")
    assert of(None) is None
    assert expiry_of(None) is None


HOUR = datetime.timedelta(hours=1)


@pytest.mark.parametrize(
    ("expiry", "deadline", "text"),
    [
        (NOW - HOUR, None, "expires at 2026-03-01T11:00:00.00:00, which is over; renew the Secret"),
        (NOW + HOUR, 7200, "before the 7,200 s of spec.runPolicy.activeDeadlineSeconds are over"),
        (NOW + HOUR, 3000, ""),
        (NOW + HOUR, None, ""),
        (None, 7200, ""),
    ],
)
def test_keys_must_last_until_the_deadline(expiry: datetime.datetime | None, deadline: int | None, text: str) -> None:
    config = make_run_config(runPolicy={"activeDeadlineSeconds": deadline} if deadline else {})
    if not text:
        check_expiry(config, expiry, NOW)
        return
    with pytest.raises(FineTuneError, match=f"^spec.credentials: .*{text}") as caught:
        check_expiry(config, expiry, NOW)
    assert caught.value.reason == Reason.STORAGE_DENIED


def test_what_is_written_lies_in_the_region_that_is_spoken_to(
    store: Store, s3: S3, capsys: pytest.CaptureFixture[str]
) -> None:
    check_regions(store, make_run_config())
    away = "s3://elsewhere/out/"
    checkpoint = make_run_config(checkpoint={"uri": away}).model_copy(
        update={"scratch_uri": f"{away}.scratch/{JOB_UID}/"}
    )
    for config, field in ((make_run_config(output={"uri": away}), "output"), (checkpoint, "checkpoint")):
        text = f"^spec.{field}.uri: the bucket elsewhere is in the region eu-central-1, .*storage.region is us-east-1"
        with pytest.raises(FineTuneError, match=text) as caught:
            check_regions(store, config)
        assert caught.value.reason == Reason.STORAGE_DENIED
    # Reading from another region works, and costs; and an endpoint may call its region what it likes.
    for config, field in (
        (make_run_config(baseModel={"uri": "s3://elsewhere/m/"}), "spec.baseModel.uri"),
        (make_run_config(endpoint=s3.endpoint, output={"uri": away}), "spec.output.uri"),
    ):
        capsys.readouterr()
        check_regions(store, config)
        (line,) = capsys.readouterr().out.splitlines()
        assert json.loads(line)["field"] == field
    # Whom nobody tells the region goes on.
    check_regions(store, make_run_config(output={"uri": "s3://nowhere/out/"}))


def encrypting(endpoint: str) -> Store:
    config = StorageConfig(endpoint=endpoint, region="us-east-1", addressing_style="path", kms_key_id="key-1")
    return Store(config, attempts=2, timeout=5)


@pytest.fixture
def proxy(s3: S3) -> Iterator[FaultyS3]:
    with running_faulty_s3(s3.endpoint) as started:
        yield started


def test_a_key_is_tried_for_both_ways(store: Store, proxy: FaultyS3, s3: S3) -> None:
    uri = "s3://bucket/out/bot/"
    with encrypting(proxy.endpoint) as other:
        assert probe(other, uri, "uid", "spec.output.uri")
        denied: list[tuple[str, Fault, str]] = [
            ("PutObject", "no encryption", r"cannot write \S+: the credentials do not allow kms:GenerateDataKey with "),
            ("GetObject", "no decryption", r"cannot read \S+: the credentials do not allow kms:Decrypt with the key"),
            (
                "PutObject",
                "no key",
                r"cannot write \S+: the profile's storage.kmsKeyId names a key that does not exist",
            ),
        ]
        for operation, fault, text in denied:
            proxy.start(lambda request, o=operation, f=fault: f if request.operation == o else None)  # type: ignore[misc]
            with pytest.raises(FineTuneError, match=f"^spec.output.uri: {text}") as caught:
                probe(other, uri, "uid", "spec.output.uri")
            assert caught.value.reason == Reason.STORAGE_DENIED
        proxy.start()
    # A store that takes the key's name and says nothing of it.
    proxy.start(lambda request: "silent on encryption" if request.operation == "HeadObject" else None)
    text = "does not encrypt .* with the profile's storage.kmsKeyId"
    with encrypting(proxy.endpoint) as other, pytest.raises(FineTuneError, match=text):
        probe(other, uri, "uid", "spec.output.uri")
    assert s3.keys("bucket", "out/") == []


def published(store: Store, folder: Path, namespace: str, job: str) -> RunConfig:
    """As if that job had run; the configuration of team-a/bot."""
    config = make_run_config(endpoint="http://unused")
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    run = RunInfo(
        namespace=namespace,
        job=job,
        job_uid="other",
        attempt=0,
        attempt_uid="uid",
        spec_sha256="0" * 64,
        base_model_uri="s3://bucket/m/",
        base_model_sha256="0" * 64,
        datasets_sha256={},
    )
    uri = f"s3://bucket/out/{job}/uid/"
    publish(store, folder, uri, kind="Adapter", step=1, created_time="2026-01-01T00:00:00Z", run=run)
    return config


def test_an_output_that_is_another_jobs_is_refused(store: Store, s3: S3, tmp_path: Path) -> None:
    config = published(store, tmp_path / "a", "team-b", "bot")
    text = (
        "^spec.output.uri: s3://bucket/out/bot/ holds what team-b/bot published; choose another output.uri or job name"
    )
    with pytest.raises(FineTuneError, match=text) as caught:
        check_owner(store, config)
    assert caught.value.reason == Reason.STORAGE_DENIED


def test_an_output_within_an_artifact_is_refused(store: Store, tmp_path: Path) -> None:
    published(store, tmp_path / "a", "team-a", "other")
    for uri in ("s3://bucket/out/other/uid/", "s3://bucket/out/other/uid", "s3://bucket/out/other/uid/deeper/"):
        config = make_run_config(endpoint="http://unused", output={"uri": uri})
        with pytest.raises(
            FineTuneError, match=r"^spec.output.uri: found .*, which lies in what team-a/other published"
        ):
            check_owner(store, config)


def test_ones_own_earlier_artifacts_and_what_is_no_artifact_are_no_obstacle(
    store: Store, s3: S3, tmp_path: Path
) -> None:
    config = published(store, tmp_path / "a", "team-a", "bot")
    s3.put("s3://bucket/out/manifest.json", b"somebody else's idea of a manifest")
    s3.put("s3://bucket/out/bot/x/manifest.json", b"{}")
    check_owner(store, config)
