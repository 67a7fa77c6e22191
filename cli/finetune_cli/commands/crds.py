"""`finetune crds`."""

import click


@click.command("crds")
def crds_command() -> None:
    """Print the CustomResourceDefinitions: `finetune crds | kubectl apply -f -`."""
    import yaml

    from finetune_api import crd

    click.echo(yaml.safe_dump_all(crd.crds(), sort_keys=False, allow_unicode=True, width=120), nl=False)
