"""`finetune verify`."""

from pathlib import Path

import click


@click.command("verify")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="DIR")
@click.option(
    "--key", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The platform's public key (PEM)."
)
def verify_command(directory: Path, key: Path) -> None:
    """Check a folder that was fetched: the platform's signature of its manifest, and every file against that.

    It takes no cluster and no network.
    """
    from finetune_cli import artifact, signatures

    statement = signatures.check_folder(directory, key).statement
    manifest = artifact.check_files(directory)
    click.echo(f"{len(manifest.files)} files are as {statement.namespace}/{statement.job} published them")
    click.echo(f"signed by {key}: {statement.uri}")
