"""The server's rules, offline: every problem of a manifest with the line of the YAML where it stands.

What the API server evaluates (the CRD's schema and CEL) and what the operator evaluates (the models, `support`) are the
same objects here. The models speak first, because they speak to people; the schema adds what only it knows.
"""

import copy
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune_api import API_VERSION, GROUP, crd, model, policy, support
from finetune_api.job import JOB_NAME, FineTuneJob
from finetune_api.model import Path, Problem
from finetune_api.profile import FineTuneProfile
from finetune_cli import yamldoc
from finetune_cli.yamldoc import Document, Position, YamlError

KINDS: dict[str, type[FineTuneJob] | type[FineTuneProfile]] = {
    "FineTuneJob": FineTuneJob,
    "FineTuneProfile": FineTuneProfile,
}
UNKNOWN = "this field does not exist"
PATTERNS = {
    model.S3_URI: "must be s3://bucket/key or s3://bucket/prefix/",
    model.MODEL_URI: "must be s3://bucket/prefix/, hf://org/name@revision or pvc://claim/path",
    JOB_NAME: "must start with a letter and have at most 50 lower-case letters, digits and '-'",
}
"""What the longer patterns mean."""


@dataclass(frozen=True, order=True)
class Finding:
    """One problem of one file."""

    file: str
    position: Position
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.position.line}:{self.position.column}: {self.message}"


def lint(file: str, text: str, profile: FineTuneProfile | None = None) -> tuple[list[Document], list[Finding]]:
    """The documents of a file and everything that is wrong with them, in the order of the lines."""
    try:
        documents = yamldoc.load(text)
    except YamlError as error:
        return [], [Finding(file, error.position, str(error))]
    if not documents:
        return [], [Finding(file, Position(1, 1), "holds no document")]
    findings = [finding for document in documents for finding in lint_document(file, document, profile)]
    return documents, sorted(findings, key=lambda f: f.position)


def lint_document(file: str, document: Document, profile: FineTuneProfile | None = None) -> Iterator[Finding]:
    for duplicate in document.duplicates:
        message = f"is given twice, first in line {duplicate.first.line}"
        yield Finding(file, duplicate.position, f"{model.format_path(duplicate.path)}: {message}")
    for problem in problems(document.data, profile):
        position = document.locate(problem.path, key=problem.message.startswith(UNKNOWN))
        yield Finding(file, position, str(problem))


