"""Self-Instruct's pure part: requests, what is read out of answers, and which rows are kept."""

import pytest
from rapidfuzz.distance import Indel
from rouge_score.rouge_scorer import RougeScorer

from finetune_api.stage import Generate
from finetune_trainer.synthesis.filters import Filters, words
from finetune_trainer.synthesis.requests import Pair, opening, parse, request

POOL = [Pair(f"Name a colour that begins with {letter}", f"{letter}-colour") for letter in "abcdefgh"]


def test_a_request_shows_rows_and_is_a_function_of_its_number() -> None:
    one, again, other = request(POOL, 3, 2, 7), request(POOL, 3, 2, 7), request(POOL, 4, 2, 7)
    assert one == again
    assert one.seeds != other.seeds
    assert len(set(one.seeds)) == 2
    first, second = (POOL[place] for place in one.seeds)
    assert one.text == (
        f"### Task 1:\n{first.instruction}\n\n### Answer 1:\n{first.answer}\n\n"
        f"### Task 2:\n{second.instruction}\n\n### Answer 2:\n{second.answer}\n\n"
    )
    assert opening(one) == "### Task 3:\n"
    assert len(request(POOL[:1], 0, 4, 7).seeds) == 1


@pytest.mark.parametrize(
    ("continuation", "pair"),
    [
        (" Add 1 and 2\n\n### Answer 3:\n3\n\n### Task 4:\nmore", Pair("Add 1 and 2", "3")),
        ("Add\n### Answer 3: two\nlines", Pair("Add", "two\nlines")),
        ("Add 1 and 2", None),
        ("\n### Answer 3:\n3", None),
        ("Add\n### Answer 3:\n  ", None),
        ("Add\n\n### Answer 2:\n3", None),
        ("Add\n### Task 4:\nSubtract\n### Answer 3:\n3", None),
    ],
)
def test_what_is_read_out_of_an_answer(continuation: str, pair: Pair | None) -> None:
    assert parse(request(POOL, 0, 2, 7), continuation) == pair


def test_filters_leave_out_by_length_likeness_and_score() -> None:
    options = Generate(count=10, min_words=2, max_words=6, min_score=-1.0, max_similarity=0.7)
    filters = Filters(options, ["Name a colour that begins with a"])
    good = Pair("Count the planets of the sun", "There are eight")
    assert filters.keep(good, -0.5)
    assert not filters.keep(None, 0.0)
    assert not filters.keep(Pair("Sum", "one two"), 0.0)
    assert not filters.keep(Pair("one two three four five six seven", "one two"), 0.0)
    assert not filters.keep(Pair("Invent a proverb", "All is well"), -1.5)
    # Like what there was, and like what has been kept.
    assert not filters.keep(Pair("Name a colour begins with z", "it is zinc"), 0.0)
    assert not filters.keep(Pair("Count the planets of the Sun!", "There are nine"), 0.0)
    assert filters.dropped == {"unreadable": 1, "length": 2, "score": 1, "similar": 2}


@pytest.mark.parametrize(
    ("one", "other"),
    [("a b c d", "a c d e"), ("the cat sat", "sat the cat on a mat"), ("x", "y"), ("one two two three", "two one two")],
)
def test_likeness_is_rouge_l(one: str, other: str) -> None:
    expected = RougeScorer(["rougeL"]).score(one, other)["rougeL"].fmeasure
    assert Indel.normalized_similarity(words(one), words(other)) == pytest.approx(expected)
