"""The base model as `prepare` sees it: its small files and the headers of its weights, never the weights themselves."""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from finetune_api.configkeys import check_beside
from finetune_api.failures import FineTuneError, Reason
from finetune_api.job import FineTuneJobSpec
from finetune_api.modelfiles import (
    Tensor,
    invalid,
    linear_modules,
    model_shape,
    number,
    parse_config,
    parse_header,
    targets,
)
from finetune_api.run import PinnedObject
from finetune_api.sizing import ModelShape
from finetune_api.tuning import Tuning
from finetune_trainer import log
from finetune_trainer.confined import during
from finetune_trainer.data.configvalues import check_numbers, check_values
from finetune_trainer.data.formats import BadRow, half_characters, is_text
from finetune_trainer.data.readers import POINTER
from finetune_trainer.data.templates import DEFAULT_CHAT_TEMPLATE, BadTemplate, ChatTemplate, Costly
from finetune_trainer.data.tokenise import Encoder
from finetune_trainer.storage import Store

SMALL = 64 * 2**20
HEADER = 32 * 2**20
"""Bytes of a safetensors header: those of some hundred thousand tensors."""
FILES = 10_000
"""Objects below a model's prefix."""
SAMPLES = (
    "".join(map(chr, range(32, 127))),
    "The quick brown fox\njumps over\t13 lazy dogs. ünï 漢字 😀\r\n",
    "a" * 60 + "!",
    " " * 60 + "x",
    "0" * 60 + ".",
    "\n" * 60,
)
"""Short texts that every tokenizer must read; those that repeat a letter show patterns that look back without end."""
MOST_TOKENS = 4096
"""Tokens of a sample: byte by byte it has some hundreds."""
CONVERSATION = ({"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model."})
# What training and publishing need; all else below the prefix (other formats' weights, pictures) stays where it is.
MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class BaseModel(NamedTuple):
    files: list[PinnedObject]
    sha256: str
    shape: ModelShape
    encoder: Encoder
    chat: ChatTemplate
    has_chat_template: bool
    linears: Mapping[str, Tensor]
    """Shapes of the linear layers but the head, by module."""


def for_tuning(model: BaseModel, tuning: Tuning) -> BaseModel:
    """The same model as a stage sees it. Raises InvalidSpec where a target does not exist."""
    shape = model.shape.model_copy(update=targets(model.linears, tuning, model.shape.architecture))
    return model._replace(shape=shape)


def digest(pins: list[PinnedObject], prefix: str) -> str:
    """SHA-256 over the sorted (key, ETag) of pinned objects."""
    entries = sorted([pin.uri.removeprefix(prefix), pin.etag, pin.version_id, pin.size] for pin in pins)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def inspect(store: Store, spec: FineTuneJobSpec, field: str = "spec.baseModel.uri") -> BaseModel:
    """Raises ModelInvalid with the file named; StorageDenied and StorageUnavailable with `field` in front."""
    prefix = spec.base_model.uri.rstrip("/") + "/"
    if not prefix.startswith("s3://"):
        raise FineTuneError(Reason.INVALID_SPEC, f"{field}: found {prefix}; s3:// is supported")
    with during(Reason.MODEL_INVALID, field, seconds=120.0), naming(field):
        listed = list_files(store, prefix)
        weights = weight_files(store, listed, prefix)
        wanted = sorted(name for name in listed if name in MODEL_FILES or name in weights)
        files = dict(zip(wanted, store.pin_all([listed[name].uri for name in wanted]), strict=True))
        return _inspect(store, spec, files, weights, prefix)


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
    """Puts the field in front of what is wrong with a model's files, and calls it that."""
    try:
        yield
    except FineTuneError as error:
        if error.reason == Reason.INVALID_SPEC:
            raise
        reason = Reason.MODEL_INVALID if error.reason == Reason.DATA_INVALID else error.reason
        raise FineTuneError(reason, f"{field}: {error}") from error


def list_files(store: Store, prefix: str) -> dict[str, PinnedObject]:
    """What lies below a model's prefix, by name. Raises ModelInvalid where that is no model's folder."""
    found = {item.uri.removeprefix(prefix): item for item in itertools.islice(store.list(prefix), FILES + 1)}
    if len(found) > FILES:
        raise invalid(f"{prefix} has more than {FILES:,} objects; a model's folder has its own files alone")
    return found


