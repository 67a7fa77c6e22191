"""`finetune crds`."""

from pathlib import Path
from typing import Any

import click


@click.command("crds")
@click.option("--directory", type=click.Path(path_type=Path), metavar="DIR", help="Write one file for each instead.")
def crds_command(directory: Path | None) -> None:
    """Print the CustomResourceDefinitions: `finetune crds | kubectl apply --server-side -f -`.

    Beside a Helm release add --field-manager=helm --force-conflicts.
    """
    from finetune_api import crd

    if directory is None:
        click.echo("---\n".join(_yaml(definition) for definition in crd.crds()), nl=False)
        return
    directory.mkdir(parents=True, exist_ok=True)
    for definition in crd.crds():
        file = directory / f"{definition['metadata']['name']}.yaml"
        file.write_text(_yaml(definition), encoding="utf-8")
        click.echo(file)


def _yaml(definition: dict[str, Any]) -> str:
    import yaml

    class Plain(yaml.SafeDumper):
        """Without anchors: equal parts are written out, as other tools write them."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    return yaml.dump(definition, Dumper=Plain, sort_keys=False, allow_unicode=True, width=120)
