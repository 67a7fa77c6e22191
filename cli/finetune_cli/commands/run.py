"""`finetune run`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from finetune_cli import options
from finetune_cli.errors import CliError, Exit

if TYPE_CHECKING:
    from finetune_cli.cluster import Target
    from finetune_cli.manifests import Source


@click.command("run")
@click.option("-f", "--filename", required=True, metavar="FILE", help="A manifest with one FineTuneJob; - is stdin.")
@click.option("--sandbox", is_flag=True, help="Run on this machine, in a sandbox that is started if need be.")
@click.option("--down", is_flag=True, help="Stop the sandbox at the end (what is in its S3 goes with it).")
@click.option("--timeout", type=options.SECONDS, metavar="DURATION", help="Stop following after 90s, 15m, 2h …")
@click.option("--kubeconfig", metavar="FILE", help="Default: $KUBECONFIG, else ~/.kube/config, else in-cluster.")
@click.option("--context", metavar="NAME", help="A context of the kubeconfig.")
@click.option("-n", "--namespace", metavar="NAME", help="Default: that of the context.")
@options.directory
def run_command(
    filename: str,
    sandbox: bool,
    down: bool,
    timeout: float | None,
    kubeconfig: str | None,
    context: str | None,
    namespace: str | None,
    directory: str,
) -> int:
    """Apply a manifest and follow its job to the end.

    Without a cluster that can be reached, the job runs on this machine: in the sandbox, as with --sandbox. Exit code 0
    when the job is Complete, 1 when it Failed, 2 for an invalid manifest, 124 after the timeout. The job goes on when
    following stops.
    """
    from finetune_cli import cluster as clusters
    from finetune_cli import manifests
    from finetune_cli.cluster import Target

    sources = manifests.read((filename,))
    jobs = [source for source in sources if source.is_job]
    if len(jobs) != 1:
        message = (
            f"{filename} holds {len(jobs)} FineTuneJobs; `finetune run` follows exactly one (see `finetune submit`)"
        )
        raise CliError(message, Exit.USAGE)
    target = Target(kubeconfig, context, namespace)
    if not sandbox and not (kubeconfig or context):
        why = _unreachable(target)
        if why:
            click.echo(f"{why}: using the sandbox", err=True)
            sandbox = True
    if not sandbox:
        clusters.run(target, lambda cluster: manifests.apply(cluster, sources))
        return _follow(target, jobs[0], timeout)
    return _in_sandbox(Path(directory), namespace, sources, jobs[0], timeout, down)


def _unreachable(target: "Target") -> str | None:
    """Why no cluster can be reached; None where one can."""
    from finetune_cli import cluster as clusters

    async def nothing(_: clusters.Cluster) -> None:
        return None

    try:
        clusters.run(target, nothing)
    except CliError as error:
        if error.code != Exit.UNREACHABLE:
            raise
        return str(error)
    return None


def _in_sandbox(
    directory: Path, namespace: str | None, sources: "list[Source]", job: "Source", timeout: float | None, down: bool
) -> int:
    from finetune_cli import cluster as clusters
    from finetune_cli import laptop, manifests
    from finetune_cli.cluster import Target

    info = laptop.start(directory)
    try:
        target = Target(info.kubeconfig, None, namespace)
        clusters.run(target, lambda cluster: manifests.apply(cluster, sources))
        return _follow(target, job, timeout)
    finally:
        if down:
            laptop.stop(directory)
        else:
            click.echo(f"the sandbox goes on in {directory}; `finetune sandbox down` stops it", err=True)


def _follow(target: "Target", source: "Source", timeout: float | None) -> int:
    from finetune_cli import cluster as clusters
    from finetune_cli import follow, jobview

    meta = source.manifest["metadata"]
    name = meta["name"]
    target = clusters.Target(target.kubeconfig, target.context, meta.get("namespace") or target.namespace)
    hint = f"the job goes on: `finetune wait {name}` follows it, `finetune delete {name}` ends it"
    try:
        with follow.shown() as show:
            done = clusters.run(
                target, lambda c: follow.until(c, name, lambda job: jobview.outcome(job) is not None, show), timeout
            )
    except CliError as error:
        if error.code == Exit.TIMEOUT:
            raise CliError(f"{name} has not ended within {timeout:g} s; {hint}", Exit.TIMEOUT) from error
        raise
    except KeyboardInterrupt:
        click.echo(hint, err=True)
        raise
    click.echo("\n".join(jobview.result(done)))
    return Exit.COMPLETE if jobview.outcome(done) == "Complete" else Exit.FAILED
