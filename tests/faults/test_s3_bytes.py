"""Whatever becomes of a byte that was published or saved, a reader notices."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api.failures import FineTuneError
from finetune_api.manifest import MANIFEST_KEY, Manifest
from finetune_trainer.publish import Published, fetch_verified, publish
from finetune_trainer.storage import Store
from support.s3 import S3, running_s3
from support.stored import impatient
from support.tally import Tally

pytestmark = pytest.mark.faults
URI = "s3://bucket/adapters/bot/attempt-uid"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture
def store(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with impatient(s3.endpoint, attempts=2) as opened:
        yield opened


@pytest.fixture
def published(store: Store, tmp_path: Path) -> Published:
    folder = tmp_path / "artifact"
    (folder / "sub").mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "empty").write_bytes(b"")
    (folder / "sub" / "weights").write_bytes(bytes(range(256)) * 4)
    return publish(store, folder, URI, kind="Adapter", step=3, created_time="2026-01-01T00:00:00Z", world_size=2)


FILES = {"adapter_config.json": 8, "empty": 0, "sub/weights": 1024, MANIFEST_KEY: 0}


def damaged(data: bytes, place: int, mask: int, how: str) -> bytes:
    """Other bytes than these."""
    at = place % max(1, len(data))
    if how == "cut" and data:
        return data[:at]
    if how == "added" or not data:
        return data[:at] + bytes([mask]) + data[at:]
    if how == "doubled":
        return data + data
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def test_every_damaged_byte_is_noticed(
    store: Store, s3: S3, published: Published, tmp_path: Path, whole: bool, tally: Tally
) -> None:
    good = {name: s3.get(f"{URI}/{name}") for name in FILES}
    manifest = Manifest.model_validate_json(good[MANIFEST_KEY])
    results: dict[str, str] = {}

    # Nothing is random where the tests of a commit are to be the same every time.
    @settings(
        max_examples=600 if whole else 40,
        deadline=None,
        derandomize=not whole,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        name=st.sampled_from(sorted(FILES)),
        place=st.integers(0, 4095),
        mask=st.integers(1, 255),
        how=st.sampled_from(["flipped", "flipped", "cut", "added", "doubled"]),
        known=st.booleans(),
    )
    def damage(name: str, place: int, mask: int, how: str, known: bool) -> None:
        case = f"{name}, {how} at {place} by {mask}, {'with' if known else 'without'} the manifest's hash"
        s3.put(f"{URI}/{name}", damaged(good[name], place, mask, how))
        try:
            found = fetch_verified(
                store,
                f"{URI}/{MANIFEST_KEY}",
                tmp_path / "fetched",
                sha256=published.manifest_sha256 if known else None,
            )
            results[case] = said_otherwise(manifest, found) if name == MANIFEST_KEY and not known else "not noticed"
        except FineTuneError as error:
            results[case] = "" if URI in str(error) else f"it does not say where: {error}"
        finally:
            s3.put(f"{URI}/{name}", good[name])

    damage()
    fetch_verified(store, f"{URI}/{MANIFEST_KEY}", tmp_path / "whole", sha256=published.manifest_sha256)
    tally.count("S3: a byte is damaged", results)


def said_otherwise(manifest: Manifest, found: Manifest) -> str:
    """Who resumes has no hash of the manifest; of what a reader goes by nothing may have changed unnoticed."""
    told, meant = ((value.kind, value.step, value.files, value.spec_sha256, value.run) for value in (found, manifest))
    return "" if told == meant else f"not noticed: {found}"
