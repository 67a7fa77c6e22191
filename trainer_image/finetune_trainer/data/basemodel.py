"""The base model as `prepare` sees it: its small files and the headers of its weights, never the weights themselves."""

import hashlib
import json
from collections.abc import Mapping
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
from finetune_trainer.data.readers import POINTER
from finetune_trainer.data.templates import DEFAULT_CHAT_TEMPLATE, BadTemplate, ChatTemplate
from finetune_trainer.data.tokenise import Encoder
from finetune_trainer.storage import Store

SMALL = 64 * 2**20
HEADER = 100 * 2**20
"""Bytes; the limit that the safetensors library has too."""
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


def inspect(store: Store, spec: FineTuneJobSpec) -> BaseModel:
    """Raises ModelInvalid with the file named; StorageDenied and StorageUnavailable with `baseModel` in front."""
    prefix = spec.base_model.uri.rstrip("/") + "/"
    if not prefix.startswith("s3://"):
        raise FineTuneError(Reason.INVALID_SPEC, f"spec.baseModel.uri: found {prefix}; s3:// is supported")
    try:
        listed = {item.uri.removeprefix(prefix): item for item in store.list(prefix)}
        weights = weight_files(store, listed, prefix)
        wanted = sorted(name for name in listed if name in MODEL_FILES or name in weights)
        files = dict(zip(wanted, store.pin_all([listed[name].uri for name in wanted]), strict=True))
        return _inspect(store, spec, files, weights, prefix)
    except FineTuneError as error:
        if error.reason == Reason.INVALID_SPEC:
            raise
        reason = Reason.MODEL_INVALID if error.reason == Reason.DATA_INVALID else error.reason
        raise FineTuneError(reason, f"spec.baseModel.uri: {error}") from error


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
                raise invalid(f"{uri} names {name!r}; a shard is a .safetensors file beside it")
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
    if "tokenizer.json" not in files:
        raise invalid(f"{prefix} has no tokenizer.json; save the model with a fast tokenizer (save_pretrained)")
    tokenizer_uri = f"{prefix}tokenizer.json"
    try:
        tokenizer = Tokenizer.from_buffer(store.get_bytes(files["tokenizer.json"], SMALL))
    except FineTuneError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise invalid(f"{tokenizer_uri} cannot be loaded: {str(error)[:200]}") from error
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
    shape = model_shape(config, tensors, spec.tuning, prefix)
    linears = linear_modules(tensors)
    special = _special_tokens(store, files)
    _optional_json(store, files, "generation_config.json")
    source = _chat_source(store, files)
    eos = _eos_id(tokenizer, special, config, tokenizer_uri)
    # A template may write it though the model's files name it by its number alone.
    special.setdefault("eos_token", tokenizer.id_to_token(eos) or "")
    bos = tokenizer.token_to_id(special["bos_token"]) if "bos_token" in special else None
    try:
        chat = ChatTemplate(source or DEFAULT_CHAT_TEMPLATE, special)
    except BadTemplate as error:
        raise invalid(f"{prefix}: the chat template cannot be compiled: {error}") from error
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


def header_of(store: Store, pinned: PinnedObject) -> dict[str, Tensor]:
    """The tensors of a safetensors file, from its header alone. Raises ModelInvalid."""
    length = int.from_bytes(store.get_range(pinned, 0, 8), "little") if pinned.size >= 8 else 0
    if not 2 <= length <= min(HEADER, pinned.size - 8):
        if store.get_range(pinned, 0, min(pinned.size, len(POINTER))) == POINTER:
            raise invalid(f"{pinned.uri} is a pointer of Git LFS; upload the file that it stands for")
        raise invalid(f"{pinned.uri} is not a safetensors file: its header would have {length:,} bytes")
    return parse_header(store.get_range(pinned, 8, length), pinned.size, pinned.uri)


def _optional_json(store: Store, files: Mapping[str, PinnedObject], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(store.get_bytes(files[name], SMALL))
    except (ValueError, RecursionError) as error:
        raise invalid(f"{files[name].uri} is not valid JSON") from error
    if not isinstance(value, dict):
        raise invalid(f"{files[name].uri} must be one JSON object")
    check_beside(value, files[name].uri)
    return value


def _special_tokens(store: Store, files: Mapping[str, PinnedObject]) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like, by name."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in _optional_json(store, files, name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


def _chat_source(store: Store, files: Mapping[str, PinnedObject]) -> str | None:
    """The model's chat template: a file of its own, or the tokeniser's field; of several the one named `default`."""
    if "chat_template.jinja" in files:
        return store.get_bytes(files["chat_template.jinja"], SMALL).decode()
    value = _optional_json(store, files, "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):
        value = next((t.get("template") for t in value if isinstance(t, dict) and t.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _eos_id(tokenizer: Tokenizer, special: Mapping[str, str], config: Mapping[str, Any], uri: str) -> int:
    if "eos_token" in special and (known := tokenizer.token_to_id(special["eos_token"])) is not None:
        return int(known)
    value = config.get("eos_token_id")
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, int) and tokenizer.id_to_token(value) is not None:
        return value
    raise FineTuneError(
        Reason.MODEL_INVALID,
        f"{uri}: no end-of-sequence token; tokenizer_config.json's `eos_token` must name one of its tokens",
    )
