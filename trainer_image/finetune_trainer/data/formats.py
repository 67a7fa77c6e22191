"""PURE: a row -> the sequence that is learned. Messages, PromptCompletion, Instruction, Text; Auto finds out which."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from finetune_api.dataset import Columns
from finetune_api.formats import SEQUENCES

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
USUAL: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "question", "query"),
    "completion": ("completion", "answer", "response"),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "system": ("system",),
    "text": ("text",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "label": ("label", "labels", "category", "class"),
}
"""Columns by the names that data sets usually give them."""
NEEDED = {
    "Messages": ("messages",),
    "PromptCompletion": ("prompt", "completion"),
    "Instruction": ("instruction", "output"),
    "Text": ("text",),
    "Preference": ("chosen", "rejected"),
    "Labelled": ("text", "label"),
    "PromptOnly": ("prompt",),
}
UNPAIRED = ("completion", "label")
"""What Preference needs in its other layout, which KTO alone learns from."""
# Reserved by the chat templates' rendering (see templates); noncharacters never stand in text that is interchanged.
RESERVED = "\ufdd0\ufdd1"
MARK = "\ufdd2"
"""Stands inside of special tokens that a row holds (see guard)."""


_HALVES = re.compile(rb"\\u[dD][89a-fA-F]")


class BadRow(Exception):
    """A row that cannot become an example; the text says what was found and what is allowed."""


class Ambiguous(Exception):
    """The columns do not tell the format; the text says what would."""


class Chat(NamedTuple):
    messages: tuple[Mapping[str, Any], ...]
    tools: Sequence[Any] | None = None


class Pair(NamedTuple):
    prompt: str
    completion: str


class Plain(NamedTuple):
    text: str


Example = Chat | Pair | Plain
Render = Callable[[Mapping[str, Any]], str]


def column_of(role: str, columns: Columns | None, present: Iterable[str]) -> str | None:
    """The column that plays a role: the one that the spec names, else the first usual name that is there."""
    named: str | None = getattr(columns, role, None)
    if named is not None:
        return named
    names = set(present)
    return next((name for name in USUAL[role] if name in names), None)


def detect(
    rows: Sequence[Mapping[str, Any]],
    columns: Columns | None,
    formats: Sequence[str] = SEQUENCES,
    unpaired: bool = False,
) -> str:
    """The one of `formats` that the columns of most `rows` fit. `unpaired`: see UNPAIRED. Raises Ambiguous."""
    if columns is not None:
        mapped = [name for name in formats if any(getattr(columns, role) is not None for role in NEEDED[name])]
        if len(mapped) == 1:
            return mapped[0]
    # Most and not all: a row that lacks a column is to be named, and is no reason to know nothing.
    fits = [name for name in formats if 2 * sum(_fits(row, name, columns, unpaired) for row in rows) > len(rows)]
    if len(fits) == 1:
        return fits[0]
    found = ", ".join(sorted({str(name) for row in rows for name in row})[:20]) or "none"
    if not fits:
        needs = "; ".join(f"{name} needs {' and '.join(NEEDED[name])}" for name in formats)
        needs += f", or {' and '.join(UNPAIRED)}" if unpaired else ""
        raise Ambiguous(f"found the columns {found}, which fit no format ({needs}); set format, or columns")
    raise Ambiguous(f"found the columns {found}, which fit {' and '.join(fits)}; set format to one of them")


def _fits(row: Mapping[str, Any], form: str, columns: Columns | None, unpaired: bool) -> bool:
    layouts = [NEEDED[form]]
    if form == "Preference" and unpaired:
        layouts.append(UNPAIRED)
    if form == "PromptOnly":
        layouts.append(NEEDED["Messages"])
    return any(all(column_of(role, columns, row) in row for role in roles) for roles in layouts)


def to_example(
    row: Mapping[str, Any], form: str, columns: Columns | None, render: Render | None, chat: bool
) -> Example:
    """One row as an example. `render`: the data set's own template; `chat`: the model has one. Raises BadRow."""
    if form == "Messages":
        return conversation(row, columns)
    if form == "Text":
        text = render(row) if render else text_of(row, "text", columns)
        return Plain(nonempty(text, "text"))
    asks, answers = ("prompt", "completion") if form == "PromptCompletion" else ("instruction", "output")
    if form == "PromptCompletion" and isinstance(value_of(row, "prompt", columns), list):
        return _chat([*turns_of(row, "prompt", columns), *turns_of(row, "completion", columns)], row)
    completion = nonempty(text_of(row, answers, columns), column_of(answers, columns, row) or answers)
    if render:
        return Pair(render(row), completion)
    question = text_of(row, asks, columns)
    if form == "Instruction":
        question = nonempty(question, column_of(asks, columns, row) or asks)
        if extra := optional_of(row, "input", columns):
            question = f"{question}\n\n{extra}"
    system = optional_of(row, "system", columns)
    if form == "PromptCompletion" and not chat:
        return Pair(f"{system}\n\n{question}" if system else question, completion)
    turns = [{"role": "system", "content": system}] if system else []
    return Chat((*turns, {"role": "user", "content": question}, {"role": "assistant", "content": completion}))


