"""`finetune wait`."""

from typing import TYPE_CHECKING

import click

from finetune_cli import options
from finetune_cli.errors import CliError, Exit

if TYPE_CHECKING:
    from finetune_cli.cluster import Target


@click.command("wait")
@click.argument("job")
@click.option("--for", "goal", type=click.Choice(["Complete", "Failed", "Running"]), default="Complete")
@click.option("--timeout", type=options.SECONDS, metavar="DURATION", help="Such as 90s, 15m, 2h. Default: for ever.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
@options.connection
def wait_command(target: "Target", job: str, goal: str, timeout: float | None, quiet: bool) -> int:
    """Wait until a job is Complete, Failed or Running.

    Exit code 0 when it is, 1 when it ended otherwise, 124 after the timeout.
    """
    from finetune_cli import cluster as clusters
    from finetune_cli import follow, jobview

    def reached(found: jobview.Object) -> bool:
        return (jobview.condition(found, goal) or {}).get("status") == "True"

    def done(found: jobview.Object) -> bool:
        return reached(found) or jobview.outcome(found) is not None

    try:
        with follow.shown(quiet) as show:
            ended = clusters.run(target, lambda c: follow.until(c, job, done, show), timeout)
    except CliError as error:
        if error.code == Exit.TIMEOUT:
            raise CliError(f"{job} is not {goal} after {timeout:g} s", Exit.TIMEOUT) from error
        raise
    return Exit.COMPLETE if reached(ended) else Exit.FAILED
