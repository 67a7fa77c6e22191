"""Near duplicates: what is found, what is not, and how well the estimate holds."""

import random

import numpy as np
import pytest

from finetune_trainer.data.near import NearTexts, Sketch, sketch

WORDS = [f"word{i}" for i in range(5000)]


def sketched(text: str, answer: str = "") -> Sketch:
    found = sketch(text, answer)
    assert found is not None
    return found


def make_text(seed: int, length: int = 200) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def test_a_changed_word_is_found_in_a_thousand_texts() -> None:
    near = NearTexts(0.9)
    numbers = [near.add(sketched(" ".join(make_text(seed)))) for seed in range(3000)]
    assert numbers == list(range(3000))
    for seed in range(0, 3000, 97):
        text = make_text(seed)
        text[150] = "changed"
        match = near.find(sketched(" ".join(text).upper() + "!"))
        assert match is not None
        assert match.number == seed
        assert near.find(sketched(" ".join(make_text(seed + 10_000)))) is None


@pytest.mark.parametrize("changed", [2, 10, 20, 40])
def test_the_estimate_is_near_the_share_of_common_runs(changed: int) -> None:
    one = make_text(1, 400)
    other = one[:]
    for place in range(0, 5 * changed, 5):
        other[place] = "x"
    runs = [{tuple(text[i : i + 5]) for i in range(396)} for text in (one, other)]
    exact = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
    first, second = sketched(" ".join(one)), sketched(" ".join(other))
    assert (first.signature == second.signature).mean() == pytest.approx(exact, abs=0.12)


def test_short_texts_are_never_nearly_the_same() -> None:
    assert sketch("Number 7: repeat apple pear.", "apple pear apple") is None


def test_a_passage_with_another_short_answer_is_another_example() -> None:
    passage = " ".join(make_text(1))
    near = NearTexts(0.9)
    near.add(sketched(passage, "Denver"))
    assert near.find(sketched(passage, "Carolina")) is None
    assert near.find(sketched(passage, "denver")) is not None


def test_a_script_without_spaces_has_words_too() -> None:
    characters = [chr(0x4E00 + i) for i in np.random.default_rng(1).integers(0, 3000, 120)]
    near = NearTexts(0.8)
    near.add(sketched("".join(characters)))
    characters[60] = "\u4e00"
    assert near.find(sketched("".join(characters))) is not None


def test_the_oldest_is_forgotten() -> None:
    near = NearTexts(0.9, capacity=8)
    for seed in range(20):
        near.add(sketched(" ".join(make_text(seed))))
    found = [near.find(sketched(" ".join(make_text(seed)))) for seed in range(20)]
    assert [match.number for match in found if match] == list(range(12, 20))
    assert [match is None for match in found[:12]] == [True] * 12


def test_the_signature_stays_the_same_in_every_process() -> None:
    assert sketched(" ".join(WORDS[:50])).signature[:6].tolist() == [182, 210, 185, 236, 178, 42]
