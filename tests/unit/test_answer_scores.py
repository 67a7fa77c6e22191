"""Scores of answers against their reference implementations, on the same table of cases."""

import socket
from typing import Any

import pytest

from finetune_trainer.evaluation import answers as ours

CASES: list[tuple[str, list[str]]] = [
    ("The cat sat on the mat.", ["The cat sat on the mat."]),
    ("a cat sat on a mat", ["The cat sat on the mat.", "There is a cat on the mat"]),
    ("the cat, the dog; and a bird!", ["A dog. The cat? and bird"]),
    ("it is 42", ["42", "forty-two"]),
    ("", ["something"]),
    ("something", [""]),
    ("", [""]),
    ("!!!", ["..."]),
    ("the", ["a"]),
    ("Running runners run", ["He runs, and the runner ran"]),
    ("one two three four five six seven", ["seven six five four three two one"]),
    ("x " * 60, ["x " * 50 + "y"]),
    ("Zürich ist schön", ["zürich ist sehr schön"]),
    ("東京は大きい", ["東京は小さい", "大阪"]),
    ("привет мир", ["Привет, мир!"]),
    ("emoji 🙂 here", ["emoji 🙂 there"]),
    ("new\nline\tand  spaces", ["new line and spaces"]),
]
ANSWERS, REFERENCES = [answer for answer, _ in CASES], [known for _, known in CASES]
ASCII = [(answer, known) for answer, known in CASES if (answer + "".join(known)).isascii()]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a metric asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(("answer", "known"), CASES)
def test_exact_match_and_f1_are_those_of_squad(answer: str, known: list[str]) -> None:
    from torchmetrics.functional.text import squad

    target = [{"id": "1", "answers": {"answer_start": [0] * len(known), "text": known}}]
    reference = squad([{"id": "1", "prediction_text": answer}], target)
    assert 100 * ours.exact_match([answer], [known]) == pytest.approx(float(reference["exact_match"]), abs=1e-4)
    assert 100 * ours.f1([answer], [known]) == pytest.approx(float(reference["f1"]), abs=1e-4)


@pytest.mark.parametrize(("answer", "known"), ASCII)
def test_rouge_is_that_of_rouge_score_on_its_own_alphabet(answer: str, known: list[str]) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    reference = RougeScorer(kinds).score_multi(known, answer)
    assert ours.rouge([answer], [known]) == pytest.approx({kind: reference[kind].fmeasure for kind in kinds})


@pytest.mark.parametrize(
    ("answer", "known", "rouge1"),
    [
        ("Zürich ist schön", "zürich ist sehr schön", 2 * 3 / 7),
        ("привет мир", "Привет, мир!", 1.0),
        # Each sign is a word where no spaces are written: four of six are the same.
        ("東京は大きい", "東京は小さい", 4 / 6),
    ],
)
def test_rouge_reads_any_script(answer: str, known: str, rouge1: float) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    assert ours.rouge([answer], [[known]])["rouge1"] == pytest.approx(rouge1)
    assert RougeScorer(["rouge1"]).score(known, answer)["rouge1"].fmeasure != pytest.approx(rouge1)


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    from sacrebleu.metrics import BLEU, CHRF

    references: Any = [[known[i] if i < len(known) else None for known in REFERENCES] for i in range(2)]
    assert ours.bleu(ANSWERS, REFERENCES) == pytest.approx(BLEU().corpus_score(ANSWERS, references).score)
    assert ours.chrf(ANSWERS, REFERENCES) == pytest.approx(CHRF().corpus_score(ANSWERS, references).score)
    assert 0 < ours.bleu(ANSWERS, REFERENCES) < 100
    same = ["one two three four five"]
    assert (ours.bleu(same, [same]), ours.chrf(same, [same])) == pytest.approx((100, 100))


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        # Banerjee and Lavie: F = 10 P R / (R + 9 P), less half the cube of chunks over matches.
        ("the cat sat on the mat", "the cat sat on the mat", 1 - 0.5 * (1 / 6) ** 3),
        ("on the mat sat the cat", "the cat sat on the mat", None),
        ("cats sat", "the cat sat", (10 * 1 * (2 / 3)) / (2 / 3 + 9) * (1 - 0.5 * (1 / 2) ** 3)),
        ("big", "large", 0.0),
        ("", "something", 0.0),
    ],
)
def test_meteor_matches_words_and_stems(answer: str, reference: str, score: float | None) -> None:
    from nltk.translate.meteor_score import single_meteor_score

    class Nothing:
        def synsets(self, _: str) -> list[Any]:
            return []

    found = ours.meteor([answer], [[reference]])
    theirs = single_meteor_score(reference.split(), answer.split(), wordnet=Nothing())
    assert found == pytest.approx(theirs)
    if score is not None:
        assert found == pytest.approx(score)


def test_of_several_references_the_best_counts_and_means_are_over_answers() -> None:
    for score in (ours.exact_match, ours.f1, ours.meteor, lambda a, r: ours.rouge(a, r)["rougeL"]):
        alone = score(["a b c"], [["a b c"]])
        assert score(["a b c"], [["nothing alike", "a b c"]]) == pytest.approx(alone)
        assert score(["a b c", "x"], [["a b c"], ["y"]]) == pytest.approx(alone / 2)


def test_without_answers_every_score_is_nothing() -> None:
    for name, score in ours.SCORES.items():
        assert set(score([], []).values()) == {0.0}, name


def test_the_metrics_of_the_api_are_those_that_are_computed() -> None:
    from finetune_api.figures import ANSWERS as NAMES

    computed = {metric: tuple(score(["a"], [["a"]])) for metric, score in ours.SCORES.items()}
    assert computed == {metric: names for metric, names in NAMES.items() if metric != "WinRate"}
