"""Groups of held-out examples, the questions that are asked of them, and what a result must reach."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from finetune_api.evaluation import Evaluation
from finetune_api.failures import FineTuneError, Reason
from finetune_trainer.batches import Examples
from finetune_trainer.evaluation.gates import check
from finetune_trainer.evaluation.groups import MAX_SLICES, OTHER, groups_of, whole
from finetune_trainer.evaluation.loss import batches_of
from finetune_trainer.evaluation.questions import answer_of, last_tokens, questions_of
from finetune_trainer.shards import Classes, Pairs, Prompts, Unpaired


def examples(rows: Sequence[tuple[list[int], list[int]]], dataset: Sequence[int] | None = None) -> Examples:
    ids = np.array([token for tokens, _ in rows for token in tokens] + [0], dtype=np.int32)
    labels = np.array([label for _, labels in rows for label in labels] + [0], dtype=np.int32)
    ends = np.cumsum([0, *(len(tokens) for tokens, _ in rows)])
    return Examples(ids, labels, ends, np.array([0] * len(rows) if dataset is None else dataset))


def decode(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def test_sums_of_groups_are_sums_of_their_examples() -> None:
    rng = np.random.default_rng(0)
    dataset = rng.integers(0, 3, 200)
    slices = [None if d == 2 or i % 7 == 0 else f"s{i % 4}" for i, d in enumerate(dataset.tolist())]
    values = rng.random(200)
    groups = groups_of(dataset, ["a", "b", "c"], slices)
    sums = np.zeros((groups.leaves, 1))
    np.add.at(sums, groups.leaf, values[:, None])
    told = groups.told(sums, lambda found: {"evalLoss": found[0]})
    expected = {"evalLoss": values.sum()}
    for number, name in enumerate("abc"):
        expected[f"evalLoss.{name}"] = values[dataset == number].sum()
        for s in {s for s in slices if s}:
            chosen = [i for i in range(200) if dataset[i] == number and slices[i] == s]
            if chosen:
                expected[f"evalLoss.{name}.{s}"] = values[chosen].sum()
    assert told == pytest.approx(expected)
    assert {suffix: len(ids) for suffix, ids in groups.members()} == {
        name.removeprefix("evalLoss"): len(
            [
                i
                for i in range(200)
                if name in ("evalLoss", f"evalLoss.{'abc'[dataset[i]]}", f"evalLoss.{'abc'[dataset[i]]}.{slices[i]}")
            ]
        )
        for name in expected
    }


def test_one_dataset_is_not_told_apart_from_everything() -> None:
    assert groups_of(np.zeros(3, dtype=np.int64), ["only"]).sets == ()
    assert groups_of(np.zeros(0, dtype=np.int64), ["only"]).told(np.zeros((1, 1)), lambda s: {"x": s[0]}) == {"x": 0}


def test_of_many_slices_the_most_frequent_are_told() -> None:
    slices = [f"s{i}" for i in range(30) for _ in range(40 - i)]
    groups = groups_of(np.zeros(len(slices), dtype=np.int64), ["d"], slices)
    names = [suffix for suffix, _ in groups.sets]
    assert len(names) == MAX_SLICES
    assert set(names) == {f".d.s{i}" for i in range(MAX_SLICES - 1)} | {f".d.{OTHER}"}
    sizes = {suffix: len(ids) for suffix, ids in groups.members()}
    assert sizes[".d.other"] == sum(40 - i for i in range(MAX_SLICES - 1, 30))
    exactly = groups_of(np.zeros(MAX_SLICES, dtype=np.int64), ["d"], [f"s{i}" for i in range(MAX_SLICES)])
    assert OTHER not in {suffix.rpartition(".")[2] for suffix, _ in exactly.sets}


@pytest.mark.parametrize("world", [1, 2, 5])
def test_batches_of_groups_hold_every_example_once(world: int) -> None:
    data = examples([([1] * n, [1] * n) for n in (3, 9, 4, 4, 7, 2, 8)], [0, 1, 0, 1, 1, 0, 2])
    groups = groups_of(data.dataset, ["a", "b", "c"])
    plans = [batches_of(data, rank, world, 2, groups) for rank in range(world)]
    assert len({len(plan) for plan in plans}) == 1
    counted = [i for plan in plans for ids, counts in plan if counts for i in ids]
    assert sorted(counted) == list(range(7))
    assert all(len(set(groups.leaf[ids].tolist())) == 1 for plan in plans for ids, _ in plan)


@pytest.mark.parametrize(
    ("labels", "span"),
    [
        ([-100, -100, 5, 6], (2, 4)),
        ([-100, 4, 5, -100, 6], (1, 3)),
        ([3, 4, 5], (1, 3)),
        ([3, -100, 5], (2, 3)),
        ([-100, -100], (0, 0)),
        ([5], (0, 0)),
    ],
)
def test_an_answer_is_the_first_run_of_learned_tokens(labels: list[int], span: tuple[int, int]) -> None:
    assert answer_of(np.array(labels, dtype=np.int32)) == span


def test_questions_of_every_kind_of_data() -> None:
    rows = [([1, i, i + 1, 9, 2], [-100, -100, -100, 9, 2]) for i in range(10, 16)]
    data = examples(rows)
    asked = questions_of(data, 100, decode)
    assert [q.prompt.tolist() for q in asked] == [[1, i, i + 1] for i in range(10, 16)]
    assert {q.reference for q in asked} == {"9 2"}
    assert last_tokens(data) == {2}
    assert [q.place for q in questions_of(Pairs(data, data), 100, decode)] == list(range(6))
    verdicts = np.array([True, False] * 3)
    assert [q.place for q in questions_of(Unpaired(data, verdicts), 100, decode)] == [0, 2, 4]
    prompts = questions_of(Prompts(data, [" yes ", None, "no", None, None, None]), 100, decode)
    assert [(q.place, q.prompt.tolist(), q.reference) for q in prompts] == [
        (0, rows[0][0], "yes"),
        (2, rows[2][0], "no"),
    ]
    assert questions_of(Classes(data, np.zeros(6, dtype=np.int64), ["a"]), 100, decode) == []
    texts = examples([([1, 5, 6], [1, 5, 6]), ([1, 5, 6], [-100, 5, 6])])
    assert questions_of(texts, 100, decode) == []


def test_which_questions_are_asked_depends_on_their_content_alone() -> None:
    rows = [([1, i, i + 1, 9, 2], [-100, -100, -100, 9, 2]) for i in range(100)]
    dataset = [i % 2 for i in range(100)]
    chosen = questions_of(examples(rows, dataset), 7, decode)
    assert [sum(dataset[q.place] == d for q in chosen) for d in (0, 1)] == [7, 7]
    order = np.random.default_rng(3).permutation(100)
    again = questions_of(examples([rows[i] for i in order], [dataset[i] for i in order]), 7, decode)
    assert {tuple(q.prompt) for q in again} == {tuple(q.prompt) for q in chosen}


def gated(metrics: dict[str, float], stages: Sequence[str] = (), **evaluation: Any) -> str:
    """What is said of it; empty where all is well."""
    try:
        check(Evaluation.model_validate(evaluation), metrics, stages)
    except FineTuneError as error:
        return str(error) if error.reason == Reason.GATE_NOT_MET else f"{error.reason}"
    return ""


def test_gates_say_what_was_found_and_what_is_wanted() -> None:
    gates = [
        {"metric": "rougeL", "operator": "AtLeast", "value": 0.3},
        {"metric": "evalLoss", "operator": "AtMost", "value": 2},
        {"metric": "bleu", "operator": "AtLeast", "value": 1},
    ]
    assert gated({"rougeL": 0.3, "evalLoss": 2.0, "bleu": 30.0}, gates=gates) == ""
    assert gated({"rougeL": 0.21, "evalLoss": 2.5, "perplexity": 12.0}, gates=gates) == (
        "spec.evaluation.gates[0]: rougeL is 0.21; at least 0.3 is wanted; "
        "spec.evaluation.gates[1]: evalLoss is 2.5; at most 2 is wanted; "
        "spec.evaluation.gates[2]: bleu was not measured; there are evalLoss, perplexity, rougeL"
    )


def test_a_gate_may_name_the_only_dataset_there_is() -> None:
    gates = [{"metric": "evalLoss.tickets", "operator": "AtMost", "value": 2}]
    known = {"evalLoss": 1.0, "trainTokens.tickets": 5.0, "evalLoss.tickets.de": 3.0}
    assert gated(known, gates=gates) == ""
    assert "was not measured" in gated(known | {"evalLoss.mails": 1.0}, gates=gates)


def test_what_may_not_be_lost() -> None:
    retention = {"datasets": [{"name": "w", "uri": "s3://data/w/"}], "maxRegression": 0.05}
    assert gated({"retentionLoss": 2.1, "retentionLossBefore": 2.0}, retention=retention) == ""
    assert gated({"retentionLoss": 1.0, "retentionLossBefore": 2.0}, retention=retention) == ""
    assert gated({"retentionLoss": 2.2, "retentionLossBefore": 2.0}, retention=retention) == (
        "spec.evaluation.retention: retentionLoss rose from 2 to 2.2, by 10.0%; at most 5.0% is allowed"
    )
    assert "was not measured" in gated({"retentionLoss": 2.2}, retention=retention)
    # Little by little, over stages; the reward model between them has nothing to tell.
    steps = {"sft/retentionLossBefore": 2.0, "sft/retentionLoss": 2.08} | {
        "ppo/retentionLossBefore": 2.08,
        "ppo/retentionLoss": 2.16,
    }
    assert "from 2 to 2.16" in gated(steps, ["sft", "reward", "ppo"], retention=retention)


def test_one_group_of_all() -> None:
    assert whole(4).members()[0][1].tolist() == [0, 1, 2, 3]
