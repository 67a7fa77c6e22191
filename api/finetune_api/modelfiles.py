"""A model's files -> its shape: safetensors headers and config.json -> what memory depends on."""

import difflib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from finetune_api.bounds import MOST, shown
from finetune_api.configkeys import check_config
from finetune_api.failures import FineTuneError, Reason
from finetune_api.model import problems_of
from finetune_api.shape import ModelShape
from finetune_api.tuning import Tuning

DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NAMES: dict[str, Literal["BFloat16", "Float16", "Float32"]] = {"BF16": "BFloat16", "F16": "Float16", "F32": "Float32"}
# config.json's fields by the names that families give them.
FIELDS = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "vocab_size": ("vocab_size",),
    "max_positions": ("max_position_embeddings", "n_positions", "max_seq_len"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "key_value_heads": ("num_key_value_heads",),
}
WIDEST = 2**31 - 1
"""The largest number of config.json that is taken: torch counts dimensions in 64 bits, and multiplies them."""
_MLP = ("intermediate_size", "n_inner", "ffn_dim")
MAX_DIMENSIONS = 64
"""Of a tensor: torch's own limit."""
_NOT_LINEAR = re.compile(r"(^|[._])(embed\w*|wte|wpe|lm_head|embed_out|output|\w*norm\w*|ln_\w+|rotary\w*)$")
_LAYER = re.compile(r"^(.*?\.(?:layers|h|blocks)\.\d+)\.")


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def invalid(message: str) -> FineTuneError:
    return FineTuneError(Reason.MODEL_INVALID, message)


ANSWERS = {"ForCausalLM", "LMHeadModel"}, "causal language models (…ForCausalLM)"
SCORES = {"ForSequenceClassification"}, "reward models (…ForSequenceClassification)"
"""How the names of architectures end, and what they are in words."""


def parse_config(data: bytes, uri: str, kind: tuple[set[str], str] = ANSWERS) -> dict[str, Any]:
    """config.json of a model whose code transformers itself has: ANSWERS or SCORES. Raises ModelInvalid."""
    config = _json_object(data, uri)
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise invalid(f"{uri}: `architectures` is missing; it names the model's class, such as LlamaForCausalLM")
    if not names[0].endswith(tuple(kind[0])):
        raise invalid(f"{uri}: found the architecture {names[0]}; {kind[1]} are supported")
    if "quantization_config" in config:
        raise invalid(f"{uri}: the weights are quantised already (`quantization_config`); use the full-precision model")
    check_config(config, uri)
    for field in ("hidden_size", "layers", "vocab_size"):
        number(config, field, uri)
    return config


def number(config: Mapping[str, Any], field: str, uri: str, default: int | None = None) -> int:
    name = next((name for name in FIELDS[field] if name in config), None)
    if name is None and default is not None:
        return default
    return _positive(config.get(name) if name else None, name or FIELDS[field][0], uri)


