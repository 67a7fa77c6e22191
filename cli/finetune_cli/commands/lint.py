"""`finetune lint`."""

from typing import TYPE_CHECKING

import click

from finetune_cli import files
from finetune_cli.errors import CliError, Exit

if TYPE_CHECKING:
    from finetune_api.profile import FineTuneProfile


@click.command("lint")
@click.argument("file", nargs=-1, required=True)
@click.option("--profile", metavar="FILE", help="Check jobs against this FineTuneProfile, too.")
def lint_command(file: tuple[str, ...], profile: str | None) -> int:
    """Check manifests offline, with the rules that the API server and the operator apply.

    Prints file, line and column of every problem. Exit code 0 where there is none, else 2.
    """
    from finetune_cli import lint

    platform = _profile(profile) if profile else None
    count = 0
    for name in file:
        documents, findings = lint.lint(name, files.read(name), platform)
        count += len(findings)
        for finding in findings:
            click.echo(str(finding))
        if not findings:
            kinds = ", ".join(f"{d.data['kind']} {d.data['metadata']['name']}" for d in documents)
            click.echo(f"{name}: ok ({kinds})")
    if count:
        click.echo(f"{count} problem{'s' if count > 1 else ''} found", err=True)
    return Exit.USAGE if count else Exit.COMPLETE


def _profile(name: str) -> "FineTuneProfile":
    from finetune_api.profile import FineTuneProfile
    from finetune_cli import lint

    documents, findings = lint.lint(name, files.read(name))
    if findings:
        raise CliError(str(findings[0]), Exit.USAGE)
    profiles = [d.data for d in documents if d.data["kind"] == "FineTuneProfile"]
    if len(profiles) != 1:
        raise CliError(f"{name} holds {len(profiles)} FineTuneProfiles; --profile needs exactly one", Exit.USAGE)
    return FineTuneProfile.model_validate(profiles[0])
