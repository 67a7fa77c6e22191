"""Every example as a job, and beside them as many cells of the matrix as make every pair of choices once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import examples, matrix, runner
from support.matrix import METHODS, Cell
from support.runner import Ended, Runner
from support.writing import make_writer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200), pytest.mark.gang]
EXAMPLES = examples.jobs()
EARLIER = Cell("SFT", "LoRA", 1)
"""Whose adapter an example goes on from."""


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with runner.running(tmp_path_factory.mktemp("matrix"), at_once=3) as found:
        found.run([EARLIER.manifest(), matrix.JUDGE.manifest()])
        yield found


@pytest.fixture(scope="module")
def ended(laptop: Runner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Every example, by its file's name."""
    adapter, judge = laptop.published[EARLIER.name].uri, laptop.published[matrix.JUDGE.name].uri
    rows = tmp_path_factory.mktemp("rows")
    for path in make_writer(tmp_path_factory.mktemp("writer")).iterdir():
        laptop.put(path, examples.WRITER + path.name)
    manifests = {name: examples.shrunk(name, job, laptop.put, rows, adapter, judge) for name, job in EXAMPLES.items()}
    found = laptop.run(list(manifests.values()))
    return {name: found[manifest["metadata"]["name"]] for name, manifest in manifests.items()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, laptop: Runner, ended: dict[str, Ended], tmp_path: Path) -> None:
    assert ended[name].problem == ""
    cell = examples.cell_of(EXAMPLES[name])
    if cell.method in METHODS and "/" not in cell.lesson.figure:
        before, after = (ended[name].metrics[cell.lesson.figure + suffix] for suffix in ("Before", ""))
        assert (after > before) == cell.lesson.rises, (cell.lesson.figure, before, after)
    assert list(laptop.fetch(ended[name], tmp_path / "artifact").iterdir())


def test_every_pair_of_choices(laptop: Runner) -> None:
    done = [EARLIER, matrix.JUDGE, *map(examples.cell_of, EXAMPLES.values())]
    chosen = {cell.name: cell for cell in matrix.cover(matrix.candidates(), done)}
    problems = {}

    def check(name: str, ended: Ended) -> None:
        if problem := laptop.check(chosen[name], ended):
            problems[name] = problem

    laptop.run([cell.manifest(reward_model=laptop.reward_model()) for cell in chosen.values()], check)
    assert problems == {}
