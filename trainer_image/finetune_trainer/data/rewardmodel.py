"""The reward model that a method or the evaluation names: is it one, and does it read the base model's tokens?"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from finetune_api.configkeys import check_adapter_config
from finetune_api.failures import Reason
from finetune_api.job import FineTuneJobSpec
from finetune_api.manifest import MANIFEST_KEY
from finetune_api.method import ModelRef
from finetune_api.modelfiles import SCORES, Tensor, invalid, parse_config
from finetune_api.run import PinnedObject
from finetune_trainer.confined import during
from finetune_trainer.data.adapter import CONFIG, WEIGHTS, check_manifest
from finetune_trainer.data.basemodel import (
    MODEL_FILES,
    SMALL,
    BaseModel,
    header_of,
    list_files,
    load_tokenizer,
    naming,
    weight_files,
)
from finetune_trainer.publish import read_manifest
from finetune_trainer.storage import Store, join

HEADS = ("score.weight", "classifier.weight", "score.dense.weight")
"""How transformers' families name the head that gives a score."""


class Judge(NamedTuple):
    files: list[PinnedObject]
    parameters: int


def inspect_reward_model(store: Store, spec: FineTuneJobSpec, model: BaseModel) -> Judge:
    """What the method names; nothing where it names none. Raises ModelInvalid with what does not fit."""
    rollout = spec.method.rollout
    named = rollout.reward_model if rollout else None
    return _inspected(store, named, f"spec.method.{spec.method.type.lower()}.rewardModel.uri", model)


def inspect_judge(store: Store, spec: FineTuneJobSpec, model: BaseModel) -> Judge:
    """The same for evaluation.rewardModel."""
    return _inspected(store, spec.evaluation.reward_model, "spec.evaluation.rewardModel.uri", model)


def _inspected(store: Store, named: ModelRef | None, field: str, model: BaseModel) -> Judge:
    """A whole model with one score, or the adapter of one on this job's base model."""
    if named is None:
        return Judge([], 0)
    prefix = named.uri.rstrip("/") + "/"
    with during(Reason.MODEL_INVALID, field, seconds=120.0), naming(field):
        listed = list_files(store, prefix)
        return _adapter(store, listed, model, prefix) if CONFIG in listed else _whole(store, listed, model, prefix)


def _adapter(store: Store, listed: Mapping[str, PinnedObject], model: BaseModel, prefix: str) -> Judge:
    if WEIGHTS not in listed:
        raise invalid(f"{prefix} has no {WEIGHTS}; adapters in peft's format are supported, safetensors only")
    names = [CONFIG, WEIGHTS, *({MANIFEST_KEY} & set(listed))]
    pins = dict(zip(names, store.pin_all([join(prefix, name) for name in names]), strict=True))
    if MANIFEST_KEY in pins:
        check_manifest(read_manifest(store, pins[MANIFEST_KEY].uri), pins, model.sha256, prefix)
    config = _json(store, pins[CONFIG])
    check_adapter_config(config, pins[CONFIG].uri)
    task = config.get("task_type")
    if task != "SEQ_CLS":
        raise invalid(f"{prefix} is an adapter for {task}; a reward model's is for SEQ_CLS (method Reward makes one)")
    _check_head(header_of(store, pins[WEIGHTS]), model, prefix)
    return Judge(list(pins.values()), model.shape.parameters)


def _whole(store: Store, listed: Mapping[str, PinnedObject], model: BaseModel, prefix: str) -> Judge:
    weights = weight_files(store, listed, prefix)
    wanted = sorted(name for name in listed if name in MODEL_FILES or name in weights)
    pins = dict(zip(wanted, store.pin_all([listed[name].uri for name in wanted]), strict=True))
    parse_config(store.get_bytes(pins["config.json"], SMALL), pins["config.json"].uri, SCORES)
    _check_tokenizer(store, pins, model, prefix)
    tensors: dict[str, Tensor] = {}
    for name in weights:
        if name.endswith(".safetensors"):
            tensors |= header_of(store, pins[name])
    _check_head(tensors, None, prefix)
    return Judge(list(pins.values()), sum(math.prod(tensor.shape) for tensor in tensors.values()))


def _check_head(tensors: Mapping[str, Tensor], model: BaseModel | None, prefix: str) -> None:
    head = next((tensor for name, tensor in tensors.items() if name.endswith(HEADS)), None)
    if head is None:
        raise invalid(f"{prefix} has no head that gives a score ({HEADS[0]})")
    if not head.shape or head.shape[0] != 1:
        raise invalid(
            f"{prefix} tells {head.shape[0] if head.shape else 0} classes apart; a reward model gives one score"
        )
    if model and head.shape[-1] != model.shape.hidden_size:
        raise invalid(
            f"{prefix}: its head reads {head.shape[-1]} values; the base model's hidden_size is "
            f"{model.shape.hidden_size}"
        )


def _check_tokenizer(store: Store, pins: Mapping[str, PinnedObject], model: BaseModel, prefix: str) -> None:
    """Answers are handed on as tokens: they must mean the same to both."""
    if "tokenizer.json" not in pins:
        raise invalid(f"{prefix} has no tokenizer.json: it cannot be told whether it reads the base model's tokens")
    tokenizer = load_tokenizer(store, pins["tokenizer.json"])
    known, wanted = tokenizer.get_vocab(with_added_tokens=True), model.encoder.vocabulary
    if known != wanted:
        other = min((word for word in wanted if known.get(word) != wanted[word]), default=None)
        which = f"token {other!r} is {known.get(other)} there, {wanted[other]} here" if other else "it has more tokens"
        raise invalid(f"{prefix} has another tokenizer than the base model ({which}); both must be the same")


def _json(store: Store, pinned: PinnedObject) -> dict[str, Any]:
    try:
        value = json.loads(store.get_bytes(pinned, SMALL))
    except (ValueError, RecursionError) as error:
        raise invalid(f"{pinned.uri} is not valid JSON") from error
    return value if isinstance(value, dict) else {}
