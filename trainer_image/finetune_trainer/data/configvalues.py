"""PURE: what the values in a model's JSON files may be, by the names that families give them.

Which keys there may be is `finetune_api.configkeys`' concern. transformers believes most of what it finds: a width that
is negative or a text fails only when the model is made, on a GPU, in words that name no file.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from finetune_api.failures import FineTuneError
from finetune_api.modelfiles import FIELDS, invalid

NUMBER, COUNT = 2**53, 2**31 - 1
"""The greatest whole number of any kind, and of things that are counted."""
DEPTH = 64
_COUNTS = re.compile(
    r"^(n|num)_\w+$|^(?!mscale)\w+_(size|dim|heads|layers|rank|positions|embeddings|window|len|length|experts|groups?|tokens?_ids?)$"
    r"|^(d_model|vocab_size|max_length|sliding_window)$"
)
_REALS = re.compile(r"_(eps|epsilon|theta|range|dropout|pdrop|prob|std|coef|coeff|multiplier|softcap|softcapping)$")
_FLAGS = re.compile(r"^(tie|is|return|do|use)_(?!\w+_(type|mode|size|attention)$)\w+$")
_NAMES = re.compile(r"^(hidden_act|hidden_activation|activation_function|model_type)$")
_SIZES = {"head_dim", "intermediate_size", "n_inner", "ffn_dim", *(name for names in FIELDS.values() for name in names)}
_ENDLESS = {"time_step_limit"}
"""What may have no end."""
_DIVIDED = {"llama", "mistral", "qwen2", "gpt2", "gpt_neox", "opt", "phi"}
"""Families whose heads share the model's width."""


def check_numbers(value: Any, uri: str) -> None:
    """Numbers anywhere in a file must be finite, and whole ones exact as fractions. Raises ModelInvalid."""
    for path, _, found in _walk(value, uri):
        if isinstance(found, float) and not math.isfinite(found) and path not in _ENDLESS:
            raise _wrong(uri, path, found, "a finite number")
        if isinstance(found, int) and abs(found) > NUMBER:
            raise _wrong(uri, path, found, f"a finite number of at most {NUMBER:,}")


def check_values(config: Mapping[str, Any], uri: str) -> None:
    """config.json. Raises ModelInvalid with the key, what was found and what is allowed."""
    check_numbers(config, uri)
    for path, key, found in _walk(config, uri):
        if found is None:
            continue
        if key in _SIZES and not all(_is_count(size, 1) for size in (found if isinstance(found, list) else [found])):
            raise _wrong(uri, path, found, f"a whole number from 1 to {COUNT:,}")
        if _FLAGS.search(key):
            if isinstance(found, str | float | list | dict):
                raise _wrong(uri, path, found, "true or false")
        elif _COUNTS.search(key) and not _each_is_count(found):
            raise _wrong(uri, path, found, f"a whole number from -1 to {COUNT:,}")
        if _REALS.search(key) and isinstance(found, str):
            raise _wrong(uri, path, found, "a number")
        if _NAMES.search(key) and not isinstance(found, str | dict):
            raise _wrong(uri, path, found, "a text")
    _check_heads(config, uri)


def _check_heads(config: Mapping[str, Any], uri: str) -> None:
    heads, width = _first(config, "heads"), _first(config, "hidden_size")
    shared, pad = _first(config, "key_value_heads"), config.get("pad_token_id")
    if heads and shared and heads % shared:
        raise invalid(
            f"{uri}: `num_key_value_heads` is {shared}; it must divide `num_attention_heads`, which is {heads}"
        )
    if heads and width and width % heads and not config.get("head_dim") and config.get("model_type") in _DIVIDED:
        raise invalid(f"{uri}: `num_attention_heads` is {heads}; it must divide the model's width, which is {width}")
    vocabulary = _first(config, "vocab_size")
    if vocabulary and isinstance(pad, int) and not -vocabulary <= pad < vocabulary:
        raise _wrong(uri, "pad_token_id", pad, f"a token below vocab_size, which is {vocabulary:,}")


def _first(config: Mapping[str, Any], field: str) -> int:
    """0 where there is none, or one for each layer."""
    return next((config[name] for name in FIELDS[field] if type(config.get(name)) is int), 0)


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= COUNT


def _each_is_count(value: Any) -> bool:
    """Families name flags, kinds of layers and objects alike, so that these pass; texts and fractions do not."""
    if isinstance(value, list):
        return all(item is None or isinstance(item, str) or _each_is_count(item) for item in value)
    return isinstance(value, dict | bool) or _is_count(value, -1)


def _walk(value: Any, uri: str) -> Iterator[tuple[str, str, Any]]:
    """Every value at any depth, with the way to it and its own key. Raises ModelInvalid where they lie too deep."""
    waiting = [("", "", value, 0)]
    while waiting:
        path, key, found, depth = waiting.pop()
        yield path, key, found
        if depth > DEPTH:
            raise invalid(f"{uri}: lists and objects lie in more than {DEPTH} others")
        if isinstance(found, Mapping):
            waiting += [
                (f"{path}.{name}" if path else str(name), str(name), part, depth + 1) for name, part in found.items()
            ]
        elif isinstance(found, list):
            waiting += [(path, "", part, depth + 1) for part in found]


def _wrong(uri: str, path: str, found: Any, allowed: str) -> FineTuneError:
    said = f"{found!r:.60}"
    return invalid(f"{uri}: `{path[:200]}` must be {allowed}; found {said}")
