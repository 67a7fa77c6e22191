"""Before anything costs anything: can this job write, read and delete where it will have to?"""

from finetune_api.failures import FineTuneError, Reason
from finetune_trainer.storage import Store, join
from finetune_trainer.storage_errors import AlreadyExists


def probe(store: Store, prefix: str, uid: str, field: str) -> None:
    """Writes, reads and deletes `<prefix>.probe-<uid>`, nothing else. Raises StorageDenied with the spec's field named.

    A store that ignores `If-None-Match` is refused: two attempts could publish over each other there.
    """
    uri = join(prefix, f".probe-{uid}")
    try:
        store.put_bytes(uri, b"probe")
        try:
            if store.get_bytes(uri, 100) != b"probe":
                raise FineTuneError(Reason.STORAGE_UNAVAILABLE, f"{uri} does not read back as it was written")
            _refuses_overwriting(store, uri)
        finally:
            store.delete(uri)
    except FineTuneError as error:
        # A missing bucket or key here is a matter of rights, not of the data.
        reason = Reason.STORAGE_DENIED if error.reason == Reason.DATA_INVALID else error.reason
        raise FineTuneError(reason, f"{field}: {error}") from error


def _refuses_overwriting(store: Store, uri: str) -> None:
    try:
        store.put_if_absent(uri, b"other")
    except AlreadyExists:
        return
    raise FineTuneError(
        Reason.STORAGE_DENIED,
        f"the store of {uri} ignores If-None-Match, without which nothing can be published safely",
    )