def _positive(value: Any, name: str, uri: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= WIDEST:
        raise invalid(f"{uri}: `{name}` must be a whole number of 1 to {WIDEST:,}; found {shown(value)}")
    return value


def _optional(config: Mapping[str, Any], names: tuple[str, ...], uri: str) -> int | None:
    """The first of these fields that is a number; some families write a list or null there."""
    name = next((name for name in names if isinstance(config.get(name), int)), None)
    return None if name is None else _positive(config[name], name, uri)


def parse_header(data: bytes, size: int, uri: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file of `size` bytes, from its JSON header. Raises ModelInvalid."""
    header = _json_object(data, uri, "its safetensors header")
    header.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    ranges: list[tuple[int, int]] = []
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            tensor = Tensor(dtype, shape)
            wrong = not all(isinstance(n, int) and 0 <= n <= MOST for n in (*shape, start, end))
            wrong = wrong or len(shape) > MAX_DIMENSIONS or tensor.size > MOST
            wrong = wrong or (dtype in DTYPES and end - start != tensor.size * DTYPES[dtype])
        except (KeyError, TypeError, ValueError):
            wrong = True
        if wrong:
            raise invalid(f"{uri}: the tensor {name} has a broken entry in the safetensors header")
        tensors[name] = tensor
        ranges.append((start, end))
    expected = size - 8 - len(data)
    position = 0
    for start, end in sorted(ranges):
        if start != position:
            raise invalid(f"{uri}: the tensors do not follow each other without a gap at byte {position:,}")
        position = end
    if position != expected:
        raise invalid(
            f"{uri}: the header describes {position:,} bytes of tensors, the file has {expected:,}: it is cut off"
        )
    return tensors


def linear_modules(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Linear layers but the head, by module name: what `AllLinear` means."""
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and not _NOT_LINEAR.search(name.removesuffix(".weight"))
    }


def targeted(linears: Mapping[str, Tensor], tuning: Tuning) -> dict[str, Tensor]:
    """The linear modules that targetModules name, by PEFT's rule: the whole name or its end. Raises InvalidSpec."""
    targets, field = tuning.target_modules, "ia3" if tuning.type == "IA3" else "lora"
    if targets == ["AllLinear"]:
        return dict(linears)
    chosen: dict[str, Tensor] = {}
    for target in targets:
        found = {name: t for name, t in linears.items() if name == target or name.endswith(f".{target}")}
        if not found:
            known = sorted({name.rpartition(".")[2] for name in linears})
            close = difflib.get_close_matches(target, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise FineTuneError(
                Reason.INVALID_SPEC,
                f"spec.tuning.{field}.targetModules: found {target!r}; the model's linear modules are "
                f"{', '.join(known)} (or AllLinear){hint}",
            )
        chosen |= found
    return chosen


def features(linear: Tensor, architecture: str) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer; GPT-2 keeps its weights the other way round."""
    first, second = linear.shape
    return (first, second) if architecture == "GPT2LMHeadModel" else (second, first)


def targets(linears: Mapping[str, Tensor], tuning: Tuning, architecture: str) -> dict[str, int]:
    """What of ModelShape depends on the tuning. Raises InvalidSpec."""
    chosen = targeted(linears, tuning).values()
    return {
        "target_features": sum(sum(tensor.shape) for tensor in chosen),
        "target_outputs": sum(features(tensor, architecture)[1] for tensor in chosen),
    }


def model_shape(config: Mapping[str, Any], tensors: Mapping[str, Tensor], tuning: Tuning, uri: str) -> ModelShape:
    """Raises ModelInvalid, or InvalidSpec for a target that does not exist."""
    linears = linear_modules(tensors)
    if not linears:
        raise invalid(f"{uri}: the weights have no linear layers")
    architecture = config["architectures"][0]
    hidden, vocab = number(config, "hidden_size", uri), number(config, "vocab_size", uri)
    layers = number(config, "layers", uri)
    by_layer: dict[str, int] = {}
    by_dtype: dict[str, int] = {}
    for name, tensor in tensors.items():
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.size
        group = match[1] if (match := _LAYER.match(name)) else name
        by_layer[group] = by_layer.get(group, 0) + tensor.size
    dtype = max(by_dtype, key=lambda key: by_dtype[key])
    if dtype not in _NAMES:
        raise invalid(f"{uri}: found weights of type {dtype}; BF16, F16 and F32 are supported")
    try:
        return ModelShape(
            architecture=architecture,
            parameters=sum(tensor.size for tensor in tensors.values()),
            hidden_size=hidden,
            intermediate_size=_optional(config, _MLP, uri) or 0,
            layers=layers,
            vocab_size=vocab,
            linear_parameters=sum(tensor.size for tensor in linears.values()),
            **targets(linears, tuning, architecture),
            block_parameters=sum(count for name, count in by_layer.items() if name not in tensors) // layers,
            key_value_size=_key_value_size(config, hidden, uri),
            largest_layer_parameters=max(by_layer.values()),
            max_positions=number(config, "max_positions", uri, default=WIDEST),
            dtype=_NAMES[dtype],
        )
    except ValidationError as error:
        raise invalid(f"{uri}: the model's files describe no model: {problems_of(error)[0]}") from error


def llama_tensors(hidden: int, layers: int, intermediate: int, vocab: int, key_value: int) -> dict[str, Tensor]:
    """The weights of a model of the Llama family, for one whose files are not there."""
    attention = {"q_proj": (hidden, hidden), "o_proj": (hidden, hidden)}
    attention |= {"k_proj": (key_value, hidden), "v_proj": (key_value, hidden)}
    mlp = {"gate_proj": (intermediate, hidden), "up_proj": (intermediate, hidden), "down_proj": (hidden, intermediate)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"{at}.mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes |= {f"{at}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    return {name: Tensor("BF16", shape) for name, shape in (shapes | {"model.norm.weight": (hidden,)}).items()}


def _key_value_size(config: Mapping[str, Any], hidden: int, uri: str) -> int:
    heads = number(config, "heads", uri, default=1)
    width = _optional(config, ("head_dim",), uri) or hidden // heads
    return width * number(config, "key_value_heads", uri, heads)


def _json_object(data: bytes, uri: str, what: str = "it") -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise invalid(f"{uri}: {what} is not valid JSON ({str(error).splitlines()[0][:120]})") from error
    if not isinstance(value, dict):
        raise invalid(f"{uri}: {what} must be one JSON object")
    return value
