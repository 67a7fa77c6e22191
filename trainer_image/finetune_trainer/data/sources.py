"""The files of a data set: found, pinned, and read row by row."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from finetune_api.dataset import Dataset, Holdout
from finetune_api.evaluation import Retention
from finetune_api.failures import FineTuneError, Reason
from finetune_api.job import FineTuneJobSpec
from finetune_api.run import PinnedObject, Split
from finetune_trainer.data.readers import EXTENSIONS, Row, kind_of, read_parquet, read_stream
from finetune_trainer.storage import Store, Wanted
from finetune_trainer.storage_errors import ObjectMissing

KEYS, FILES, IGNORED = 100_000, 10_000, 1000
"""Objects below the prefix of a data set, data files among them, and others that the report names."""


class Source(NamedTuple):
    dataset: Dataset
    field: str
    """Where the spec names it: `spec.datasets[0]`."""
    split: Split | None
    """The split that all of it belongs to; None where each row's content decides."""
    files: list[PinnedObject]
    ignored: list[str]
    """Objects below the prefix that are not data by their names."""


def sources(store: Store, spec: FineTuneJobSpec) -> list[Source]:
    """Every data set with its files as they are now, held-out ones first. Raises with the spec's field named."""
    named: list[tuple[str, Split | None, Dataset]] = []
    held_out: tuple[tuple[str, Split, Holdout | Retention | None], ...] = (
        ("spec.validation", "validation", spec.validation),
        ("spec.test", "test", spec.test),
        ("spec.evaluation.retention", "retention", spec.evaluation.retention),
    )
    for field, split, holdout in held_out:
        if holdout and holdout.datasets:
            named += [(f"{field}.datasets[{i}]", split, d) for i, d in enumerate(holdout.datasets)]
    named += [(f"spec.datasets[{i}]", None, d) for i, d in enumerate(spec.datasets)]
    return [_source(store, dataset, field, split) for field, split, dataset in named]


def _source(store: Store, dataset: Dataset, field: str, split: Split | None) -> Source:
    try:
        if dataset.uri.endswith("/"):
            chosen, ignored = _below(store, dataset.uri)
            if not chosen:
                raise FineTuneError(Reason.DATA_INVALID, f"{dataset.uri} has {_nothing(ignored)}")
            return Source(dataset, field, split, store.pin_all(chosen), ignored)
        if kind_of(dataset.uri) is None:
            _refuse_name(store, dataset.uri)
        return Source(dataset, field, split, [store.pin(dataset.uri)], [])
    except FineTuneError as error:
        raise FineTuneError(error.reason, f"{field}.uri: {error}") from error


def _below(store: Store, prefix: str) -> tuple[list[str], list[str]]:
    """The data files below a prefix, and the first of the others. Raises DataInvalid where there are too many."""
    chosen: list[str] = []
    ignored: list[str] = []
    for number, item in enumerate(store.list(prefix), 1):
        if number > KEYS:
            raise FineTuneError(
                Reason.DATA_INVALID, f"{prefix} has more than {KEYS:,} objects; name a prefix that holds the data alone"
            )
        if not kind_of(item.uri) or _hidden(item.uri):
            ignored += [item.uri] if len(ignored) < IGNORED else []
            continue
        chosen.append(item.uri)
        if len(chosen) > FILES:
            raise FineTuneError(
                Reason.DATA_INVALID,
                f"{prefix} has more than {FILES:,} data files; write its rows to fewer, larger ones",
            )
    return chosen, ignored


def _hidden(uri: str) -> bool:
    return uri.rpartition("/")[2].startswith((".", "_"))


def _nothing(ignored: list[str]) -> str:
    kinds = ", ".join(EXTENSIONS)
    return f"no file of a known kind ({kinds}); found {', '.join(ignored[:5])}" if ignored else "nothing below it"


def _refuse_name(store: Store, uri: str) -> None:
    below = next(store.list(f"{uri}/"), None)
    if below is not None:
        raise FineTuneError(Reason.DATA_INVALID, f"{uri} is a prefix; write {uri}/ to read every file below it")
    try:
        store.pin(uri)
    except ObjectMissing as error:
        raise FineTuneError(Reason.DATA_INVALID, str(error)) from error
    raise FineTuneError(Reason.DATA_INVALID, f"{uri} is of no known kind; names end in {', '.join(EXTENSIONS)}")


def rows(store: Store, pinned: PinnedObject, folder: Path) -> Iterator[Row]:
    """The rows of one file. `folder` takes the file for as long as it is read, where it cannot be streamed."""
    if kind_of(pinned.uri) != ".parquet":
        with store.open_stream(pinned) as stream:
            yield from read_stream(stream, pinned.uri)
        return
    path = folder / "input.parquet"
    store.download(Wanted(pinned, path))
    try:
        yield from read_parquet(path, pinned.uri)
    finally:
        path.unlink()
