"""Examples -> token ids and labels. Label -100 = this token carries no loss.

The whole text is encoded at once and its loss follows from the characters that a token covers, so that tokenisers that
treat the start of a text differently (SentencePiece's leading space) see what they will see at inference.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

from tokenizers import Tokenizer

from finetune_trainer.data.formats import BadRow, Chat, Example, Pair
from finetune_trainer.data.templates import ChatTemplate

IGNORED = -100
Loss = Literal["Completion", "Assistant", "All"]


class Text(NamedTuple):
    text: str
    spans: list[tuple[int, int]]
    """What carries loss, as [start, end) of characters."""
    special: bool
    """The tokeniser adds its own special tokens (BOS): a chat template writes them itself."""
    cuts: tuple[int, ...] = ()
    """Where the text is cut before it is encoded, so that what looks like a special token is not taken for one."""


class Tokens(NamedTuple):
    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """Tokens that carry loss. The first one never does: nothing predicts it."""
        learned = len(self.labels) - self.labels.count(IGNORED)
        return learned - 1 if self.labels and self.labels[0] != IGNORED else learned


def lay_out(example: Example, loss: Loss, chat: ChatTemplate) -> Text:
    """The text of an example and what of it carries loss. Raises BadRow."""
    if isinstance(example, Chat):
        return _lay_out_chat(example, loss, chat)
    if isinstance(example, Pair):
        text = example.prompt + example.completion
        start = 0 if loss == "All" else len(example.prompt)
        return Text(text, [(start, len(text))], True)
    return Text(example.text, [(0, len(example.text))], True)


def lay_out_prompt(example: Example, chat: ChatTemplate) -> Text:
    """A text that is to be answered or to be classified: nothing of it is learned."""
    if isinstance(example, Chat):
        return Text(chat.render(example.messages, example.tools, ask=True).text, [], False)
    return Text("".join(example), [], True)


def _lay_out_chat(example: Chat, loss: Loss, chat: ChatTemplate) -> Text:
    turns = [index for index, message in enumerate(example.messages) if message["role"] == "assistant"]
    # What follows the last answer is never learned with Completion, and is no context of it either.
    messages = example.messages[: turns[-1] + 1] if loss == "Completion" else example.messages
    rendered = chat.render(messages, example.tools)
    if loss == "All":
        return Text(rendered.text, [(0, len(rendered.text))], False)
    wanted = turns[-1:] if loss == "Completion" else turns
    spans = rendered.spans
    if spans is None:
        spans = [_turn_span(example, messages, index, rendered.text, chat) for index in wanted]
    elif not spans:
        raise BadRow("the chat template's generation block was not reached: it marks no assistant turn")
    return Text(rendered.text, spans[-len(wanted) :], False)


def _turn_span(
    example: Chat, messages: Sequence[object], index: int, whole: str, chat: ChatTemplate
) -> tuple[int, int]:
    """Where turn `index` stands in the rendered conversation, by rendering up to it with and without it."""
    before = chat.render(example.messages[:index], example.tools, ask=True).text
    after = whole if index + 1 == len(messages) else chat.render(example.messages[: index + 1], example.tools).text
    if not whole.startswith(before):
        # Templates that open the answer differently from how they ask for it (an empty thought, say).
        before = chat.render(example.messages[:index], example.tools).text
    if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
        raise BadRow(
            "the chat template rewrites earlier turns, so it cannot be told what the assistant says; a template with "
            "{% generation %} markers can, and so can loss: All"
        )
    return len(before), len(after)


class Encoder:
    """Encodes texts with the model's tokeniser."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int, bos_id: int | None) -> None:
        self._tokenizer, self._eos, self._bos = tokenizer, eos_id, bos_id
        # A tokenizer.json may carry the padding and truncation of its last use.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        added = tokenizer.get_added_tokens_decoder()
        self._ends = {eos_id} | {number for number, token in added.items() if token.special}

    def encode(self, texts: Sequence[Text]) -> list[Tokens]:
        """In order; runs on all cores."""
        found = [self._cut(text) if text.cuts else None for text in texts]
        for special in (False, True):
            chosen = [index for index, text in enumerate(texts) if text.special == special and not text.cuts]
            encodings = self._tokenizer.encode_batch([texts[i].text for i in chosen], add_special_tokens=special)
            for index, encoding in zip(chosen, encodings, strict=True):
                found[index] = self._tokens(list(encoding.ids), encoding.offsets, texts[index])
        return [tokens for tokens in found if tokens is not None]

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    @property
    def special_tokens(self) -> list[str]:
        """In text."""
        return [str(self._tokenizer.id_to_token(number)) for number in sorted(self._ends)]

    @property
    def eos(self) -> str:
        return str(self._tokenizer.id_to_token(self._eos))

    def _cut(self, text: Text) -> Tokens:
        """A text in pieces, which together are encoded as if none of the cuts lay in a word."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, stop in itertools.pairwise((0, *text.cuts, len(text.text))):
            piece = self._tokenizer.encode(text.text[start:stop], add_special_tokens=text.special and start == 0)
            added = start == 0 and piece.ids and piece.ids[-1] == self._eos and piece.special_tokens_mask[-1]
            count = len(piece.ids) - bool(added)
            ids += piece.ids[:count]
            offsets += [(start + first, start + last) for first, last in piece.offsets[:count]]
        return self._tokens(ids, offsets, text)

    def _tokens(self, ids: list[int], offsets: Sequence[tuple[int, int]], text: Text) -> Tokens:
        labels = _labels(ids, offsets, text.spans)
        if len(ids) > 1 and ids[0] == ids[1] == self._bos:
            # The text began with what the tokeniser adds.
            del ids[0], labels[0]
        self._close(ids, labels, text)
        return Tokens(ids, labels)

    def _close(self, ids: list[int], labels: list[int], text: Text) -> None:
        """An answer that ends the text ends with EOS, or with the end-of-turn token of the template."""
        if not text.spans and text.special and ids and ids[-1] == self._eos:
            # The tokeniser ends every text, also one that is to be continued.
            del ids[-1], labels[-1]
        if not text.spans or text.spans[-1][1] < len(text.text.rstrip()):
            return
        last = len(ids) - 1
        if not text.special:
            # A template may write a line end after its end-of-turn token.
            while last >= 0 and last >= len(ids) - 3 and ids[last] not in self._ends:
                last -= 1
            if last >= 0 and ids[last] in self._ends:
                return
        elif ids and ids[-1] == self._eos:
            labels[-1] = self._eos
            return
        ids.append(self._eos)
        labels.append(self._eos)


def _labels(ids: list[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """A token is learned where its characters have a part in a span; one without characters, where it stands in one."""
    labels = [IGNORED] * len(ids)
    for first, stop in spans:
        labels = [
            token if start < stop and (end > first or first <= start == end) else label
            for token, (start, end), label in zip(ids, offsets, labels, strict=True)
        ]
    return labels
