"""Reward expressions: what they can say, and everything that they cannot do."""

import pytest

from finetune_api.failures import FineTuneError, Reason
from finetune_api.method import RewardExpression
from finetune_trainer.expressions import BadExpression, Expression, compiled, evaluated

PROMPT, COMPLETION, REFERENCE = "What is 2 + 2?", "Well, the answer is 4.", "4"


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("completion|length", 22),
        ("-words(completion) / 10", -0.5),
        ("last_number(completion) == last_number(reference)", 1),
        ("exact_match(completion, reference)", 0),
        ("exact_match('The Answer!', 'answer')", 1),
        ("contains(completion, 'ANSWER') and not contains(completion, reference ~ '2')", 1),
        ("numbers(prompt)|sum", 4),
        ("1 if completion.strip().endswith('.') else -1", 1),
        ("[words(completion), 3]|min * 0.5", 1.5),
        ("completion.split('answer')|length - 1", 1),
        ("reference is none", 0),
        ("(completion|upper) == completion", 0),
        ("1.26|round(1)", 1.3),
        ("2 ** 3 % 5", 3),
        ("true", 1),
    ],
)
def test_an_expression_gives_a_number(source: str, value: float) -> None:
    assert Expression(source)(PROMPT, COMPLETION, REFERENCE) == pytest.approx(value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        # Ways out of the sandbox.
        ("completion.__class__.__mro__", "access to attribute '__class__' of 'str' object is unsafe"),
        ("completion['__class__']", "access to attribute '__class__' of 'str' object is unsafe"),
        ("words.__globals__['math']", "access to attribute '__globals__' of 'function' object is unsafe"),
        ("completion|attr('__class__')", "No filter named 'attr'"),
        ("'{0.__class__}'.format(1)", "access to attribute 'format' of 'str' object is unsafe"),
        ("self", "`self` is not known"),
        ("cycler(1)", "`cycler` is not known"),
        ("[1].append(2)", "access to attribute 'append' of 'list' object is unsafe"),
        # Ways to take all memory or time.
        ("completion * 100000000", "`*` is allowed between numbers only"),
        ("[completion] * 100000000", "`*` is allowed between numbers only"),
        ("'%1000000000d' % 1", "`%` is allowed between numbers only"),
        ("'{:>1000000000}'.format(1)|length", "access to attribute 'format' of 'str' object is unsafe"),
        ("completion.replace('', completion)|length", "access to attribute 'replace' of 'str' object is unsafe"),
        ("completion.ljust(1000000000)|length", "access to attribute 'ljust' of 'str' object is unsafe"),
        ("completion|join(completion)|length", "No filter named 'join'"),
        ("completion|center(1000000000)", "No filter named 'center'"),
        ("[1]|batch(1000000000, 0)|list", "No filter named 'batch'"),
        ("range(100000)|sum", "`range` is not known"),
        ("10 ** 10 ** 10", "`**` is allowed with small numbers only"),
        ("1.5|round(1000000000)", "`round` takes -16 to 16 digits"),
        ("(" * 1000 + "1" + ")" * 1000, "it cannot be compiled (RecursionError)"),
        ("(" * 3000 + "1" + ")" * 3000, "it cannot be compiled (RecursionError)"),
        ("[" * 3000 + "]" * 3000, "it cannot be compiled (RecursionError)"),
        ("1" * 5000, "it cannot be compiled (ValueError)"),
        ("'\ud800'", "it gives a text; a number or a truth value is wanted"),
        ("1 if completion else " * 500 + "1", "it cannot be compiled"),
        ("-" * 2000 + "1", "it cannot be compiled (RecursionError)"),
        # Mistakes.
        ("", "unexpected 'end of template'"),
        ("(((", "unexpected 'end of template'"),
        ("1 2", "unexpected integer"),
        ("{% set x = 1 %}", "unexpected '%'"),
        ("len(completion)", "`len` is not known; known are prompt, completion, reference, words, numbers,"),
        ("answer == 'x'", "`answer` is not known"),
        ("completion", "it gives a text; a number or a truth value is wanted"),
        ("last_number('none')", "it gives none; a number or a truth value is wanted"),
        ("[1, 2]", "it gives a list; a number or a truth value is wanted"),
        ("completion.strip", "it gives a builtin_function_or_method; a number or a truth value is wanted"),
        ("1 if completion == 'x'", "it gives nothing; an `if` needs an `else`"),
        ("[1][5]", "list object has no element 5"),
        ("1 / (words(completion) - 5)", "ZeroDivisionError: division by zero"),
        ("1e308 * 10", "it gives a number that is not finite"),
        ("last_number('none') + 1", "TypeError: unsupported operand type"),
        ("words(1, 2)", "TypeError: words() takes 1 positional argument but 2 were given"),
        ("(-8) ** 0.5", "it gives a complex; a number or a truth value is wanted"),
    ],
)
def test_what_an_expression_cannot_do_is_said(source: str, message: str) -> None:
    with pytest.raises(BadExpression) as error:
        Expression(source)(PROMPT, COMPLETION, REFERENCE)
    assert message in str(error.value)


def test_a_reference_may_be_none() -> None:
    assert Expression("0 if reference is none else 1")(PROMPT, COMPLETION, None) == 0
    assert Expression("exact_match(completion, reference)")(PROMPT, COMPLETION, None) == 0
    with pytest.raises(BadExpression, match="'None' has no attribute 'lower'"):
        Expression("completion == reference.lower()")(PROMPT, COMPLETION, None)


def test_the_error_names_the_expression_and_its_place() -> None:
    good, bad = (RewardExpression(name=n, expression=e, weight=2) for n, e in (("a", "1 + 1"), ("b", "word(x)")))
    with pytest.raises(
        FineTuneError, match=r"spec.method.grpo.rewards\[1\].expression \(b\): found `word\(x\)`; `"
    ) as e:
        compiled([good, bad])
    assert e.value.reason == Reason.INVALID_SPEC
    (known,) = compiled([good])
    assert evaluated(known, 0, PROMPT, COMPLETION, None) == 4
