"""What of the model is trained: an adapter of peft's beside frozen weights, or weights of the model itself."""

import math
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers.trainer_utils import set_seed

from finetune_api.failures import FineTuneError, Reason
from finetune_api.tuning import Freeze, LoRA, Tuning
from finetune_trainer.model import Task, reading, trained_parameters
from finetune_trainer.state import Tensors


def peft_config(tuning: Tuning, base_model_uri: str, task: Task) -> PeftConfig:
    """The adapter in peft's words. Prompts are no part of the model's layers: they target no modules."""
    # With SEQ_CLS peft trains the new head too, and saves it with the adapter.
    common = {"task_type": task, "base_model_name_or_path": base_model_uri}
    targets = "all-linear" if tuning.target_modules == ["AllLinear"] else list(tuning.target_modules)
    match tuning.type:
        case "IA3":
            # Every targeted module's output is scaled; none counts as feed-forward, whose input would be scaled.
            return IA3Config(target_modules=targets, feedforward_modules=[], **common)
        case "PromptTuning":
            return PromptTuningConfig(num_virtual_tokens=tuning.virtual_tokens, **common)
        case "PrefixTuning":
            return PrefixTuningConfig(num_virtual_tokens=tuning.virtual_tokens, **common)
    lora = tuning.lora or LoRA()
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha if lora.alpha != int(lora.alpha) else int(lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.scaling == "RankStabilized",
        use_dora=tuning.type == "DoRA",
        # The randomised decomposition: seconds for what an exact one takes hours for in a large model.
        init_lora_weights="pissa_niter_16" if lora.initialization == "PiSSA" else True,
        **common,
    )


def tune(
    model: Any,
    tuning: Tuning,
    base_model_uri: str,
    seed: int,
    gradient_checkpointing: bool,
    masters: bool,
    earlier: Path | None = None,
    task: Task = "CAUSAL_LM",
) -> Any:
    """The model with an adapter or weights of its own to train and the rest frozen; the same on every rank.

    `masters`: weights that are trained become float32 here, where no DeepSpeed keeps copies in float32. `earlier`: the
    folder of an adapter to start from. Raises InvalidSpec, and ModelInvalid where the earlier adapter does not fit.
    """
    set_seed(seed)
    model.config.use_cache = False
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not tuning.is_adapter:
        model.requires_grad_(tuning.type == "Full")
        for module in _last(model, (tuning.freeze or Freeze()).trainable_layers) if tuning.type == "Freeze" else ():
            module.requires_grad_(True)
        _as_masters(model, masters)
        return model
    try:
        peft = get_peft_model(model, peft_config(tuning, base_model_uri, task))
    except ValueError as error:
        field = "ia3" if tuning.type == "IA3" else "lora"
        raise FineTuneError(Reason.INVALID_SPEC, f"spec.tuning.{field}.targetModules: {error}") from error
    # peft's own weights are in float32 already, a new head is not.
    _as_masters(peft, masters and task == "SEQ_CLS")
    # peft writes the model's own path over what it was given, and a mounted path would leak into what is published.
    peft.peft_config["default"].base_model_name_or_path = base_model_uri
    if earlier:
        _start_from(peft, earlier)
    if tuning.type == "PromptTuning":
        peft.register_forward_hook(_without_virtual_tokens, with_kwargs=True)
    return peft


def _start_from(peft: Any, directory: Path) -> None:
    with reading("spec.baseModel.adapterUri: it does not fit", directory):
        result = set_peft_model_state_dict(peft, load_file(directory / "adapter_model.safetensors"))
    # peft loads a prompt apart from the rest, and counts it as unexpected there.
    if strange := sorted({*result.unexpected_keys} - {"prompt_embeddings"}):
        raise FineTuneError(
            Reason.MODEL_INVALID, f"spec.baseModel.adapterUri: it has {strange[0]}, which is not trained"
        )


def _as_masters(model: Any, masters: bool) -> None:
    for parameter in trained_parameters(model).values() if masters else ():
        parameter.data = parameter.data.float()


def _last(model: Any, count: int) -> list[torch.nn.Module]:
    """The last `count` blocks (all where there are fewer) and the head; a head tied to the embeddings trains both."""
    # A head of scores or classes is no output embedding: it is what stands beside the body.
    head = model.get_output_embeddings()
    heads = [head] if head is not None else [m for name, m in model.named_children() if name != model.base_model_prefix]
    depth = model.config.num_hidden_layers
    found = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == depth]
    if not found:
        raise FineTuneError(
            Reason.INVALID_SPEC, "spec.tuning.type: found Freeze; this model's blocks cannot be told apart; use Full"
        )
    return [*list(found[0])[-count:], *heads]


def _without_virtual_tokens(model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """A prompt's own positions come first and are nobody's answer: the logits are of the tokens that were given."""
    if output.logits.dim() == 3:  # else only the wanted positions, (n, vocabulary)
        output.logits = output.logits[:, -kwargs["input_ids"].shape[1] :]
    return output


def initial_of(model: Any, tuning: Tuning) -> Tensors:
    """PiSSA: the factors before training, which are not in the base weights any more; else nothing."""
    if tuning.lora is None or tuning.lora.initialization != "PiSSA":
        return {}
    factors = ((name, p) for name, p in trained_parameters(model).items() if ".lora_A." in name or ".lora_B." in name)
    return {name: parameter.detach().to("cpu", torch.float32, copy=True) for name, parameter in factors}


def as_plain_lora(parameters: Tensors, initial: Tensors, config: LoraConfig) -> Tensors:
    """PiSSA's factors as a LoRA of twice the rank on the original base weights; `config` is changed to say so.

    PiSSA trains B A beside W - s B0 A0; that is W + s [B, -B0] [A; A0] (what peft's own conversion does, from files).
    """
    if not initial:
        return parameters
    config.r *= 2
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    config.init_lora_weights = True
    doubled = {
        name: torch.cat((parameters[name], first), dim=0)
        if ".lora_A." in name
        else torch.cat((parameters[name], -first), dim=1)
        for name, first in initial.items()
    }
    return parameters | doubled
