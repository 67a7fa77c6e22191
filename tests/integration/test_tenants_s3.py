"""Two tenants at one object store, with signatures, users' policies and bucket policies: neither gets at the other's.

Each has a bucket, and a prefix in a bucket that both share. moto looks neither at the conditions of a policy nor at the
rights on what a copy reads, so that who may list a shared bucket, and copy from another's, is not tried here.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import StorageConfig
from finetune_cli import __main__ as entry
from finetune_sandbox.s3 import S3, Credentials
from finetune_trainer.publish import fetch_verified
from finetune_trainer.storage import Store

pytestmark = pytest.mark.integration
SHARED = "shared"
ADAPTER = "adapters/bot/uid/"


@dataclass(frozen=True)
class Tenant:
    name: str
    keys: Credentials

    @property
    def places(self) -> tuple[str, str]:
        """Bucket and prefix, of their own and of what is theirs of the shared one."""
        return f"s3://{self.name}/{ADAPTER}", f"s3://{SHARED}/{self.name}/{ADAPTER}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    async def start() -> S3:
        return await S3.start(tmp_path_factory.mktemp("s3"))

    with asyncio.Runner() as runner:
        found = runner.run(start())
        yield found
        runner.run(found.stop())


@pytest.fixture(scope="module")
def tenants(server: S3) -> tuple[Tenant, Tenant]:
    """Of the names the first begins the second's: prefixes must end where names do."""
    server.create_bucket(SHARED)
    found = []
    for name in ("team-a", "team-ab"):
        server.create_bucket(name)
        keys = server.create_user(name, [name, f"{SHARED}/{name}"])
        for uri in Tenant(name, keys).places:
            bucket, _, prefix = uri.removeprefix("s3://").partition("/")
            for key in ("adapter_model.safetensors", "adapter_config.json", "manifest.json"):
                server.client().put_object(Bucket=bucket, Key=prefix + key, Body=f"of {name}".encode())
        found.append(Tenant(name, keys))
    return found[0], found[1]


def calls(theirs: Tenant, own: Tenant) -> dict[str, Callable[[Any], Any]]:
    """What the second may try with a client of the first's."""
    tried: dict[str, Callable[[Any], Any]] = {}
    for uri in theirs.places:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        key = f"{prefix}adapter_model.safetensors"
        at = {"Bucket": bucket, "Key": key}
        tried |= {
            f"get {uri}": lambda c, at=at: c.get_object(**at),
            f"get a range of {uri}": lambda c, at=at: c.get_object(**at, Range="bytes=0-1"),
            f"head {uri}": lambda c, at=at: c.head_object(**at),
            f"put {uri}": lambda c, at=at: c.put_object(**at, Body=b"x"),
            f"put beside {uri}": lambda c, b=bucket, p=prefix: c.put_object(Bucket=b, Key=f"{p}x", Body=b"x"),
            f"delete {uri}": lambda c, at=at: c.delete_object(**at),
            f"begin an upload to {uri}": lambda c, at=at: c.create_multipart_upload(**at),
            f"copy to {uri}": lambda c, at=at, o=own: c.copy_object(
                **at, CopySource={"Bucket": o.name, "Key": f"{ADAPTER}manifest.json"}
            ),
            f"tags of {uri}": lambda c, at=at: c.get_object_tagging(**at),
            f"acl of {uri}": lambda c, at=at: c.put_object_acl(**at, ACL="public-read"),
        }
    bucket = theirs.name
    policy = json.dumps({"Version": "2012-10-17", "Statement": []})
    return tried | {
        "list": lambda c: c.list_objects_v2(Bucket=bucket),
        "list versions": lambda c: c.list_object_versions(Bucket=bucket),
        "list uploads": lambda c: c.list_multipart_uploads(Bucket=bucket),
        "where it is": lambda c: c.get_bucket_location(Bucket=bucket),
        "read the policy": lambda c: c.get_bucket_policy(Bucket=bucket),
        "write the policy": lambda c: c.put_bucket_policy(Bucket=bucket, Policy=policy),
        "delete the bucket": lambda c: c.delete_bucket(Bucket=bucket),
        "all buckets": lambda c: c.list_buckets(),
    }


