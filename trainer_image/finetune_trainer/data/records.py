"""PURE: a row of any format -> what the method learns from it: sequences, and what is known of them.

Preference comes in the layouts that the hubs use: a prompt with two answers, as text or as messages; two whole
conversations or texts that begin alike; and, for KTO, one answer with a verdict.
"""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from finetune_api.dataset import Columns
from finetune_api.formats import Kind
from finetune_trainer.data.formats import (
    BadRow,
    Chat,
    Example,
    Pair,
    Plain,
    Render,
    column_of,
    content_hash,
    conversation,
    in_order,
    nonempty,
    optional_of,
    text_of,
    to_example,
    tools_of,
    turns_of,
    value_of,
)

REFERENCES = ("reference", "answer", "completion", "solution", "ground_truth")
"""Columns that usually hold the answer that a prompt should get."""
VERDICTS = {"true": True, "false": False, "1": True, "0": False}
LABEL_LIMIT = 128
SLICE_LIMIT = 64
_NOT_IN_NAMES = re.compile(r"[\s./@\x00-\x1f\x7f]+")
Row = Mapping[str, Any]


class Record(NamedTuple):
    example: Example
    """What is learned: the sequence, the chosen answer, the text with a class, or the prompt."""
    rejected: Example | None = None
    desirable: bool | None = None
    label: str | None = None
    reference: str | None = None


def to_records(
    row: Row, form: str, kind: Kind, columns: Columns | None, render: Render | None, chat: bool
) -> list[Record]:
    """One row as one record; as two where both of its answers are learned by themselves. Raises BadRow."""
    if form == "Preference":
        # A row that has neither layout is told what the usual one lacks.
        if kind == "Unpaired" and column_of("chosen", columns, row) not in row and column_of("label", columns, row):
            return [_judged(row, columns, render, chat)]
        chosen, rejected = _preferred(row, columns, render, chat)
        if content_hash(chosen) == content_hash(rejected):
            raise BadRow("the chosen and the rejected answer are equal")
        if kind == "Unpaired":
            return [Record(chosen, desirable=True), Record(rejected, desirable=False)]
        return [Record(chosen, rejected)]
    if form == "Labelled":
        text = render(row) if render else text_of(row, "text", columns)
        return [Record(Plain(nonempty(text, "text")), label=_label(row, columns))]
    if form == "PromptOnly":
        return [Record(_prompt(row, columns, render, chat), reference=_reference(row, columns))]
    return [Record(to_example(row, form, columns, render, chat))]


def slice_of(row: Row, columns: Columns | None) -> str | None:
    """The part of the data that a row belongs to, as it stands in a figure's name. Raises BadRow."""
    name = columns.slice if columns else None
    if name is None:
        return None
    value = value_of(row, "slice", columns)
    if value is None:
        return None
    if not isinstance(value, str | bool | int | float):
        raise BadRow(f"`{name}` must be text, a number or a truth value; found {type(value).__name__}")
    return _NOT_IN_NAMES.sub("_", str(value).strip())[:SLICE_LIMIT] or None


class Digests(NamedTuple):
    """16 bytes each. Verdicts and classes have no part in them: the same text is never in two splits."""

    whole: bytes
    """By the content of a row."""
    learned: bytes
    """By what it teaches to answer, of a pair the chosen answer: it decides the split.

    So that what is held out where answers are taught is held out where they are preferred, too.
    """


def digests_of(records: Sequence[Record]) -> Digests:
    hashes = [content_hash(e) for record in records for e in (record.example, record.rejected) if e is not None]
    whole = hashes[0] if len(hashes) == 1 else hashlib.blake2b(b"".join(hashes), digest_size=16).digest()
    return Digests(whole, hashes[0])


def compared_by(records: Sequence[Record], row: Row, rendered: Collection[str] | None) -> tuple[str, str]:
    """What a row is asked and what it answers, without what many rows have in common: system prompts, templates.

    `rendered`: the columns that the data set's own template names, where there is one.
    """
    asked: list[str] = []
    said: list[str] = []
    for example in (e for record in records for e in (record.example, record.rejected) if e is not None):
        if isinstance(example, Chat):
            turns = [turn for turn in example.messages if turn["role"] != "system"]
            answers = turns[-1:] if turns[-1]["role"] == "assistant" else []
            prompt = " ".join(turn["content"] for turn in turns[: len(turns) - len(answers)])
            said += [turn["content"] for turn in answers]
        elif isinstance(example, Pair):
            prompt = example.prompt
            said.append(example.completion)
        else:
            prompt = example.text
        if not asked:
            asked = [str(row[name]) for name in sorted(rendered) if name in row] if rendered else [prompt]
    return " ".join(asked), " ".join(said)


