"""Splits follow content, not order or size."""

import hashlib

import pytest

from finetune_trainer.data.split import split_of

DIGESTS = [hashlib.blake2b(str(i).encode(), digest_size=16).digest() for i in range(4000)]


@pytest.mark.parametrize(("validation", "test"), [(0.05, 0.0), (0.2, 0.1), (0.0, 0.5)])
def test_shares_are_about_what_was_asked_for(validation: float, test: float) -> None:
    found = [split_of(digest, validation, test) for digest in DIGESTS]
    assert found.count("validation") / len(found) == pytest.approx(validation, abs=0.02)
    assert found.count("test") / len(found) == pytest.approx(test, abs=0.02)


def test_growing_one_share_moves_rows_out_of_training_only() -> None:
    for digest in DIGESTS:
        small, large = split_of(digest, 0.1, 0.2), split_of(digest, 0.3, 0.2)
        assert large == small or (small, large) == ("train", "validation")


def test_without_shares_all_is_training() -> None:
    assert {split_of(digest, 0.0) for digest in DIGESTS} == {"train"}
    assert split_of(b"\xff" * 16, 0.0, 0.0) == "train"