def weight_files(store: Store, listed: Mapping[str, PinnedObject], prefix: str) -> list[str]:
    """The names of the files that hold weights. Raises ModelInvalid where there are none, or not all."""
    if not listed:
        raise invalid(f"there is nothing below {prefix}")
    if "config.json" not in listed:
        raise invalid(f"{prefix} has no config.json; found {', '.join(sorted(listed)[:10])}")
    if "model.safetensors.index.json" in listed:
        uri = f"{prefix}model.safetensors.index.json"
        try:
            names = sorted(set(json.loads(store.get_bytes(uri, SMALL))["weight_map"].values()), key=str)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise invalid(f"{uri} is not an index of safetensors files") from error
        for name in names:
            if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors"):
                raise invalid(f"{uri} names {name!r:.200}; a shard is a .safetensors file beside it")
        missing = [name for name in names if name not in listed]
        if missing:
            raise invalid(f"{uri} names {missing[0]}, which does not exist")
        return ["model.safetensors.index.json", *names]
    if "model.safetensors" in listed:
        return ["model.safetensors"]
    pickles = sorted(name for name in listed if name.endswith(_PICKLES))
    if pickles:
        raise invalid(f"{prefix} has its weights in {pickles[0]}: safetensors only; pickled weights can run code")
    raise invalid(f"{prefix} has no model.safetensors and no model.safetensors.index.json")


def _inspect(
    store: Store, spec: FineTuneJobSpec, files: Mapping[str, PinnedObject], weights: list[str], prefix: str
) -> BaseModel:
    config_uri = f"{prefix}config.json"
    config = parse_config(store.get_bytes(files["config.json"], SMALL), config_uri)
    check_values(config, config_uri)
    if "tokenizer.json" not in files:
        raise invalid(f"{prefix} has no tokenizer.json; save the model with a fast tokenizer (save_pretrained)")
    tokenizer_uri = f"{prefix}tokenizer.json"
    tokenizer = load_tokenizer(store, files["tokenizer.json"])
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= number(config, "vocab_size", config_uri):
        raise invalid(
            f"{tokenizer_uri} has token {largest}; config.json's vocab_size is {config['vocab_size']}: they do not "
            "belong together"
        )
    tensors: dict[str, Tensor] = {}
    for name in weights:
        if name.endswith(".safetensors"):
            tensors |= header_of(store, files[name])
    _check_embedding(tensors, config, prefix)
    _check_layers(tensors, config, prefix)
    with during(Reason.MODEL_INVALID, f"{config_uri} and the weights' headers do not tell the model's shape"):
        shape = model_shape(config, tensors, spec.tuning, prefix)
    linears = linear_modules(tensors)
    special = _special_tokens(store, files)
    _optional_json(store, files, "generation_config.json")
    source = _chat_source(store, files)
    eos = _eos_id(tokenizer, special, config, tokenizer_uri)
    # A template may write it though the model's files name it by its number alone.
    special.setdefault("eos_token", tokenizer.id_to_token(eos) or "")
    bos = tokenizer.token_to_id(special["bos_token"]) if "bos_token" in special else None
    chat = _chat_template(source or DEFAULT_CHAT_TEMPLATE, special, prefix)
    pins = list(files.values())
    return BaseModel(pins, digest(pins, prefix), shape, Encoder(tokenizer, eos, bos), chat, source is not None, linears)


def _check_embedding(tensors: Mapping[str, Tensor], config: Mapping[str, Any], prefix: str) -> None:
    """The weights must be those of config.json: loading them would fail after a GPU was given."""
    wanted = (number(config, "vocab_size", prefix), number(config, "hidden_size", prefix))
    for name, tensor in tensors.items():
        if name.endswith((".embed_tokens.weight", ".wte.weight")) and tensor.shape != wanted:
            raise invalid(
                f"{prefix}: the weights' {name} has the shape {list(tensor.shape)}; config.json's vocab_size and "
                f"hidden_size say {list(wanted)}"
            )


def _check_layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any], prefix: str) -> None:
    """A model has no more layers than its weights: transformers would make the others, however many they are."""
    found = len({match[1] for name in tensors if (match := _LAYER.search(name))})
    said = number(config, "layers", prefix)
    if found and said > found:
        raise invalid(f"{prefix}config.json says that there are {said!r:.40} layers; the weights have {found:,}")


def header_of(store: Store, pinned: PinnedObject) -> dict[str, Tensor]:
    """The tensors of a safetensors file, from its header alone. Raises ModelInvalid."""
    length = int.from_bytes(store.get_range(pinned, 0, 8), "little") if pinned.size >= 8 else 0
    if not 2 <= length <= min(HEADER, pinned.size - 8):
        if store.get_range(pinned, 0, min(pinned.size, len(POINTER))) == POINTER:
            raise invalid(f"{pinned.uri} is a pointer of Git LFS; upload the file that it stands for")
        raise invalid(f"{pinned.uri} is not a safetensors file: its header would have {length:,} bytes")
    header = store.get_range(pinned, 8, length)
    with during(Reason.MODEL_INVALID, f"{pinned.uri}: its safetensors header cannot be read"):
        return parse_header(header, pinned.size, pinned.uri)


