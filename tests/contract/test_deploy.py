"""`kubectl apply -k deploy` is the chart with its defaults; one version, and images whose recipes a linter has read."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from support.charting import CHART, LOADER, ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILES = ("operator/Dockerfile", "trainer_image/Dockerfile")


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy", ROOT / "tools/deploy.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.load_all(path.read_text(), LOADER) if document]


def test_the_plain_yaml_is_the_charts() -> None:
    assert documents(DEPLOY / "operator.yaml") == tool().manifests()
    assert "Helm" not in (DEPLOY / "operator.yaml").read_text()


def test_everything_is_in_the_namespace_that_comes_with_it() -> None:
    (namespace,) = documents(DEPLOY / "namespace.yaml")
    found = {d["metadata"].get("namespace") for d in documents(DEPLOY / "operator.yaml")}
    assert found == {namespace["metadata"]["name"], None}


def test_a_kustomization_names_every_file_beside_it() -> None:
    for folder, name in ((DEPLOY, "kustomization.yaml"), (ROOT / "crds", "Kustomization")):
        (kustomization,) = documents(folder / name)
        named = {resource for resource in kustomization["resources"] if "/" not in resource}
        assert named == {file.name for file in folder.glob("*.yaml")} - {name}
        assert all((folder / resource).exists() for resource in kustomization["resources"])


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")
def test_kustomize_builds_it_and_puts_the_image_everywhere() -> None:
    built = subprocess.run(["kubectl", "kustomize", str(DEPLOY)], capture_output=True, text=True, check=True)
    found = [document for document in yaml.load_all(built.stdout, LOADER) if document]
    assert len(found) == len(documents(DEPLOY / "operator.yaml")) + 3
    text = json.dumps(found)
    assert text.count('"image": "registry.example.com/finetune-operator:') == text.count('"image": "') == 3
    (job,) = (document for document in found if document["kind"] == "Job")
    assert job["spec"]["ttlSecondsAfterFinished"] == 600


def test_there_is_one_version() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (chart,) = documents(CHART / "Chart.yaml")
    (kustomization,) = documents(DEPLOY / "kustomization.yaml")
    assert {chart["version"], chart["appVersion"], kustomization["images"][0]["newTag"]} == {wanted}


def test_both_images_are_of_the_same_python() -> None:
    lines = [line for file in DOCKERFILES for line in (ROOT / file).read_text().splitlines()]
    assert len({line for line in lines if line.startswith("ARG PYTHON_IMAGE=")}) == 1


@pytest.mark.parametrize("file", DOCKERFILES)
def test_a_linter_finds_nothing_in_the_images_recipes(file: str) -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, ROOT / file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_operator_runs_without_what_its_image_leaves_out() -> None:
    recipe = (ROOT / "operator/Dockerfile").read_text()
    gone = [name for line in re.findall(r"pip uninstall -y ([^\\\n]+)", recipe) for name in line.split()]
    assert {"boto3", "rich", "pip"} <= set(gone)
    modules = {name: name.replace("markdown-it-py", "markdown_it") for name in gone}
    # None in sys.modules: an import of it fails.
    program = f"import sys; sys.modules.update(dict.fromkeys({sorted(modules.values())}))\n"
    program += "import finetune_operator.__main__, finetune_operator.certificates\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
