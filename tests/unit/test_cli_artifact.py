"""`finetune fetch`: what a manifest may name, and what must be there."""

import pytest

from finetune_api.manifest import FileEntry
from finetune_cli import artifact
from finetune_cli.errors import CliError
from finetune_cli.objectstore import Access, Location

HERE = Location("out", "bot/uid/")


def entries(*keys: str) -> list[FileEntry]:
    return [FileEntry(key=key, size=1, sha256="0" * 64) for key in keys]


def test_a_manifest_that_names_what_is_there_is_taken() -> None:
    artifact.check_keys(entries("a.bin", "deep/er/b.json"), ["deep/er/b.json", "a.bin"], HERE)


@pytest.mark.parametrize(
    "key",
    ["/etc/passwd", "../up", "a/../../up", "a//b", "./a", "a/", "a\\..\\b", "a\nb", "manifest.json", ".."],
)
def test_a_key_that_could_leave_the_folder_is_refused(key: str) -> None:
    with pytest.raises(CliError, match="no plain relative path"):
        artifact.check_keys(entries(key), [key], HERE)


@pytest.mark.parametrize(
    ("named", "present", "message"),
    [
        (["a", "b"], ["a"], "is not whole: b is missing"),
        (["a"], ["a", "b"], "holds b, which its manifest does not name"),
        (["a", "a"], ["a"], "names a file twice"),
    ],
)
def test_a_manifest_that_differs_from_what_is_there_is_refused(
    named: list[str], present: list[str], message: str
) -> None:
    with pytest.raises(CliError, match=message):
        artifact.check_keys(entries(*named), present, HERE)


def test_what_is_no_manifest_names_the_field() -> None:
    with pytest.raises(CliError, match=r"s3://out/bot/uid/manifest.json is not a manifest: files: "):
        artifact.parse(b'{"kind": "Adapter", "step": 1, "createdTime": "x"}', HERE)


@pytest.mark.parametrize(
    ("uri", "location"),
    [("s3://abc", Location("abc")), ("s3://abc/", Location("abc")), ("s3://a.b/c d/é", Location("a.b", "c d/é"))],
)
def test_locations_are_read(uri: str, location: Location) -> None:
    assert Location.parse(uri) == location


@pytest.mark.parametrize("uri", ["", "abc", "s3://", "s3://A/b", "http://abc/d", "s3:/abc"])
def test_what_is_no_location_is_refused(uri: str) -> None:
    with pytest.raises(CliError, match="no S3 URI"):
        Location.parse(uri)


@pytest.mark.parametrize(
    ("prefix", "key", "text"),
    [("", "a", "s3://b-1/a"), ("p", "a", "s3://b-1/p/a"), ("p/", "a", "s3://b-1/p/a"), ("p", "", "s3://b-1/p/")],
)
def test_keys_are_joined_with_one_slash(prefix: str, key: str, text: str) -> None:
    assert str(Location("b-1", prefix) / key) == text


def test_access_is_that_of_the_profile_and_the_secret() -> None:
    access = Access.of({"endpoint": "http://s3", "addressingStyle": "path"}, {"AWS_ACCESS_KEY_ID": "k"})
    assert (access.endpoint, access.addressing_style, access.access_key_id, access.region) == (
        "http://s3",
        "path",
        "k",
        None,
    )
