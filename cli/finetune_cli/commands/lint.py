"""`finetune lint`."""

from typing import TYPE_CHECKING

import click

from finetune_cli import files
from finetune_cli.errors import CliError, Exit

if TYPE_CHECKING:
    from finetune_api.profile import FineTuneProfile
    from finetune_cli.yamldoc import Document


@click.command("lint")
@click.argument("file", nargs=-1, required=True)
@click.option("--profile", metavar="FILE", help="Check jobs against this FineTuneProfile, too.")
@click.option("--explain", is_flag=True, help="Show what memory each job would need, and how it would run.")
@click.option("--model", metavar="DIR|s3://…|hidden=…", help="With --explain: the base model, else that of the job.")
@click.option("--tokens", type=click.IntRange(1), help="With --explain: tokens of the training data.")
@click.option("--tflops", type=click.FloatRange(0, min_open=True), help="With --tokens: what one GPU does in training.")
def lint_command(
    file: tuple[str, ...],
    profile: str | None,
    explain: bool,
    model: str | None,
    tokens: int | None,
    tflops: float | None,
) -> int:
    """Check manifests offline, with the rules that the API server and the operator apply.

    Prints file, line and column of every problem. Exit code 0 where there is none, else 2.

    With --explain and a profile also the sum that sizing makes of each job, from the model's config.json and the
    headers of its weights: in a folder, in the object store, or as hidden=4096,layers=32,intermediate=14336,
    vocab=128256,keyValue=1024.
    """
    from finetune_cli import lint

    platform = _profile(profile) if profile else None
    if explain and platform is None:
        raise CliError("--explain: say with --profile what a process has to run on", Exit.USAGE)
    count = 0
    for name in file:
        documents, findings = lint.lint(name, files.read(name), platform)
        count += len(findings)
        for finding in findings:
            click.echo(str(finding))
        if not findings:
            kinds = ", ".join(f"{d.data['kind']} {d.data['metadata']['name']}" for d in documents)
            click.echo(f"{name}: ok ({kinds})")
            if explain and platform:
                _explain(documents, platform, model, tokens, tflops)
    if count:
        click.echo(f"{count} problem{'s' if count > 1 else ''} found", err=True)
    return Exit.USAGE if count else Exit.COMPLETE


def _explain(
    documents: "list[Document]",
    profile: "FineTuneProfile",
    model: str | None,
    tokens: int | None,
    tflops: float | None,
) -> None:
    from finetune_api.defaults import with_defaults
    from finetune_api.job import FineTuneJob
    from finetune_cli import explain, modelsource
    from finetune_cli.objectstore import Access

    access = Access.of(profile.spec.storage.to_json(), {})
    for document in documents:
        if document.data["kind"] != "FineTuneJob":
            continue
        job = with_defaults(FineTuneJob.model_validate(document.data), profile.spec.defaults)
        source = modelsource.of(model or job.spec.base_model.uri, access)
        for line in explain.lines(job, profile.spec, source, tokens, tflops):
            click.echo(line)


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
