"""The adapter that a job starts from (spec.baseModel.adapterUri): does it belong to this base model and this tuning?"""

import json
import math
from collections.abc import Mapping
from typing import Any

from finetune_api.configkeys import check_adapter_config
from finetune_api.failures import Reason
from finetune_api.job import FineTuneJobSpec
from finetune_api.manifest import MANIFEST_KEY, Manifest
from finetune_api.modelfiles import Tensor, features, invalid, targeted
from finetune_api.run import PinnedObject
from finetune_api.sizing import ModelShape
from finetune_api.tuning import LoRA, Tuning
from finetune_trainer.confined import during
from finetune_trainer.data.basemodel import SMALL, BaseModel, header_of, list_files, naming
from finetune_trainer.publish import read_manifest
from finetune_trainer.storage import Store, join

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_TYPES = {"IA3": "IA3", "PromptTuning": "PROMPT_TUNING", "PrefixTuning": "PREFIX_TUNING"}
Shape = tuple[int, ...]


def inspect_adapter(store: Store, spec: FineTuneJobSpec, model: BaseModel) -> list[PinnedObject]:
    """The adapter's two files and, where there is one, its manifest; [] where the job starts from none.

    Raises ModelInvalid with what does not fit.
    """
    if spec.base_model.adapter_uri is None:
        return []
    prefix, field = spec.base_model.adapter_uri.rstrip("/") + "/", "spec.baseModel.adapterUri"
    with during(Reason.MODEL_INVALID, field), naming(field):
        listed = list_files(store, prefix)
        for name in (CONFIG, WEIGHTS):
            if name not in listed:
                raise invalid(f"{prefix} has no {name}; adapters in peft's format are supported, safetensors only")
        names = [CONFIG, WEIGHTS, *({MANIFEST_KEY} & set(listed))]
        pins = dict(zip(names, store.pin_all([join(prefix, name) for name in names]), strict=True))
        if MANIFEST_KEY in pins:
            check_manifest(read_manifest(store, pins[MANIFEST_KEY].uri), pins, model.sha256, prefix)
        try:
            config = json.loads(store.get_bytes(pins[CONFIG], SMALL))
        except (ValueError, RecursionError) as error:
            raise invalid(f"{pins[CONFIG].uri} is not valid JSON") from error
        known = config if isinstance(config, dict) else {}
        check_adapter_config(known, pins[CONFIG].uri)
        check_config(known, spec.tuning, prefix)
        check_tensors(header_of(store, pins[WEIGHTS]), expected(spec.tuning, model.linears, model.shape), prefix)
    return list(pins.values())


def check_manifest(manifest: Manifest, pins: Mapping[str, PinnedObject], base_sha256: str, prefix: str) -> None:
    """Raises ModelInvalid where the files are not those of an adapter upon that base model."""
    if manifest.kind != "Adapter":
        raise invalid(
            f"{prefix} holds a {manifest.kind.lower()}, not an adapter; baseModel.uri is the field for models"
        )
    sizes = {entry.key: entry.size for entry in manifest.files}
    for name in (CONFIG, WEIGHTS):
        if sizes.get(name) != pins[name].size:
            raise invalid(f"{prefix}{name} is not the file that the manifest names")
    if manifest.run and manifest.run.base_model_sha256 != base_sha256:
        raise invalid(
            f"{prefix} was trained on other files than those below spec.baseModel.uri (on "
            f"{manifest.run.base_model_uri}, SHA-256 {manifest.run.base_model_sha256[:16]}…; found {base_sha256[:16]}…)"
        )


def check_config(config: Mapping[str, Any], tuning: Tuning, prefix: str) -> None:
    """PURE. What peft's adapter_config.json says must be what spec.tuning says. Raises ModelInvalid."""
    found, wanted = config.get("peft_type"), _PEFT_TYPES.get(tuning.type, "LORA")
    if found != wanted:
        raise invalid(f"{prefix} is a {found} adapter; spec.tuning.type {tuning.type} continues {wanted} only")
    if tuning.virtual_tokens:
        pairs: list[tuple[str, object, object]] = [
            ("tokens", config.get("num_virtual_tokens"), tuning.virtual_tokens),
        ]
    elif tuning.type == "IA3":
        pairs = [("targetModules' feed-forward modules", config.get("feedforward_modules") or [], [])]
    else:
        lora = tuning.lora or LoRA()
        scaling = "RankStabilized" if config.get("use_rslora") else "Standard"
        pairs = [
            ("DoRA", bool(config.get("use_dora")), tuning.type == "DoRA"),
            ("rank", config.get("r"), lora.rank),
            ("alpha", config.get("lora_alpha"), lora.alpha),
            ("scaling", scaling, lora.scaling),
        ]
    for name, has, wants in pairs:
        same = math.isclose(has, wants) if isinstance(has, int | float) and isinstance(wants, float) else has == wants
        if not same:
            raise invalid(f"{prefix}: its {name} is {has}, spec.tuning says {wants}; they must be the same")


def expected(tuning: Tuning, linears: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Shape]:
    """PURE. The tensors of such an adapter by the ends of their names."""
    if tuning.virtual_tokens:
        width = shape.hidden_size if tuning.type == "PromptTuning" else 2 * shape.layers * shape.key_value_size
        return {"prompt_embeddings": (tuning.virtual_tokens, width)}
    rank = (tuning.lora or LoRA()).rank
    tensors: dict[str, Shape] = {}
    for name, linear in targeted(linears, tuning).items():
        inputs, outputs = features(linear, shape.architecture)
        if tuning.type == "IA3":
            tensors[f"{name}.ia3_l"] = (outputs, 1)
            continue
        tensors |= {f"{name}.lora_A.weight": (rank, inputs), f"{name}.lora_B.weight": (outputs, rank)}
        if tuning.type == "DoRA":
            tensors[f"{name}.lora_magnitude_vector"] = (outputs,)
    return tensors


def check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, Shape], prefix: str) -> None:
    """PURE. Every tensor that the tuning would train is there, in its shape, and no other. Raises ModelInvalid."""
    left = dict(tensors)
    for name, shape in wanted.items():
        key = next((key for key in left if key == name or key.endswith(f".{name}")), None)
        if key is None:
            raise invalid(f"{prefix} has no tensor {name}: it is of another model, or of other targetModules")
        if left.pop(key).shape != shape:
            raise invalid(
                f"{prefix}: the tensor {name} has the shape {list(tensors[key].shape)}; the base model needs "
                f"{list(shape)}"
            )
    if left:
        raise invalid(f"{prefix} has the tensor {min(left)}, which spec.tuning does not train")