def problems(manifest: Any, profile: FineTuneProfile | None = None) -> list[Problem]:
    """What is wrong with one object, as it would be with the server."""
    if not isinstance(manifest, dict):
        return [Problem((), "must be an object with apiVersion, kind and metadata")]
    if wrong := _identity(manifest):
        return wrong
    kind = KINDS.get(manifest["kind"])
    if kind is None or not manifest["apiVersion"].startswith(f"{GROUP}/"):
        return []
    # The status is the operator's: what a user writes there is dropped.
    manifest = {key: value for key, value in manifest.items() if key != "status"}
    schema = schema_of(kind)
    found: list[Problem] = []
    try:
        parsed = kind.model_validate(manifest, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        found = [_in_words(_with_suggestion(problem, schema)) for problem in model.problems_of(error)]
    else:
        found = _beyond(parsed, profile)
    return found + [problem for problem in _by_schema(schema, manifest) if not _said(problem, found)]


def _identity(manifest: dict[str, Any]) -> list[Problem]:
    """apiVersion, kind and name: what every Kubernetes object has."""
    for field in ("apiVersion", "kind"):
        if not isinstance(manifest.get(field), str):
            return [Problem((field,), "is required")]
    version, kind = manifest["apiVersion"], manifest["kind"]
    metadata = manifest.get("metadata")
    if kind in KINDS and version != API_VERSION:
        return [Problem(("apiVersion",), f"found {version!r}; a {kind} has {API_VERSION!r}")]
    if version.startswith(f"{GROUP}/") and kind not in KINDS:
        return [Problem(("kind",), f"found {kind!r}; {version} has {' and '.join(KINDS)}{_nearest(kind, KINDS)}")]
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        return [Problem(("metadata", "name"), "is required")]
    return []


def _beyond(parsed: FineTuneJob | FineTuneProfile, profile: FineTuneProfile | None) -> list[Problem]:
    """Of an object that is well-formed: what this version cannot do, and what the profile does not allow."""
    if isinstance(parsed, FineTuneProfile):
        return support.unsupported_profile(parsed.spec)
    return against_profile(parsed, profile) if profile else support.unsupported(parsed.spec)


def against_profile(job: FineTuneJob, profile: FineTuneProfile) -> list[Problem]:
    """What is wrong with the job under this profile, as the operator judges it."""
    wanted, given = job.spec.profile, profile.metadata.name
    if wanted and wanted != given:
        return [Problem(("spec", "profile"), f"found {wanted!r}; the profile given is {given!r}")]
    return policy.judge(job, profile)


def schema_of(kind: type[FineTuneJob] | type[FineTuneProfile]) -> dict[str, Any]:
    definition = crd.job_crd() if kind is FineTuneJob else crd.profile_crd()
    schema: dict[str, Any] = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def _by_schema(schema: dict[str, Any], manifest: dict[str, Any]) -> Iterator[Problem]:
    """The API server's own findings: unknown fields, schema, CEL."""
    # CEL needs the sandbox extra. Without it the models decide alone: they hold the same rules (a contract test).
    try:
        from finetune_sandbox import schema as server
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("finetune_sandbox"):
            raise
        return
    body = copy.deepcopy(manifest)
    for dropped in server.prune(schema, body):
        yield _with_suggestion(Problem(parse_path(dropped), UNKNOWN), schema)
    server.default(schema, body)
    for cause in server.validate(schema, body):
        yield Problem(parse_path(cause.field), plain({"field": cause.field, "message": cause.message}))


def parse_path(text: str) -> Path:
    """`spec.datasets[0].uri` -> `("spec", "datasets", 0, "uri")`."""
    parts = re.findall(r"\[(\d+)\]|([^.\[\]]+)", text)
    return tuple(int(index) if index else name for index, name in parts)


def plain(cause: Mapping[str, str]) -> str:
    """The words of one `details.causes` entry without the field, which stands before them already."""
    value = r'"(?:[^"\\]|\\.)*"|-?[0-9.e+]+|true|false|null|\{.*?\}|\[.*?\]'
    message = re.sub(rf"^Invalid value: (?:(?:{value}): )?", "", cause.get("message", ""))
    return message.removeprefix(f"{cause.get('field')} in body ")


def _said(problem: Problem, said: list[Problem]) -> bool:
    """Whether a model has said it: the same sentence, or anything about the same field."""
    required = problem.message.startswith("Required")
    return any(
        other.message == problem.message or other.path == problem.path or (required and other.path == problem.path[:-1])
        for other in said
    )


def _with_suggestion(problem: Problem, schema: dict[str, Any]) -> Problem:
    if problem.message != UNKNOWN:
        return problem
    node = schema
    for part in problem.path[:-1]:
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
    return Problem(problem.path, UNKNOWN + _nearest(str(problem.path[-1]), node.get("properties", {})))


def _in_words(problem: Problem) -> Problem:
    message = problem.message
    for pattern, words in PATTERNS.items():
        message = message.replace(f"string should match pattern '{pattern}'", words)
    return Problem(problem.path, message)


def _nearest(word: str, known: dict[str, Any]) -> str:
    """`; did you mean 'x'?` where one is near: in any spelling of the same word, or with some letters wrong."""
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in known}
    near = difflib.get_close_matches(re.sub(r"[^a-z0-9]", "", word.lower()), plain, n=1, cutoff=0.6)
    return f"; did you mean {plain[near[0]]!r}?" if near else ""
