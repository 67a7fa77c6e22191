"""What is in a pod's volumes."""

import base64
import stat
from pathlib import Path
from typing import Any

import pytest

from finetune_sandbox import volumes
from finetune_sandbox.environment import ConfigError, Place
from finetune_sandbox.volumes import File, Token

Obj = dict[str, Any]
PLACE = Place("n1", "127.0.0.1", "127.9.9.9", "seed", {"cpu": "4"})
SOURCES = {
    ("Secret", "s"): {"kind": "Secret", "data": {"key": base64.b64encode(b"\x00\xff").decode()}},
    ("ConfigMap", "c"): {
        "kind": "ConfigMap",
        "data": {"a": "1"},
        "binaryData": {"b": base64.b64encode(b"\xff").decode()},
    },
}


def make_pod(*found: Obj) -> Obj:
    named = [{"name": f"v{number}"} | volume for number, volume in enumerate(found)]
    metadata = {"name": "p", "namespace": "ns", "uid": "u", "labels": {"l": "x"}}
    return {"metadata": metadata, "spec": {"containers": [], "volumes": named}}


@pytest.mark.parametrize(
    ("volume", "expected"),
    [
        ({"emptyDir": {}}, {}),
        ({"configMap": {"name": "c"}}, {"a": File(b"1", 0o444), "b": File(b"\xff", 0o444)}),
        ({"secret": {"secretName": "s", "defaultMode": 0o400}}, {"key": File(b"\x00\xff", 0o400)}),
        (
            {"configMap": {"name": "c", "items": [{"key": "a", "path": "d/e", "mode": 0o777}]}},
            {"d/e": File(b"1", 0o555)},
        ),
        ({"configMap": {"name": "absent", "optional": True}}, {}),
        (
            {"downwardAPI": {"items": [{"path": "l", "fieldRef": {"fieldPath": "metadata.labels['l']"}}]}},
            {"l": File(b"x", 0o444)},
        ),
        (
            {"projected": {"sources": [{"configMap": {"name": "c"}}, {"secret": {"name": "s"}}]}},
            {"a": File(b"1", 0o444), "b": File(b"\xff", 0o444), "key": File(b"\x00\xff", 0o444)},
        ),
    ],
)
def test_files(volume: Obj, expected: dict[str, File]) -> None:
    pod = make_pod(volume)
    volumes.check(pod)
    assert volumes.files(pod, pod["spec"]["volumes"][0], SOURCES, PLACE) == expected


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        ({"configMap": {"name": "absent"}}, 'configmap "absent" not found'),
        ({"secret": {"secretName": "s", "items": [{"key": "no", "path": "x"}]}}, "non-existent secret key: no"),
        ({"configMap": {"name": "c", "items": [{"key": "a", "path": "../x"}]}}, "must be relative"),
    ],
)
def test_what_is_wrong_is_named(volume: Obj, message: str) -> None:
    pod = make_pod(volume)
    with pytest.raises(ConfigError, match=message):
        volumes.files(pod, pod["spec"]["volumes"][0], SOURCES, PLACE)


@pytest.mark.parametrize(
    ("volume", "named"),
    [
        ({"hostPath": {"path": "/"}}, "hostPath"),
        ({"persistentVolumeClaim": {"claimName": "x"}}, "persistentVolumeClaim"),
        ({"projected": {"sources": [{"clusterTrustBundle": {}}]}}, "clusterTrustBundle"),
    ],
)
def test_what_is_not_a_folder_is_refused(volume: Obj, named: str) -> None:
    with pytest.raises(volumes.UnsupportedVolume, match=named):
        volumes.check(make_pod(volume))


def test_what_a_pod_needs_is_known_beforehand() -> None:
    token = {"serviceAccountToken": {"path": "token", "audience": "a", "expirationSeconds": 600}}
    pod = make_pod(
        {"configMap": {"name": "c"}},
        {"projected": {"sources": [token, {"secret": {"name": "s"}}, {"configMap": {"name": "d"}}]}},
    )
    assert volumes.volume_sources(pod) == {("ConfigMap", "c"), ("ConfigMap", "d"), ("Secret", "s")}
    assert volumes.tokens(pod) == [Token("v1", "token", "a", 600)]


def test_written_files_are_read_only_and_replaced_in_one_step(tmp_path: Path) -> None:
    volumes.write_files(tmp_path, {"d/a": File(b"1", 0o444)})
    with (tmp_path / "d/a").open("rb") as before:
        volumes.write_files(tmp_path, {"d/a": File(b"22", 0o400)})
        assert before.read() == b"1"
    assert (tmp_path / "d/a").read_bytes() == b"22"
    assert stat.S_IMODE((tmp_path / "d/a").stat().st_mode) == 0o400
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["a"]
