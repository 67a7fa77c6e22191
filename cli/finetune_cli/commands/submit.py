"""`finetune submit`."""

from typing import TYPE_CHECKING

import click

from finetune_cli import options

if TYPE_CHECKING:
    from finetune_cli.cluster import Target


@click.command("submit")
@click.option("-f", "--filename", "files", multiple=True, required=True, metavar="FILE", help="May be repeated.")
@options.connection
def submit_command(target: "Target", files: tuple[str, ...]) -> None:
    """Create or update what a manifest describes, and return.

    The manifest is checked here first; every document of it is applied, Secrets and profiles too.
    """
    from finetune_cli import cluster as clusters
    from finetune_cli import manifests

    sources = manifests.read(files)
    for applied in clusters.run(target, lambda cluster: manifests.apply(cluster, sources)):
        meta = applied["metadata"]
        where = f" in {meta['namespace']}" if meta.get("namespace") else ""
        click.echo(f"{applied['kind']} {meta['name']}{where}: applied")