@pytest.mark.parametrize("turned", [False, True], ids=["a at b", "b at a"])
def test_the_store_refuses_every_call(server: S3, tenants: tuple[Tenant, Tenant], turned: bool) -> None:
    own, theirs = reversed(tenants) if turned else tenants
    client = server.client(own.keys)
    assert client.get_object(Bucket=own.name, Key=f"{ADAPTER}manifest.json")["Body"].read()
    answers = {}
    for name, call in calls(theirs, own).items():
        try:
            call(client)
        except ClientError as error:
            answers[name] = int(error.response["ResponseMetadata"]["HTTPStatusCode"])
        else:
            answers[name] = 200
    assert {name: status for name, status in answers.items() if status != 403} == {}


def test_keys_that_are_not_right_open_nothing(server: S3, tenants: tuple[Tenant, Tenant]) -> None:
    own, theirs = tenants
    mixed = Credentials(theirs.keys.access_key_id, own.keys.secret_access_key)
    for keys in (mixed, Credentials("nobody", "nothing")):
        with pytest.raises(ClientError) as caught:
            server.client(keys).get_object(Bucket=theirs.name, Key=f"{ADAPTER}manifest.json")
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_a_bucket_policy_holds_against_a_user_who_may_do_everything(server: S3, tenants: tuple[Tenant, Tenant]) -> None:
    _, theirs = tenants
    server.create_bucket("guarded")
    server.client().put_object(Bucket="guarded", Key="x", Body=b"1")
    careless = server.client(server.create_user("careless", ["guarded", theirs.name]))
    assert careless.get_object(Bucket="guarded", Key="x")["Body"].read() == b"1"
    statement = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": ["s3:GetObject", "s3:PutObject"],
        "Resource": "arn:aws:s3:::guarded/*",
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    server.client().put_bucket_policy(Bucket="guarded", Policy=policy)
    for call in (
        lambda: careless.get_object(Bucket="guarded", Key="x"),
        lambda: careless.put_object(Bucket="guarded", Key="y", Body=b"2"),
    ):
        with pytest.raises(ClientError, match=r"AccessDenied|403"):
            call()


@pytest.fixture
def store(server: S3, tenants: tuple[Tenant, Tenant], monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """What a pod of the first tenant reaches the store by."""
    keys = tenants[0].keys
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys.secret_access_key)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    config = StorageConfig(endpoint=server.endpoint, region="us-east-1", addressing_style="path")
    with Store(config, attempts=2) as made:
        yield made


def test_a_pod_of_one_says_what_it_may_not_read_or_write(
    store: Store, tenants: tuple[Tenant, Tenant], tmp_path: Path
) -> None:
    _, theirs = tenants
    (tmp_path / "x").write_bytes(b"x")
    for uri in theirs.places:
        tried: dict[str, Callable[[], Any]] = {
            "read": lambda uri=uri: store.get_bytes(f"{uri}manifest.json", 100),
            "pin": lambda uri=uri: store.pin(f"{uri}adapter_model.safetensors"),
            "write": lambda uri=uri: store.put_bytes(f"{uri}x", b"x"),
            "write once": lambda uri=uri: store.put_if_absent(f"{uri}manifest2.json", b"x"),
            "upload": lambda uri=uri: store.upload(tmp_path / "x", f"{uri}x"),
            "delete": lambda uri=uri: store.delete(f"{uri}manifest.json"),
            "scratch": lambda uri=uri: store.put_bytes(f"{uri}.scratch/uid/x", b"x"),
            "adapter": lambda uri=uri: fetch_verified(store, uri, tmp_path / "adapter"),
        }
        for name, call in tried.items():
            with pytest.raises(FineTuneError) as caught:
                call()
            assert caught.value.reason is Reason.STORAGE_DENIED, name
            assert theirs.name in str(caught.value), name
    with pytest.raises(FineTuneError) as caught:
        list(store.list(theirs.places[0]))
    assert caught.value.reason is Reason.STORAGE_DENIED
    assert not (tmp_path / "adapter").exists() or not list((tmp_path / "adapter").iterdir())


def test_fetch_of_the_others_adapter_brings_nothing(
    server: S3, store: Store, tenants: tuple[Tenant, Tenant], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, theirs = tenants
    for uri in theirs.places:
        words = ["fetch", uri, "-o", str(tmp_path / "got"), "--endpoint", server.endpoint]
        assert entry.run(entry.cli, "finetune", words) != 0
        assert theirs.name in capsys.readouterr().err
        assert not (tmp_path / "got").exists()