def load_tokenizer(store: Store, pinned: PinnedObject) -> Tokenizer:
    """A tokenizer that reads short texts in reasonable time and memory. Raises ModelInvalid."""
    data = store.get_bytes(pinned, SMALL)
    with during(Reason.MODEL_INVALID, f"{pinned.uri} cannot be loaded"):
        tokenizer = Tokenizer.from_buffer(data)
    advice = "its normalizer, pre_tokenizer or post_processor makes much out of little"
    with during(
        Reason.MODEL_INVALID, f"{pinned.uri} cannot encode short texts", seconds=20.0, memory=2**30, advice=advice
    ):
        for text in SAMPLES:
            ids = tokenizer.encode(text).ids
            if len(ids) > MOST_TOKENS:
                raise invalid(f"{pinned.uri} makes {len(ids):,} tokens of {len(text)} characters; {advice}")
            tokenizer.decode(ids[:MOST_TOKENS])
    return tokenizer


def _chat_template(source: str, special: Mapping[str, str], prefix: str) -> ChatTemplate:
    """Raises ModelInvalid where it cannot be compiled, or takes too much on a short conversation already."""
    try:
        with during(Reason.MODEL_INVALID, f"{prefix}: the chat template cannot be compiled", seconds=30.0):
            chat = ChatTemplate(source, special)
    except BadTemplate as error:
        raise invalid(f"{prefix}: the chat template cannot be compiled: {error}") from error
    try:
        chat.render(CONVERSATION)
    except Costly as error:
        raise invalid(f"{prefix}: {error}, on a question of three words and its answer") from error
    except BadRow:
        # Templates may refuse conversations: the rows will show which.
        log.event("the chat template refuses a question with its answer", level="warning")
    return chat


def _optional_json(store: Store, files: Mapping[str, PinnedObject], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    data, uri = store.get_bytes(files[name], SMALL), files[name].uri
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise invalid(f"{uri} is not valid JSON") from error
    if not isinstance(value, dict):
        raise invalid(f"{uri} must be one JSON object")
    if half_characters(data) and not is_text(json.dumps(value, ensure_ascii=False)):
        raise invalid(f"{uri} has half of a surrogate pair, which is no character")
    check_beside(value, uri)
    if name == "generation_config.json":
        # A tokenizer says with 10^30 that its texts have no end.
        check_numbers(value, uri)
    return value


def _special_tokens(store: Store, files: Mapping[str, PinnedObject]) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like, by name."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in _optional_json(store, files, name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if not key.endswith("_token") or isinstance(text, bool | None):
                # Such as add_bos_token, and a token that there is none of.
                continue
            if not isinstance(text, str):
                raise invalid(f"{files[name].uri}: `{key}` must be a text; found {text!r:.60}")
            found[key] = text
    return found


def _chat_source(store: Store, files: Mapping[str, PinnedObject]) -> str | None:
    """The model's chat template: a file of its own, or the tokeniser's field; of several the one named `default`."""
    if "chat_template.jinja" in files:
        try:
            return store.get_bytes(files["chat_template.jinja"], SMALL).decode()
        except UnicodeDecodeError as error:
            raise invalid(f"{files['chat_template.jinja'].uri}: byte {error.start + 1} is not UTF-8") from error
    value = _optional_json(store, files, "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):
        value = next((t.get("template") for t in value if isinstance(t, dict) and t.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        uri = files["tokenizer_config.json"].uri
        raise invalid(f"{uri}: `chat_template` must be a text, or a list of them by name; found {value!r:.60}")
    return value


def _eos_id(tokenizer: Tokenizer, special: Mapping[str, str], config: Mapping[str, Any], uri: str) -> int:
    if "eos_token" in special and (known := tokenizer.token_to_id(special["eos_token"])) is not None:
        return int(known)
    value = config.get("eos_token_id")
    value = value[0] if isinstance(value, list) and value else value
    if type(value) is int and 0 <= value < 2**32 and tokenizer.id_to_token(value) is not None:
        return value
    raise FineTuneError(
        Reason.MODEL_INVALID,
        f"{uri}: no end-of-sequence token; tokenizer_config.json's `eos_token` must name one of its tokens",
    )