def _judged(row: Row, columns: Columns | None, render: Render | None, chat: bool) -> Record:
    whole = column_of("prompt", columns, row) not in row and column_of("messages", columns, row) in row
    example = to_example(row, "Messages" if whole else "PromptCompletion", columns, render, chat)
    value, name = value_of(row, "label", columns), column_of("label", columns, row)
    verdict = VERDICTS.get(str(value).lower()) if isinstance(value, bool | int | str) else None
    if verdict is None:
        raise BadRow(f"`{name}` must be true (a good answer) or false; found {value!r:.60}")
    return Record(example, desirable=verdict)


def _preferred(row: Row, columns: Columns | None, render: Render | None, chat: bool) -> tuple[Example, Example]:
    """The prompt with the better answer, and with the worse one."""
    if any(isinstance(value_of(row, role, columns), list | dict) for role in ("chosen", "rejected")):
        if render:
            raise BadRow("messages are rendered by the model's chat template; remove the template")
        return _conversations(row, columns)
    good, bad = (text_of(row, role, columns) for role in ("chosen", "rejected"))
    if render or column_of("prompt", columns, row) in row:
        answers = (good, bad)
        both = [
            to_example({**row, "\0": answer}, "PromptCompletion", _answering(columns), render, chat)
            for answer in answers
        ]
        return both[0], both[1]
    # Two whole texts: what they begin with, up to the last white space, is the prompt.
    alike = next((i for i, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), min(len(good), len(bad)))
    spaces = list(re.finditer(r"\s+", good[:alike]))
    prompt = nonempty(good[: spaces[-1].start()] if spaces else "", "what `chosen` and `rejected` begin with")
    return Pair(prompt, nonempty(good[len(prompt) :], "chosen")), Pair(prompt, nonempty(bad[len(prompt) :], "rejected"))


def _answering(columns: Columns | None) -> Columns:
    return (columns or Columns()).model_copy(update={"completion": "\0"})


def _conversations(row: Row, columns: Columns | None) -> tuple[Chat, Chat]:
    chosen, rejected = (turns_of(row, role, columns) for role in ("chosen", "rejected"))
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        asked = _asked(row, columns)
        chosen, rejected = [*asked, *chosen], [*asked, *rejected]
    elif (system := optional_of(row, "system", columns)) and chosen[0]["role"] != "system":
        opening = {"role": "system", "content": system}
        chosen, rejected = [opening, *chosen], [opening, *rejected]
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        raise BadRow("`chosen` and `rejected` must be the same conversation but for its last turn")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1]["role"] != "assistant":
            raise BadRow(f"`{name}` must end with a turn of the assistant; found {turns[-1]['role']}")
    tools = tools_of(row)
    return Chat(in_order(chosen), tools), Chat(in_order(rejected), tools)


def _asked(row: Row, columns: Columns | None) -> list[dict[str, Any]]:
    """The turns that come before an answer: `prompt`, as text or messages, or a conversation."""
    if column_of("prompt", columns, row) not in row and column_of("messages", columns, row) in row:
        turns = turns_of(row, "messages", columns)
    elif isinstance(value_of(row, "prompt", columns), list):
        turns = turns_of(row, "prompt", columns)
    else:
        name = column_of("prompt", columns, row) or "prompt"
        turns = [{"role": "user", "content": nonempty(text_of(row, "prompt", columns), name)}]
    if (system := optional_of(row, "system", columns)) and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return turns


def _prompt(row: Row, columns: Columns | None, render: Render | None, chat: bool) -> Example:
    if render:
        return Plain(nonempty(render(row), "prompt"))
    name = column_of("prompt", columns, row)
    if not chat and name is not None and isinstance(row.get(name), str):
        text, system = nonempty(row[name], name), optional_of(row, "system", columns)
        return Plain(f"{system}\n\n{text}" if system else text)
    if name not in row and column_of("messages", columns, row) in row:
        whole = conversation(row, columns, answered=False)
        # What the assistant says last is an answer, not a part of the prompt.
        last = whole.messages[-1]["role"] == "assistant"
        turns, tools = [dict(turn) for turn in whole.messages[: len(whole.messages) - last]], whole.tools
    else:
        turns, tools = _asked(row, columns), tools_of(row)
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise BadRow("the prompt must end with a turn of the user, for the assistant to answer")
    return Chat(in_order(turns), tools)


def _reference(row: Row, columns: Columns | None) -> str | None:
    named = columns.completion if columns else None
    name = named or next((name for name in REFERENCES if name in row), None)
    if named and named not in row:
        raise BadRow(f"the column {named!r} is missing; found {', '.join(sorted(map(str, row))[:20]) or 'none'}")
    value = row[name] if name else None
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise BadRow(f"`{name}` must be text; found {type(value).__name__}")


def _label(row: Row, columns: Columns | None) -> str:
    value, name = value_of(row, "label", columns), column_of("label", columns, row)
    if not isinstance(value, bool | int | str):
        raise BadRow(f"`{name}` must be the name or the number of a class; found {type(value).__name__}")
    text = str(value).strip()
    if not 0 < len(text) <= LABEL_LIMIT:
        raise BadRow(f"`{name}` must have 1 to {LABEL_LIMIT} characters; found {len(text)}")
    return text
