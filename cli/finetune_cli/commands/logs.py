"""`finetune logs`."""

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import click

from finetune_cli import options
from finetune_cli.errors import CliError

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster, Target

JOB, ATTEMPT = "finetune.dev/job-name", "finetune.dev/attempt"
INDEX = "batch.kubernetes.io/job-completion-index"


@click.command("logs")
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the pods end.")
@click.option("--worker", type=click.IntRange(min=0), help="One worker of the gang. Default: all.")
@click.option("--attempt", metavar="N|prepare", help="Default: the newest attempt, before the first one prepare.")
@click.option("--tail", type=click.IntRange(min=0), metavar="LINES", help="Only the last lines.")
@options.connection
def logs_command(
    target: "Target", job: str, follow: bool, worker: int | None, attempt: str | None, tail: int | None
) -> None:
    """Print the logs of a job's workers, each line with its worker where there are several."""
    from finetune_cli import cluster as clusters

    if attempt is not None and attempt != "prepare" and not attempt.isdecimal():
        raise click.BadParameter(f"{attempt!r} is neither a number nor `prepare`", param_hint="--attempt")

    async def work(cluster: "Cluster") -> None:
        found = await cluster.job(job)
        which = attempt or _newest(found)
        pods = await _pods(cluster, job, which, worker)
        if not pods and follow:
            pods = await _first_pods(cluster, job, which, worker)
        if not pods:
            who = f"worker {worker}" if worker is not None else "pods"
            raise CliError(f"the job {job} has no {who} of {_name(which)} (any more)")
        await asyncio.gather(*(_print(cluster, pod, len(pods) > 1, follow, tail) for pod in pods))

    clusters.run(target, work)


def _newest(job: Any) -> str:
    attempts = (job.get("status") or {}).get("attempts") or ()
    return str(attempts[-1]["number"]) if attempts else "prepare"


def _name(attempt: str) -> str:
    return attempt if attempt == "prepare" else f"attempt {attempt}"


def _selector(job: str, attempt: str, worker: int | None) -> str:
    chosen = f",{INDEX}={worker}" if worker is not None else ""
    return f"{JOB}={job},{ATTEMPT}={attempt}{chosen}"


async def _pods(cluster: "Cluster", job: str, attempt: str, worker: int | None) -> list[Any]:
    from finetune_sandbox.client import PODS

    pods, _ = await cluster.list(PODS, cluster.namespace, labels=_selector(job, attempt, worker))
    return sorted(pods, key=lambda pod: (_index(pod), pod["metadata"]["creationTimestamp"]))


async def _first_pods(cluster: "Cluster", job: str, attempt: str, worker: int | None) -> list[Any]:
    """The pods of an attempt that is about to start: all that are there once the first one is."""
    from finetune_sandbox.client import PODS

    async with aclosing(cluster.changes(PODS, cluster.namespace, labels=_selector(job, attempt, worker))) as changes:
        async for change in changes:
            if change.type in ("ADDED", "MODIFIED") and _started(change.object):
                break
    return await _pods(cluster, job, attempt, worker)


def _index(pod: Any) -> int:
    return int((pod["metadata"].get("labels") or {}).get(INDEX, 0))


def _started(pod: Any) -> bool:
    return bool((pod.get("status") or {}).get("phase") in ("Running", "Succeeded", "Failed"))


async def _print(cluster: "Cluster", pod: Any, several: bool, follow: bool, tail: int | None) -> None:
    from finetune_sandbox.client import PODS

    name = pod["metadata"]["name"]
    prefix = f"[{_index(pod)}] " if several else ""
    if not _started(pod):
        if not follow:
            click.echo(f"{prefix}{name} has not started yet", err=True)
            return
        async with aclosing(cluster.changes(PODS, cluster.namespace, fields=f"metadata.name={name}")) as changes:
            async for change in changes:
                if change.type == "DELETED":
                    return
                if change.type != "SYNCED" and _started(change.object):
                    break
    params = {"follow": "true"} if follow else {}
    if tail is not None:
        params["tailLines"] = str(tail)
    async with aclosing(cluster.text_lines(PODS.path(cluster.namespace, name, "log"), params)) as lines:
        async for line in lines:
            click.echo(prefix + line.decode(errors="replace"))