def conversation(row: Mapping[str, Any], columns: Columns | None, answered: bool = True) -> Chat:
    turns = turns_of(row, "messages", columns)
    if (system := optional_of(row, "system", columns)) and (not turns or turns[0]["role"] != "system"):
        turns = [{"role": "system", "content": system}, *turns]
    return _chat(turns, row) if answered else Chat(tuple(turns), tools_of(row))


def _chat(turns: list[dict[str, Any]], row: Mapping[str, Any]) -> Chat:
    said = [turn for turn in turns if turn["role"] == "assistant"]
    if not said:
        raise BadRow("found no turn of the assistant; there is nothing to learn")
    if not any(turn["content"].strip() or turn.get("tool_calls") for turn in said):
        raise BadRow("every turn of the assistant is empty; there is nothing to learn")
    return Chat(in_order(turns), tools_of(row))


# What may come before a turn of each role; None: nothing.
_BEFORE: dict[str, tuple[str | None, ...]] = {
    "system": (None, "system"),
    "user": (None, "system", "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def in_order(turns: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The turns of a conversation. Raises BadRow where they cannot follow each other."""
    before: str | None = None
    for number, turn in enumerate(turns, 1):
        if before not in _BEFORE[turn["role"]]:
            place = f"follows {before}" if before else "comes first"
            raise BadRow(
                f"roles are out of order: turn {number}, {turn['role']}, {place}; system comes first, user and "
                "assistant take turns, tool follows assistant"
            )
        before = turn["role"]
    return tuple(turns)


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools:
        tools = _parsed(tools, "tools")
    if tools is not None and tools != "" and not isinstance(tools, list):
        raise BadRow("`tools` must be a list")
    return tools or None


def turns_of(row: Mapping[str, Any], role: str, columns: Columns | None) -> list[dict[str, Any]]:
    name = column_of(role, columns, row) or role
    value = value_of(row, role, columns)
    if isinstance(value, str):
        value = _parsed(value, name)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRow(f"`{name}` must be a list of messages with at least one")
    return [_turn(turn, f"{name}[{index}]") for index, turn in enumerate(value)]


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRow(f"`{where}` must be an object with role and content")
    # Parquet gives every member of a struct, absent ones as null.
    turn = {key: value for key, value in turn.items() if value is not None}
    if "role" not in turn and "from" in turn:
        turn = {"role": SHAREGPT.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}
    role = turn.get("role")
    if role not in ROLES:
        raise BadRow(f"`{where}.role` must be one of {', '.join(ROLES)}; found {role!r}")
    content = turn.get("content")
    if isinstance(content, list):
        content = _parts(content, where)
    if content is None and role == "assistant" and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"`{where}.content` must be text; found {type(content).__name__}")
    return {**turn, "content": content}


def _parts(parts: list[Any], where: str) -> str:
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise BadRow(f"`{where}.content` must be text; parts of other types than text are not supported")
    return "".join(part["text"] for part in parts)


def value_of(row: Mapping[str, Any], role: str, columns: Columns | None) -> Any:
    name = column_of(role, columns, row)
    if name is None or name not in row:
        wanted = repr(name) if name else " or ".join(map(repr, USUAL[role]))
        raise BadRow(f"the column {wanted} is missing; found {', '.join(sorted(map(str, row))[:20]) or 'none'}")
    return row[name]


def text_of(row: Mapping[str, Any], role: str, columns: Columns | None) -> str:
    value = value_of(row, role, columns)
    if not isinstance(value, str):
        raise BadRow(f"`{column_of(role, columns, row)}` must be text; found {type(value).__name__}")
    return value


def optional_of(row: Mapping[str, Any], role: str, columns: Columns | None) -> str:
    """The text of a column that need not be there, unless the spec names it."""
    name = column_of(role, columns, row)
    named = getattr(columns, role, None) is not None
    if name is None or (row.get(name) is None and (name in row or not named)):
        return ""
    return text_of(row, role, columns).strip()


def nonempty(text: str, name: str) -> str:
    if not text.strip():
        raise BadRow(f"{name if '`' in name else f'`{name}`'} is empty")
    return text


def half_characters(data: bytes) -> bool:
    """Whether JSON has escapes that may be half of a surrogate pair."""
    return _HALVES.search(data) is not None


def is_text(text: str) -> bool:
    """Whether it is made of characters alone: JSON can say half of a surrogate pair, which is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"`{name}` is text that is not JSON") from error


def content_hash(example: Example) -> bytes:
    """16 bytes that are equal for examples of equal content: NFC, white space folded. Raises BadRow for broken text."""
    if isinstance(example, Chat):
        parts = [[turn["role"], _fold(turn["content"]), turn.get("tool_calls")] for turn in example.messages]
    else:
        parts = [[_fold(text) for text in example]]
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("the text has half of a surrogate pair, which is no character") from error
    if any(mark in text for mark in RESERVED):
        raise BadRow("the text has one of the noncharacters U+FDD0 and U+FDD1")
    return hashlib.blake2b(data, digest_size=16).digest()


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text.replace(MARK, "")).split())
