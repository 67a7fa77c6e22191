"""`finetune suspend`, `resume` and `delete`."""

from typing import TYPE_CHECKING, Any

import click

from finetune_cli import options

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster, Target


def _suspend(target: "Target", names: tuple[str, ...], value: bool) -> None:
    from finetune_cli import cluster as clusters
    from finetune_cli import jobview
    from finetune_cli.errors import CliError

    async def work(cluster: "Cluster") -> None:
        for name in names:
            ended = jobview.outcome(await cluster.job(name))
            if ended:
                raise CliError(f"the job {name} is {ended}: a finished job never runs again")
            patch = {"spec": {"runPolicy": {"suspend": value}}}
            await cluster.patch(clusters.JOBS, cluster.namespace, name, patch)
            click.echo(f"{name}: {'suspended' if value else 'resumed'}")

    clusters.run(target, work)


@click.command("suspend")
@click.argument("job", nargs=-1, required=True)
@options.connection
def suspend_command(target: "Target", job: tuple[str, ...]) -> None:
    """Stop a job's pods and keep its checkpoints; `resume` goes on from the newest."""
    _suspend(target, job, True)


@click.command("resume")
@click.argument("job", nargs=-1, required=True)
@options.connection
def resume_command(target: "Target", job: tuple[str, ...]) -> None:
    """Let a suspended job go on."""
    _suspend(target, job, False)


@click.command("delete")
@click.argument("job", nargs=-1, required=True)
@click.option("--ignore-not-found", is_flag=True, help="A job that does not exist is no error.")
@options.connection
def delete_command(target: "Target", job: tuple[str, ...], ignore_not_found: bool) -> None:
    """Delete a job and everything it started; what it published in S3 stays."""
    from finetune_cli import cluster as clusters
    from finetune_sandbox.client import ApiError

    async def work(cluster: "Cluster") -> None:
        for name in job:
            try:
                found: Any = await cluster.job(name)
            except ApiError as error:
                if error.status == 404 and ignore_not_found:
                    continue
                raise
            uid = found["metadata"]["uid"]
            await cluster.delete(clusters.JOBS, cluster.namespace, name, uid=uid, propagation="Background")
            click.echo(f"{name}: deleted")

    clusters.run(target, work)
