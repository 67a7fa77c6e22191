"""Before anything costs anything: can this job write, read and delete where it will have to, and encrypt?"""

from finetune_api.failures import FineTuneError, Reason
from finetune_trainer import log
from finetune_trainer.storage import Store, join
from finetune_trainer.storage_errors import AlreadyExists


def probe(store: Store, prefix: str, uid: str, field: str) -> bool:
    """Writes, reads and deletes `<prefix>.probe-<uid>`, nothing else. Raises StorageDenied with the spec's field named.

    Whether the store honours `If-None-Match`: some answer it with success, and overwrite.
    """
    uri = join(prefix, f".probe-{uid}")
    try:
        store.put_bytes(uri, b"probe")
        try:
            # With a key of ones own this decrypts, too.
            if store.get_bytes(uri, 100) != b"probe":
                raise FineTuneError(Reason.STORAGE_UNAVAILABLE, f"{uri} does not read back as it was written")
            _is_encrypted(store, uri)
            return _refuses_overwriting(store, uri)
        finally:
            store.delete(uri)
    except FineTuneError as error:
        # A missing bucket or key here is a matter of rights, not of the data.
        reason = Reason.STORAGE_DENIED if error.reason == Reason.DATA_INVALID else error.reason
        raise FineTuneError(reason, f"{field}: {error}") from error


def _is_encrypted(store: Store, uri: str) -> None:
    if store.kms_key_id and (found := store.encryption_of(uri)) != "aws:kms":
        raise FineTuneError(
            Reason.STORAGE_DENIED,
            f"the store does not encrypt {uri} with the profile's storage.kmsKeyId (it says {found})",
        )


def _refuses_overwriting(store: Store, uri: str) -> bool:
    try:
        store.put_if_absent(uri, b"other")
    except AlreadyExists:
        return True
    log.event("the store ignores If-None-Match; attempts are kept apart by waiting", level="warning", uri=uri)
    return False
