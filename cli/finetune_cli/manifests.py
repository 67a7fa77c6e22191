"""From a file to the cluster: the documents of `-f`, checked here first, then applied in their order."""

from dataclasses import dataclass
from typing import Any

from finetune_cli import cluster as clusters
from finetune_cli import files, lint
from finetune_cli.cluster import Cluster
from finetune_cli.errors import CliError, Exit
from finetune_cli.yamldoc import Document
from finetune_sandbox.client import ApiError, Object


@dataclass(frozen=True)
class Source:
    """One document and the file that it is of."""

    file: str
    document: Document

    @property
    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = self.document.data
        return manifest

    @property
    def is_job(self) -> bool:
        return bool(self.manifest["kind"] == "FineTuneJob")


def read(names: tuple[str, ...]) -> list[Source]:
    """The documents of the files. Raises CliError with every problem of every file."""
    sources, problems = [], []
    for name in names:
        documents, findings = lint.lint(name, files.read(name))
        problems += [str(finding) for finding in findings]
        sources += [Source(name, document) for document in documents]
    if problems:
        raise CliError("the manifest is not valid:\n" + "\n".join(problems), Exit.USAGE)
    return sources


async def apply(cluster: Cluster, sources: list[Source]) -> list[Object]:
    """Applies each document; the objects as the server has them. Raises CliError with file and line."""
    applied = []
    for source in sources:
        manifest = source.manifest
        resource = await cluster.resource_of(manifest)
        if resource.namespaced and not manifest["metadata"].get("namespace"):
            manifest = manifest | {"metadata": manifest["metadata"] | {"namespace": cluster.namespace}}
        try:
            applied.append(await cluster.apply(resource, manifest))
        except ApiError as error:
            raise _refused(source, error) from error
    return applied


def _refused(source: Source, error: ApiError) -> CliError:
    """The server's refusal; where it names fields, with the lines of the file."""
    kind, name = source.manifest["kind"], source.manifest["metadata"]["name"]
    lines = []
    for cause in error.details.get("causes") or ():
        path = lint.parse_path(cause.get("field", ""))
        at = source.document.locate(path)
        lines.append(f"{source.file}:{at.line}:{at.column}: {cause.get('field')}: {lint.plain(cause)}")
    if not lines:
        return CliError(f"{kind} {name} was refused: {clusters.sentence(error)}")
    return CliError("\n".join([f"{kind} {name} was refused:", *lines]), Exit.USAGE)
