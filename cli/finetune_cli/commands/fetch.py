"""`finetune fetch`."""

import base64
import binascii
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune_cli import options
from finetune_cli.errors import CliError

if TYPE_CHECKING:
    from finetune_api.signature import SignedStatement
    from finetune_cli.cluster import Cluster, Target
    from finetune_cli.objectstore import Access, Location


@click.command("fetch")
@click.argument("what", metavar="JOB|s3://…")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="A new folder.")
@click.option("--endpoint", metavar="URL", help="Of the object store; default: the profile's, else $AWS_ENDPOINT_URL.")
@click.option(
    "--verify-key",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Public key by which it must be signed (PEM).",
)
@options.connection
def fetch_command(target: "Target", what: str, output: Path, endpoint: str | None, verify_key: Path | None) -> None:
    """Download an adapter and verify it against its manifest: every file's size and SHA-256, and no file more.

    For a job the keys of its credentials Secret are used where they can be read; else, and for an s3:// URI, those of
    the environment and ~/.aws. The folder appears only when everything in it is right; the platform's signature, where
    the job has one, is in its signature.json.
    """
    from finetune_cli import artifact, jobview, signatures
    from finetune_cli.objectstore import Access, Location, Store

    digest = signed = None
    if what.startswith("s3://"):
        location, access = Location.parse(what), Access()
    else:
        location, digest, signed, access = _of_job(target, what)
    if verify_key:
        if signed is None:
            raise CliError(f"{what} has no signature; the status of a job has one where its operator has a key")
        signatures.check(signed, verify_key)
    if endpoint:
        access = Access(**{**vars(access), "endpoint": endpoint})
    with click.progressbar(length=0, label="fetching", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        manifest = artifact.fetch(Store(access), location, output, digest, bar.update, signed)
    for entry in sorted(manifest.files, key=lambda entry: entry.key):
        click.echo(f"{entry.sha256}  {entry.key}  ({jobview.size(entry.size)})")
    click.echo(f"verified {len(manifest.files)} files of {location} in {output}")


def _of_job(target: "Target", name: str) -> "tuple[Location, str, SignedStatement | None, Access]":
    """Where the job's adapter is, the digest of its manifest, the platform's signature, and how to get at it."""
    from finetune_cli import cluster as clusters
    from finetune_cli.objectstore import Access, Location

    async def read(cluster: "Cluster") -> tuple[Any, Any, dict[str, str]]:
        job = await cluster.job(name)
        profile = await _profile(cluster, job)
        return job, (profile.get("spec") or {}).get("storage") or {}, await _keys(cluster, job)

    job, storage, keys = clusters.run(target, read)
    result = (job.get("status") or {}).get("result")
    if not result:
        raise CliError(
            f"the job {name} has published nothing: it is {(job.get('status') or {}).get('state', 'Pending')}"
        )
    return Location.parse(result["uri"]), result["manifestSHA256"], _signed(job), Access.of(storage, keys)


def _signed(job: Any) -> "SignedStatement | None":
    """What the status says that was signed."""
    from finetune_api.signature import Signature, SignedStatement, Statement

    metadata, result = job["metadata"], job["status"]["result"]
    if not result.get("signature"):
        return None
    statement = Statement(
        namespace=metadata["namespace"],
        job=metadata["name"],
        job_uid=metadata["uid"],
        uri=result["uri"],
        manifest_sha256=result["manifestSHA256"],
    )
    return SignedStatement(statement=statement, signature=Signature.model_validate(result["signature"]))


async def _profile(cluster: "Cluster", job: Any) -> Any:
    """The job's profile; empty where it does not exist or may not be read: then the environment decides."""
    from finetune_api.profile import DEFAULT_ANNOTATION
    from finetune_cli.cluster import PROFILES
    from finetune_sandbox.client import ApiError

    wanted = job["spec"].get("profile")
    try:
        if wanted:
            return await cluster.get(PROFILES, None, wanted)
        profiles, _ = await cluster.list(PROFILES)
    except ApiError as error:
        if error.status in (403, 404):
            return {}
        raise
    default = [p for p in profiles if (p["metadata"].get("annotations") or {}).get(DEFAULT_ANNOTATION) == "true"]
    return min(default, key=lambda p: str(p["metadata"]["name"]), default={})


async def _keys(cluster: "Cluster", job: Any) -> dict[str, str]:
    """The credentials Secret, decoded; empty where there is none or it may not be read."""
    from finetune_sandbox.client import SECRETS, ApiError

    reference = (job["spec"].get("credentials") or {}).get("secretRef")
    if not reference:
        return {}
    try:
        secret = await cluster.get(SECRETS, cluster.namespace, reference["name"])
        return {key: base64.b64decode(value).decode() for key, value in (secret.get("data") or {}).items()}
    except ApiError as error:
        if error.status in (403, 404):
            return {}
        raise
    except (binascii.Error, UnicodeDecodeError) as error:
        raise CliError(f"the Secret {reference['name']} holds a value that is not base64 of text") from error
