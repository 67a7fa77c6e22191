"""The entry point of `finetune` and `kubectl-finetune`.

Commands are imported when they are called: `finetune --help` and completion stay instant.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import click

from finetune_cli.errors import CliError, Exit

COMMANDS = {
    "run": ("run", "Run a manifest and follow it to its end"),
    "submit": ("submit", "Create or update what a manifest describes"),
    "list": ("show", "List fine-tuning jobs"),
    "get": ("show", "Show one job: conditions, attempts, result"),
    "logs": ("logs", "Print the logs of a job's workers"),
    "wait": ("wait", "Wait until a job is Complete, Failed or Running"),
    "lint": ("lint", "Check manifests offline, with the server's own rules"),
    "fetch": ("fetch", "Download an adapter and verify it"),
    "verify": ("verify", "Check a folder that was fetched, by the platform's key"),
    "suspend": ("control", "Stop a job's pods and keep its checkpoints"),
    "resume": ("control", "Let a suspended job go on"),
    "delete": ("control", "Delete a job and everything it started"),
    "crds": ("crds", "Print the CustomResourceDefinitions"),
    "sandbox": ("sandbox", "A cluster on this machine: up, down, status, node, cp, ls"),
}


class _Lazy(click.Group):
    """A group whose commands live in `finetune_cli.commands.<module>` under their own names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"finetune_cli.commands.{COMMANDS[name][0]}")
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="finetune-operator", prog_name="finetune")
def cli() -> None:
    """Distributed fine-tuning of language models on Kubernetes.

    Exit codes: 0 done, 1 the job failed, 2 wrong usage or manifest, 3 cluster unreachable, 124 timeout.
    """


def main(arguments: list[str] | None = None) -> None:
    name = "kubectl finetune" if Path(sys.argv[0]).name.startswith("kubectl-") else "finetune"
    sys.exit(run(cli, name, arguments))


def run(command: click.Command, name: str, arguments: list[str] | None) -> int:
    """The exit code of a command line; what a person can act on is printed as one sentence."""
    try:
        result: Any = command.main(args=arguments, prog_name=name, standalone_mode=False)
        return result if isinstance(result, int) else Exit.COMPLETE
    except CliError as error:
        from finetune_api.printable import printable

        # Its own lines stay; what they quote of others adds none that moves the cursor.
        click.echo("\n".join(map(printable, f"error: {error}".split("\n"))), err=True)
        return error.code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`finetune list | head`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.COMPLETE


if __name__ == "__main__":
    main()
