"""What can be known of the store before anything is read: the right place, for long enough, and nobody else's?"""

import datetime
import os

from finetune_api.failures import FineTuneError, Reason
from finetune_api.manifest import MANIFEST_KEY, Manifest
from finetune_api.model import format_path
from finetune_api.place_rules import inputs
from finetune_api.run import RunConfig
from finetune_trainer import log
from finetune_trainer.publish import MANIFEST_LIMIT, parse_manifest
from finetune_trainer.storage import Store, join, parse

EARLIER = 20
"""Artifacts below the job's prefix that are asked whose they are."""


def check_access(store: Store, config: RunConfig) -> None:
    """Before the first write. Raises StorageDenied, with the spec's field named."""
    check_expiry(config, store.expiry(), datetime.datetime.now(datetime.UTC))
    check_regions(store, config)


def check_expiry(config: RunConfig, expiry: datetime.datetime | None, now: datetime.datetime) -> None:
    """Credentials must last until the deadline, where both are known."""
    if expiry is None:
        return
    said = f"spec.credentials: the session token expires at {expiry.isoformat(timespec='seconds')}"
    deadline = config.spec.run_policy.active_deadline_seconds
    if expiry <= now:
        raise FineTuneError(Reason.STORAGE_DENIED, f"{said}, which is over; renew the Secret and submit the job again")
    if deadline and expiry < now + datetime.timedelta(seconds=deadline):
        raise FineTuneError(
            Reason.STORAGE_DENIED,
            f"{said}, before the {deadline:,} s of spec.runPolicy.activeDeadlineSeconds are over; use keys that last, "
            "or a service account, which renews its own, or, where the Secret is renewed in time, no deadline",
        )
    log.event("the session token expires", level="warning", time=expiry.isoformat(timespec="seconds"))


def check_regions(store: Store, config: RunConfig) -> None:
    """What is written lies in the region that is spoken to; reading from another one only costs time and money.

    Where an endpoint is named it is that which is spoken to, whatever its region is called.
    """
    named = config.storage.endpoint or os.environ.get("AWS_ENDPOINT_URL")
    told: set[str] = set()
    written = [("spec.output.uri", config.output_uri)]
    if config.spec.checkpoint.uri:
        written.append(("spec.checkpoint.uri", config.scratch_uri))
    read = [(format_path(path), uri) for path, uri in inputs(config.spec)]
    for field, uri in written + read:
        bucket = parse(uri)[0]
        found = None if bucket in told else store.region_of(bucket)
        told.add(bucket)
        if found is None or found == store.region:
            continue
        if (field, uri) in written and not named:
            raise FineTuneError(
                Reason.STORAGE_DENIED,
                f"{field}: the bucket {bucket} is in the region {found}, and the profile's storage.region is "
                f"{store.region}; choose a bucket there, or a profile for {found}",
            )
        log.event("a bucket of another region", level="warning", field=field, bucket=bucket, region=found)


def check_owner(store: Store, config: RunConfig) -> None:
    """Neither within an artifact, nor where another job's artifacts lie. Raises StorageDenied, with the field named."""
    for prefix in _ancestors(config.spec.output.uri):
        if (manifest := _manifest(store, join(prefix, MANIFEST_KEY))) is not None:
            owner = f"what {_name(manifest)} published" if manifest.run else "an artifact"
            text = f"found {config.spec.output.uri}, which lies in {owner} ({prefix}); write outside of it"
            raise FineTuneError(Reason.STORAGE_DENIED, f"spec.output.uri: {text}")
    own = (config.namespace, config.job)
    for uri in _manifests_below(store, config.output_uri):
        manifest = _manifest(store, uri)
        if manifest and manifest.run and (manifest.run.namespace, manifest.run.job) != own:
            text = f"{config.output_uri} holds what {_name(manifest)} published; choose another output.uri or job name"
            raise FineTuneError(Reason.STORAGE_DENIED, f"spec.output.uri: {text}")


def _name(manifest: Manifest) -> str:
    return f"{manifest.run.namespace}/{manifest.run.job}" if manifest.run else "somebody"


def _ancestors(uri: str) -> list[str]:
    """The prefix itself and those above it, without the bucket."""
    bucket, key = parse(uri.rstrip("/"))
    parts = key.split("/") if key else []
    return [f"s3://{bucket}/{'/'.join(parts[:count])}/" for count in range(len(parts), 0, -1)]


def _manifests_below(store: Store, prefix: str) -> list[str]:
    found: list[str] = []
    for item in store.list(prefix):
        name = item.uri.removeprefix(prefix).split("/")
        if len(name) == 2 and name[1] == MANIFEST_KEY:
            found.append(item.uri)
        if len(found) == EARLIER:
            break
    return found


def _manifest(store: Store, uri: str) -> Manifest | None:
    """None where there is none that could be read: others' objects may bear this name."""
    try:
        return parse_manifest(store.get_bytes(uri, MANIFEST_LIMIT), uri)
    except FineTuneError as error:
        if error.reason not in (Reason.DATA_INVALID, Reason.STORAGE_DENIED):
            raise
        return None
