"""Answers compared with references, as pure functions: each takes the answers and, for each, one or more references.

bleu and chrf are of the whole and on sacrebleu's scale, 0 to 100; all others are means over the answers, 0 to 1.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

Answers = Sequence[str]
References = Sequence[Sequence[str]]
"""For each answer what it may be; at least one."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Scripts that put no spaces between words: each of their signs counts as one.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_TOKENS = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+|[^\w\s]")


def normalized(text: str) -> str:
    """As SQuAD's own evaluation does: lower case, without punctuation, articles and runs of white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answers: Answers, references: References) -> float:
    """The share of answers that are one of their references, both normalized (Rajpurkar et al. 2016)."""
    return _mean(
        max(float(normalized(answer) == normalized(r)) for r in known) for answer, known in _both(answers, references)
    )


def f1(answers: Answers, references: References) -> float:
    """The mean F1 of the words that an answer and its reference share, both normalized (Rajpurkar et al. 2016)."""
    return _mean(max(_overlap(answer, r) for r in known) for answer, known in _both(answers, references))


def rouge(answers: Answers, references: References) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), without stemming; of several references the best.

    On ASCII text they are those of rouge-score; its own words are ASCII alone, ours are of any script.
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, tokenizer=_Words())
    found = [scorer.score_multi(list(known), answer) for answer, known in _both(answers, references)]
    return {kind: _mean(score[kind].fmeasure for score in found) for kind in kinds}


def bleu(answers: Answers, references: References) -> float:
    """BLEU (Papineni et al. 2002) of the whole, by sacrebleu: its tokeniser 13a and exponential smoothing."""
    from sacrebleu import corpus_bleu

    return float(corpus_bleu(list(answers), _transposed(references)).score) if answers else 0.0


def chrf(answers: Answers, references: References) -> float:
    """chrF (Popović 2015) of the whole, by sacrebleu: six characters, beta 2."""
    from sacrebleu import corpus_chrf

    return float(corpus_chrf(list(answers), _transposed(references)).score) if answers else 0.0


def meteor(answers: Answers, references: References) -> float:
    """Mean METEOR (Banerjee and Lavie 2005) by nltk with exact and stem matches alone: synonyms need WordNet's data."""
    from nltk.translate.meteor_score import meteor_score

    return _mean(
        meteor_score([_TOKENS.findall(r) for r in known], _TOKENS.findall(answer), wordnet=_NoSynonyms())
        for answer, known in _both(answers, references)
    )


SCORES: dict[str, Callable[[Answers, References], dict[str, float]]] = {
    "ExactMatch": lambda answers, references: {"exactMatch": exact_match(answers, references)},
    "F1": lambda answers, references: {"f1": f1(answers, references)},
    "Rouge": rouge,
    "Bleu": lambda answers, references: {"bleu": bleu(answers, references)},
    "Chrf": lambda answers, references: {"chrf": chrf(answers, references)},
    "Meteor": lambda answers, references: {"meteor": meteor(answers, references)},
}
"""By the metric's name in spec.evaluation.metrics."""


class _Words:
    """rouge-score's tokeniser for any script."""

    def tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(text.lower())


class _NoSynonyms:
    def synsets(self, word: str) -> list[Any]:
        return []


def _overlap(answer: str, reference: str) -> float:
    said, wanted = normalized(answer).split(), normalized(reference).split()
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else float(not said and not wanted)


def _both(answers: Answers, references: References) -> Iterable[tuple[str, Sequence[str]]]:
    return zip(answers, references, strict=True)


def _transposed(references: References) -> list[list[str]]:
    """sacrebleu's layout: the first references of all answers, then the second ones."""
    most = max((len(known) for known in references), default=0)
    # It takes None where an answer has fewer, though its types do not say so.
    return [[known[i] if i < len(known) else cast(str, None) for known in references] for i in range(most)]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
