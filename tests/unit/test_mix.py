"""What each dataset is to give, and what of each was learned."""

import numpy as np
import pytest

from finetune_trainer.mix import Mix, figures_of, weights_of
from support.runs import make_run_config
from unit.test_batches import make_examples, make_plan

LENGTHS = [5] * 80 + [9] * 16
DATASETS = [0] * 80 + [1] * 16
NAMES = ["tickets", "jokes"]


def weights(**spec: object) -> list[float | None]:
    datasets = [{"name": name, "uri": f"s3://data/{name}.jsonl"} for name in NAMES]
    given = spec.pop("weights", [None, None])
    for dataset, weight in zip(datasets, given, strict=True):  # type: ignore[call-overload]
        dataset |= {} if weight is None else {"weight": weight}
    rows = make_plan(make_examples(LENGTHS, DATASETS), weights=(None, None)).rows
    return weights_of(make_run_config(datasets=datasets, **spec).spec, rows)


def test_weights_follow_what_the_mix_says() -> None:
    assert weights() == [None, None]
    assert weights(weights=[0.7, 0.3]) == [0.7, 0.3]
    assert weights(mixing={"type": "Proportional"}) == [None, None]
    assert weights(mixing={"type": "Temperature", "temperature": 2}) == pytest.approx([80**0.5, 16**0.5])


def test_a_mix_by_temperature_is_what_is_seen() -> None:
    by_temperature = tuple(weights(mixing={"type": "Temperature", "temperature": 2}))
    plan = make_plan(make_examples(LENGTHS, DATASETS), weights=by_temperature, epochs=4)
    mix = Mix(plan, NAMES)
    for step in range(plan.total_steps):
        mix.add(step)
    share = 80**0.5 / (80**0.5 + 16**0.5)
    assert plan.planned == pytest.approx([share, 1 - share], abs=0.01)
    rows = [mix.seen[name][0] for name in NAMES]
    assert sum(rows) == 4 * 96
    assert rows[0] / sum(rows) == pytest.approx(share, abs=0.01)
    assert [mix.seen[name][1] for name in NAMES] == [5 * rows[0], 9 * rows[1]]
    assert mix.tokens == 5 * rows[0] + 9 * rows[1]


@pytest.mark.parametrize("stop", [1, 7, 20])
def test_a_count_that_was_interrupted_goes_on_exactly(stop: int) -> None:
    plan = make_plan(make_examples(LENGTHS, DATASETS), weights=(1.0, 2.0), epochs=1)
    whole, first = Mix(plan, NAMES), Mix(plan, NAMES)
    for step in range(plan.total_steps):
        whole.add(step)
    for step in range(stop):
        first.add(step)
    second = Mix(plan, NAMES, first.seen)
    for step in range(stop, plan.total_steps):
        second.add(step)
    assert second.seen == whole.seen
    ids = np.concatenate([plan.step(step) for step in range(plan.total_steps)])
    assert whole.seen["jokes"][0] == int((plan.rows.dataset[ids] == 1).sum())


def test_figures_name_the_datasets_and_leave_out_a_single_one() -> None:
    assert figures_of({"a": (1, 2), "b": (3, 4)}, "rows", "tokens") == {
        "rows.a": 1.0,
        "rows.b": 3.0,
        "tokens.a": 2.0,
        "tokens.b": 4.0,
    }
    assert figures_of({"a": (1, 2)}, "rows", "tokens") == {}
