"""`finetune sandbox`: a cluster on this machine."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from finetune_cli import options
from finetune_cli.errors import CliError, Exit

if TYPE_CHECKING:
    from finetune_cli.objectstore import Location, Store


@click.group("sandbox")
def sandbox_command() -> None:
    """A cluster on this machine: API server, operator, one node that runs pods as processes, and S3."""


@sandbox_command.command("up")
@options.directory
def up(directory: str) -> None:
    """Start the sandbox with the operator in it; one that runs already is kept."""
    from finetune_cli import laptop

    info = laptop.start(Path(directory))
    click.echo(
        f"""\
The sandbox is up ({"control plane of $KUBEBUILDER_ASSETS" if info.name == "kubernetes" else "its own API server"}).
  export KUBECONFIG={info.kubeconfig}
  S3: {info.s3_endpoint}, bucket {laptop.BUCKET}, keys in Secret {laptop.NAMESPACE}/{laptop.SECRET}
  profile {laptop.PROFILE} (default): CPU only
Next:
  finetune sandbox cp my-model/ s3://{laptop.BUCKET}/models/my-model/
  finetune sandbox cp train.jsonl s3://{laptop.BUCKET}/data/
  finetune run --sandbox -f job.yaml
  finetune sandbox down"""
    )


@sandbox_command.command("down")
@options.directory
def down(directory: str) -> None:
    """Stop the sandbox; its jobs and what is in its S3 go with it."""
    from finetune_cli import laptop

    click.echo("the sandbox is down" if laptop.stop(Path(directory)) else f"no sandbox runs in {directory}")


@sandbox_command.command("status")
@options.directory
def status(directory: str) -> int:
    """Say whether the sandbox and its operator run. Exit code 3 where they do not."""
    from finetune_cli import jobview, laptop
    from finetune_sandbox import up as sandboxes

    info, operator = sandboxes.running(Path(directory)), laptop.Operator(Path(directory).resolve())
    if info is None:
        click.echo(f"no sandbox runs in {directory}")
        return Exit.UNREACHABLE
    rows = [
        ["Control plane", f"{info.name}, process {info.pid}, log {info.log}"],
        ["Operator", f"{'running' if operator.process else 'NOT running'}, log {operator.log}"],
        ["Kubeconfig", info.kubeconfig],
        ["S3", info.s3_endpoint],
    ]
    click.echo("\n".join(jobview.table(rows)))
    return Exit.COMPLETE if operator.process else Exit.UNREACHABLE


@sandbox_command.command("node")
@click.option("--kubeconfig", type=click.Path(path_type=Path), metavar="FILE", help="Default: $KUBECONFIG.")
@click.option("--name", default="finetune-sandbox", show_default=True, help="Of the Node.")
@click.option("--resource", "resources", multiple=True, metavar="NAME=QUANTITY", help="Such as nvidia.com/gpu=2.")
@click.option("--bind", is_flag=True, help="Schedule pods, too, where the cluster has no scheduler.")
@options.directory
def node(kubeconfig: Path | None, name: str, resources: tuple[str, ...], bind: bool, directory: str) -> None:
    """Serve any other cluster with a process node, until interrupted."""
    import aiohttp
    from kubernetes.aio.config import ConfigException

    from finetune_sandbox import node as nodes
    from finetune_sandbox.client import ApiError
    from finetune_sandbox.logformat import configure_logging

    for resource in resources:
        if "=" not in resource:
            raise click.BadParameter(f"{resource!r} is not NAME=QUANTITY", param_hint="--resource")
    configure_logging()
    capacity = dict(resource.split("=", 1) for resource in resources)
    try:
        nodes.serve(kubeconfig, name, capacity, Path(directory).resolve() / "node", bind)
    except (aiohttp.ClientError, TimeoutError, ConfigException) as error:
        where = kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
        raise CliError(f"the cluster of {where} cannot be reached: {error}", Exit.UNREACHABLE) from error
    except ApiError as error:
        raise CliError(f"the cluster refused the node: {error.message}") from error


@sandbox_command.command("cp")
@click.argument("source", metavar="FILE|FOLDER", type=click.Path(exists=True, path_type=Path))
@click.argument("target", metavar="s3://BUCKET/…")
@options.directory
def cp(source: Path, target: str, directory: str) -> None:
    """Upload a file, or a folder with all that is in it, to the sandbox's S3."""
    from finetune_cli import laptop
    from finetune_cli.objectstore import Location

    location = Location.parse(target)
    store = laptop.store(laptop.running(Path(directory)))
    if location.bucket not in store.buckets():
        raise CliError(f"the sandbox has no bucket {location.bucket}; it has {', '.join(store.buckets())}", Exit.USAGE)
    uploads = _uploads(source, location)
    for file, to in uploads:
        store.upload(file, to)
        click.echo(f"{file} -> {to}")
    if not uploads:
        raise CliError(f"{source} holds no files", Exit.USAGE)


def _uploads(source: Path, location: "Location") -> "list[tuple[Path, Location]]":
    """A folder's files go below the prefix by their relative paths; a file below a prefix keeps its name."""
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file())
        return [(file, location / file.relative_to(source).as_posix()) for file in files]
    return [(source, location / source.name if location.key.endswith("/") or not location.key else location)]


@sandbox_command.command("ls")
@click.argument("prefix", metavar="[s3://BUCKET/…]", default="")
@options.directory
def ls(prefix: str, directory: str) -> None:
    """List buckets, or what is below a prefix, in the sandbox's S3."""
    from finetune_cli import jobview, laptop
    from finetune_cli.objectstore import Location

    store: Store = laptop.store(laptop.running(Path(directory)))
    if not prefix:
        for bucket in store.buckets():
            click.echo(f"s3://{bucket}/")
        return
    for entry in store.objects(Location.parse(prefix)):
        click.echo(f"{jobview.size(entry['Size']):>10}  s3://{Location.parse(prefix).bucket}/{entry['Key']}")
