"""The figures of a run over its attempts."""

import pytest

from finetune_trainer.batches import Plan
from finetune_trainer.journal import Journal
from finetune_trainer.state import SavedState
from unit.test_batches import make_examples, make_plan

NAMES = ["tickets", "jokes"]


def run(journal: Journal, first: int, last: int) -> None:
    for step in range(first, last + 1):
        journal.learned(step)
        journal.logged({"loss": 1.0 / step})
        if step % 4 == 0:
            journal.evaluated({"evalLoss": 2.0 / step, "rewardMargin": 0.1, "evalLoss.tickets": 1.0})


def plan() -> Plan:
    return make_plan(make_examples([5] * 40 + [9] * 8, [0] * 40 + [1] * 8), weights=(0.5, 0.5), epochs=1)


@pytest.mark.parametrize("stop", [3, 4])
def test_what_is_resumed_has_the_figures_of_what_nothing_interrupted(stop: int) -> None:
    whole, first = Journal(None, plan(), NAMES), Journal(None, plan(), NAMES)
    run(whole, 1, 12)
    run(first, 1, stop)
    saved = SavedState.model_validate_json(first.saved(stop, {}).model_dump_json())
    second = Journal(saved, plan(), NAMES)
    assert second.is_evaluated() is (stop == 4)
    run(second, stop + 1, 12)

    def told(journal: Journal) -> list[dict[str, float]]:
        return [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in journal.history]

    assert told(second) == told(whole)
    assert second.tokens == whole.tokens == 24 * 5 + 24 * 9
    for figure in ("trainRows", "trainTokens", "plannedShare"):
        for name in NAMES:
            assert second.after()[f"{figure}.{name}"] == whole.after()[f"{figure}.{name}"]
    assert whole.after()["trainRows.jokes"] == 24
    assert whole.after()["plannedShare.jokes"] == 0.5


def test_an_evaluation_belongs_to_its_step_and_leaves_datasets_out() -> None:
    journal = Journal(None, plan(), NAMES)
    run(journal, 1, 4)
    entry = journal.history[-1]
    assert (entry["step"], entry["eval_loss"], entry["eval_reward_margin"]) == (4.0, 0.5, 0.1)
    assert "eval_loss.tickets" not in entry
    assert (entry["rows.tickets"], entry["rows.jokes"]) == (
        float(journal.mix.seen["tickets"][0]),
        16.0 - entry["rows.tickets"],
    )
