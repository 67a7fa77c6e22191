"""Reward expressions: rules written in a manifest that score an answer, as Jinja expressions that can reach nothing.

An expression sees `prompt`, `completion` and `reference` (text; reference may be none) and the functions below. What it
may use is listed, filter by filter and method by method: nothing in the list makes a long text out of a short one, runs
longer than a few passes over the text, or reaches an object that is not a text, a number or a list of them.
"""

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune_api.failures import FineTuneError, Reason
from finetune_api.method import Method, RewardExpression

VARIABLES = ("prompt", "completion", "reference")
FILTERS = (
    "abs", "count", "default", "first", "float", "int", "last", "length", "list", "lower", "max", "min", "round",
    "sort", "string", "sum", "trim", "unique", "upper", "wordcount",
)  # fmt: skip
TESTS = (
    "defined", "undefined", "divisibleby", "even", "odd", "none", "number", "string", "integer", "float", "boolean",
    "true", "false", "in", "eq", "==", "ne", "!=", "lt", "<", "le", "<=", "gt", ">", "ge", ">=",
)  # fmt: skip
METHODS = (
    "lower", "upper", "strip", "lstrip", "rstrip", "split", "splitlines", "startswith", "endswith", "count", "find",
    "removeprefix", "removesuffix", "isdigit", "isalpha", "isupper", "islower",
)  # fmt: skip
"""Of texts; nothing else has any."""
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class BadExpression(Exception):
    """An expression that cannot be compiled, or that gave no number; the text says why."""


def words(text: str | None) -> int:
    """How many words there are."""
    return len((text or "").split())


def numbers(text: str | None) -> list[float]:
    """The numbers in a text, in order; a comma between digits groups thousands."""
    found = (float(match.replace(",", "")) for match in _NUMBER.findall(text or ""))
    return [value for value in found if math.isfinite(value)]


def last_number(text: str | None) -> float | None:
    """The last number in a text; none where there is none."""
    found = numbers(text)
    return found[-1] if found else None


def normalized(text: str | None) -> str:
    """Lower case, without punctuation, articles and superfluous space (SQuAD's rule for comparing answers)."""
    return " ".join(_ARTICLES.sub(" ", (text or "").lower().translate(_PUNCTUATION)).split())


def exact_match(text: str | None, other: str | None) -> bool:
    """Whether both are the same once normalised; false where one is none."""
    return text is not None and other is not None and normalized(text) == normalized(other)


def contains(text: str | None, part: str | None) -> bool:
    """Whether a part stands in a text, in whatever case; false where one is none."""
    return text is not None and part is not None and part.lower() in text.lower()


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function for function in (words, numbers, last_number, normalized, exact_match, contains)
}


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined)
        self.filters = {name: self.filters[name] for name in FILTERS} | {"round": _round}
        self.tests = {name: self.tests[name] for name in TESTS}
        self.globals.clear()
        self.globals.update(FUNCTIONS)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return isinstance(obj, str) and attr in METHODS

    def wrap_str_format(self, value: Any) -> None:
        """Nothing is formatted: a format pads to a width of its own choice."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise SecurityError(f"`{operator}` is allowed between numbers only")
        if operator == "**" and (abs(left) > 10**6 or abs(right) > 16):
            raise SecurityError("`**` is allowed with small numbers only")
        return super().call_binop(context, operator, left, right)


class Expression:
    """One compiled expression."""

    def __init__(self, source: str) -> None:
        """Raises BadExpression."""
        env = _Environment()
        try:
            parser = Parser(env, source, state="variable")
            found = parser.parse_expression()
            if not parser.stream.eos:
                raise TemplateSyntaxError(f"unexpected {parser.stream.current}", 1)
            tree = nodes.Template([nodes.Assign(nodes.Name("result", "store"), found)], lineno=1)
            tree.set_environment(env)
            for node in tree.find_all(nodes.Expr):
                node.set_lineno(1)
            names = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
            if unknown := names - {*VARIABLES, *FUNCTIONS}:
                known = ", ".join((*VARIABLES, *FUNCTIONS))
                raise BadExpression(f"`{min(unknown)}` is not known; known are {known}")
            self._template = env.from_string(tree)
        except TemplateError as error:
            raise BadExpression(str(error.message)) from error
        except BadExpression:
            raise
        except Exception as error:
            # Jinja writes Python, whose compiler has limits of its own.
            raise BadExpression(f"it cannot be compiled ({type(error).__name__})") from error

    def __call__(self, prompt: str, completion: str, reference: str | None) -> float:
        """Its value, a truth value as 0 or 1. Raises BadExpression."""
        variables = {"prompt": prompt, "completion": completion, "reference": reference}
        try:
            context = self._template.new_context(variables)
            for _ in self._template.root_render_func(context):
                pass
            return _number(context.vars["result"])
        except TemplateError as error:
            raise BadExpression(str(error.message or type(error).__name__)) from error
        except BadExpression:
            raise
        except Exception as error:
            raise BadExpression(f"{type(error).__name__}: {error}") from error


def _round(value: float, digits: int = 0) -> float:
    if not -16 <= digits <= 16:
        raise SecurityError("`round` takes -16 to 16 digits")
    return round(value, digits)


def _number(value: Any) -> float:
    if isinstance(value, StrictUndefined):
        str(value)  # says what it is that is not there, or not allowed
    if isinstance(value, Undefined):
        raise BadExpression("it gives nothing; an `if` needs an `else`")
    if not isinstance(value, bool | int | float):
        kind = "none" if value is None else "a text" if isinstance(value, str) else f"a {type(value).__name__}"
        raise BadExpression(f"it gives {kind}; a number or a truth value is wanted")
    if not math.isfinite(value):
        raise BadExpression("it gives a number that is not finite")
    return float(value)


Weighted = tuple[RewardExpression, Expression]


def compiled(rewards: Sequence[RewardExpression]) -> list[Weighted]:
    """Raises InvalidSpec."""
    found = []
    for place, reward in enumerate(rewards):
        try:
            found.append((reward, Expression(reward.expression)))
        except BadExpression as error:
            raise _invalid(reward, place, error) from error
    return found


def evaluated(expression: Weighted, place: int, prompt: str, completion: str, reference: str | None) -> float:
    """Times its weight. Raises InvalidSpec."""
    reward, value = expression
    try:
        return reward.weight * value(prompt, completion, reference)
    except BadExpression as error:
        raise _invalid(reward, place, error) from error


def _invalid(reward: RewardExpression, place: int, error: BadExpression) -> FineTuneError:
    field = f"spec.method.grpo.rewards[{place}].expression"
    return FineTuneError(Reason.INVALID_SPEC, f"{field} ({reward.name}): found `{reward.expression}`; {error}")


def expressions_of(method: Method) -> list[RewardExpression]:
    return list(method.grpo.rewards) if method.type == "GRPO" and method.grpo else []
