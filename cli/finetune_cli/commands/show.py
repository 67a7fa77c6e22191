"""`finetune list` and `finetune get`."""

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from finetune_cli import options

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster, Target


@click.command("list")
@click.option("-A", "--all-namespaces", is_flag=True, help="Jobs of every namespace.")
@click.option("-l", "--selector", default="", metavar="LABELS", help="Only jobs with these labels.")
@click.option("-o", "--output", type=click.Choice(["table", "json", "name"]), default="table")
@options.connection
def list_command(target: "Target", all_namespaces: bool, selector: str, output: str) -> None:
    """List fine-tuning jobs."""
    from finetune_cli import cluster as clusters
    from finetune_cli import jobview

    async def read(cluster: "Cluster") -> tuple[list[Any], str]:
        namespace = None if all_namespaces else cluster.namespace
        return (await cluster.list(clusters.JOBS, namespace, labels=selector))[0], cluster.namespace

    jobs, namespace = clusters.run(target, read)
    if output == "json":
        click.echo(json.dumps({"apiVersion": "v1", "kind": "List", "items": jobs}, indent=2))
    elif output == "name":
        for job in jobs:
            click.echo(job["metadata"]["name"])
    elif jobs:
        rows = jobview.job_rows(jobs, datetime.now(UTC), with_namespace=all_namespaces)
        click.echo("\n".join(jobview.table(rows)))
    else:
        where = "any namespace" if all_namespaces else f"namespace {namespace}"
        click.echo(f"no fine-tuning jobs in {where}", err=True)


@click.command("get")
@click.argument("job")
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table")
@options.connection
def get_command(target: "Target", job: str, output: str) -> None:
    """Show one job: conditions, attempts, result."""
    from finetune_cli import cluster as clusters
    from finetune_cli import jobview

    found = clusters.run(target, lambda cluster: cluster.job(job))
    if output == "json":
        click.echo(json.dumps(found, indent=2))
    elif output == "yaml":
        import yaml

        found["metadata"].pop("managedFields", None)
        click.echo(yaml.safe_dump(found, sort_keys=False, allow_unicode=True), nl=False)
    else:
        click.echo("\n".join(jobview.describe(found, datetime.now(UTC))))
