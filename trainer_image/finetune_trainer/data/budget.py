"""The budget of one rendering: steps for loops, calls, filters and tests, and for every value by its size.

A rendering that pays for all that it does ends after a bounded time and holds a bounded amount of memory, whatever the
template says.
"""

import contextvars
import time
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

STEP_LIMIT = 200_000
"""Steps of one rendering."""
OUTPUT_LIMIT = 4 * 2**20
"""Characters that one rendering may write, and that one text may have."""
PER_STEP = 256
"""Characters that are made for one step."""
SECONDS = 2.0
"""CPU time of one rendering: what the steps do not count must end, too."""
_CHECK = 64
"""Steps between two looks at the clock."""
_NUMBER_LIMIT = 2**128
_SIZED = (str, list, tuple, dict, range)
_NESTED: tuple[type, ...] = (list, tuple, dict, type({}.keys()), type({}.values()), type({}.items()), Namespace)


class Exceeded(SecurityError):
    """A rendering takes more than it may."""


class Budget:
    """The steps that are left to one rendering."""

    __slots__ = ("_look_at", "_until", "left")

    def __init__(self) -> None:
        self.left = STEP_LIMIT
        self._look_at = STEP_LIMIT - _CHECK
        self._until = time.thread_time() + SECONDS

    def spend(self, steps: int) -> None:
        """Raises Exceeded."""
        self.left -= steps
        if self.left < self._look_at:
            self._look()

    def text(self, length: int) -> None:
        """Pays for a text that is to be made. Raises Exceeded."""
        if length > OUTPUT_LIMIT:
            raise Exceeded(f"it makes a text of more than {OUTPUT_LIMIT:,} characters")
        self.spend(length // PER_STEP)

    def items(self, values: Any) -> None:
        """Pays for one pass over a value. Raises Exceeded."""
        size = len(values) if isinstance(values, _SIZED) else 0
        self.spend(1 + (size // PER_STEP if isinstance(values, str) else size))

    def value(self, value: Any) -> Any:
        """Pays for a value that was made, and for all that lies in it as often as it lies there. Raises Exceeded."""
        kind = type(value)
        if kind is str:
            if (length := len(value)) >= PER_STEP:
                self.text(length)
        elif kind is int:
            if not -_NUMBER_LIMIT < value < _NUMBER_LIMIT:
                raise Exceeded("it computes a number of more than 38 digits")
        elif isinstance(value, _NESTED):
            self._nested(value)
        elif isinstance(value, str):
            self.text(len(value))
        elif isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self.each(value)
        return value

    def each(self, values: Iterable[Any]) -> Iterator[Any]:
        """The values, each paid for as it comes. Raises Exceeded."""
        for value in values:
            self.spend(1)
            yield self.value(value)

    def _nested(self, value: Any) -> None:
        waiting = [value]
        while waiting:
            item = waiting.pop()
            self.spend(1)
            if isinstance(item, str):
                self.spend(len(item) // PER_STEP)
            elif isinstance(item, dict):
                waiting += item.keys()
                waiting += item.values()
            elif isinstance(item, Namespace):
                waiting += object.__getattribute__(item, "_Namespace__attrs").values()
            elif isinstance(item, Iterable) and isinstance(item, _NESTED):
                waiting += item

    def _look(self) -> None:
        if self.left < 0:
            raise Exceeded(
                f"it takes more than {STEP_LIMIT:,} steps (loops, calls, filters, and {PER_STEP} characters of a text)"
            )
        if time.thread_time() > self._until:
            raise Exceeded(f"it takes more than {SECONDS:g} seconds of CPU time")
        self._look_at = self.left - _CHECK


_current: contextvars.ContextVar[Budget] = contextvars.ContextVar("budget")


def begin() -> None:
    """Gives a rendering of this thread its budget."""
    _current.set(Budget())


budget = _current.get
"""The budget of the rendering that runs in this thread."""
