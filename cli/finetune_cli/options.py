"""Options that several commands share."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    pass

Function = Callable[..., Any]

SANDBOX_DIRECTORY = ".sandbox"
directory = click.option(
    "--directory",
    envvar="FINETUNE_SANDBOX",
    default=SANDBOX_DIRECTORY,
    show_default=True,
    metavar="DIR",
    help="Where the sandbox keeps its files.",
)


def connection(function: Function) -> Function:
    """--kubeconfig, --context, --namespace and --sandbox, given to the command as `target`."""

    @click.option("--kubeconfig", metavar="FILE", help="Default: $KUBECONFIG, else ~/.kube/config, else in-cluster.")
    @click.option("--context", metavar="NAME", help="A context of the kubeconfig.")
    @click.option("-n", "--namespace", metavar="NAME", help="Default: that of the context.")
    @click.option("--sandbox", is_flag=True, help="Use the running sandbox instead (`finetune sandbox up`).")
    @directory
    @wraps(function)
    def wrapper(
        *args: Any,
        kubeconfig: str | None,
        context: str | None,
        namespace: str | None,
        sandbox: bool,
        directory: str,
        **kwargs: Any,
    ) -> Any:
        from finetune_cli.cluster import Target

        if sandbox:
            from finetune_cli import laptop

            kubeconfig, context = laptop.running(Path(directory)).kubeconfig, None
        return function(*args, target=Target(kubeconfig, context, namespace), **kwargs)

    return wrapper


class Seconds(click.ParamType[float]):
    """A duration: `90`, `90s`, `15m`, `2h`."""

    name = "duration"
    _units = {"s": 1, "m": 60, "h": 3600}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        text = str(value).strip()
        unit = self._units.get(text[-1:], 1)
        try:
            seconds = float(text.rstrip("smh")) * unit
        except ValueError:
            self.fail(f"{value!r} is no duration; write 90, 90s, 15m or 2h", param, ctx)
        if seconds <= 0:
            self.fail(f"{value!r} must be positive", param, ctx)
        return seconds


SECONDS = Seconds()
