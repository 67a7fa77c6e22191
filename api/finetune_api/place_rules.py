"""Where a job may not write: in what a job reads, which would then not be the same for the next one."""

from collections.abc import Iterator
from typing import Any

from finetune_api.job import FineTuneJobSpec
from finetune_api.model import Path, Problem, format_path

_URIS = ("uri", "adapterUri")


def problems(spec: FineTuneJobSpec) -> Iterator[Problem]:
    written: list[tuple[Path, str]] = [(("spec", "output", "uri"), spec.output.uri)]
    if spec.checkpoint.uri:
        written.append((("spec", "checkpoint", "uri"), spec.checkpoint.uri))
    for path, place in written:
        for source, uri in inputs(spec):
            # A dataset may be one file; a model never is.
            whole = uri if uri.endswith("/") or "datasets" in source else f"{uri}/"
            if whole.endswith("/") and f"{place.rstrip('/')}/".startswith(whole):
                text = f"found {place}, which lies in what {format_path(source)} reads, {uri}; write outside of it"
                yield Problem(path, text)
    for source, uri in inputs(spec):
        for _, place in written:
            if "datasets" in source and uri.startswith(f"{place.rstrip('/')}/.scratch/"):
                text = f"found {uri}, which is scratch data of a job and may be deleted at any time; copy it elsewhere"
                yield Problem(source, text)


def inputs(spec: FineTuneJobSpec) -> Iterator[tuple[Path, str]]:
    """Every s3:// URI that is read, with its field as the user wrote it."""
    fields = spec.model_dump(by_alias=True, exclude_none=True, exclude={"output", "checkpoint", "tracking"})
    yield from _uris(fields, ("spec",))


def _uris(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    if isinstance(value, dict):
        for name, member in value.items():
            if name in _URIS and isinstance(member, str) and member.startswith("s3://"):
                yield (*path, name), member
            else:
                yield from _uris(member, (*path, name))
    elif isinstance(value, list):
        for index, member in enumerate(value):
            yield from _uris(member, (*path, index))
