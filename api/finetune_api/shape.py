"""What memory depends on: the model's shape, what is trained of it, the device, and what a spec asks for."""

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.model import ApiModel, ShortText
from finetune_api.tuning import Freeze, LoRA, Tuning

Strategy = Literal["DDP", "ZeRO1", "ZeRO2", "ZeRO3"]
Offload = Literal["None", "Optimizer", "OptimizerAndParameters"]
Count = Annotated[int, Field(ge=0)]


class ModelShape(ApiModel):
    """What memory depends on, from config.json and the safetensors headers."""

    architecture: ShortText
    parameters: Count
    hidden_size: Count
    intermediate_size: Count = 0
    """Width of a block's MLP; 0: four times hidden_size."""
    layers: Count
    vocab_size: Count
    linear_parameters: Count
    """Weights of the linear layers but the head: what QLoRA quantises."""
    target_features: Count
    """Sum of inputs + outputs over the modules that the tuning targets: a LoRA of rank r trains r times as many."""
    target_outputs: Count = 0
    """Sum of outputs alone over the same modules: IA3 trains as many, DoRA as many more than LoRA."""
    block_parameters: Count = 0
    """Weights of one block, the mean of them."""
    key_value_size: Count = 0
    """Width of a layer's keys: less than hidden_size where heads share them."""
    largest_layer_parameters: Count
    max_positions: Count
    dtype: Literal["BFloat16", "Float16", "Float32"]
    """Of the weights as stored."""


class Device(ApiModel):
    """What one rank has."""

    kind: Literal["CPU", "CUDA"]
    memory_bytes: Count


class Request(ApiModel):
    """What is to be placed: the parts of a spec that memory depends on."""

    tuning: Tuning
    dtype: Literal["Auto", "BFloat16", "Float16", "Float32"] = "Auto"
    sequence_length: Annotated[int, Field(ge=1)]
    """Tokens of the longest row that a rank sees."""
    sequences: Annotated[int, Field(ge=1)] = 1
    """Rows of one example: two where a pair goes through the model together."""
    head: bool = False
    """Whether a head in place of the vocabulary reads the last token of a row: no logits for each token then."""
    reference: bool = False
    """Whether the first values of what is trained are kept beside it."""
    global_batch_size: Annotated[int, Field(ge=1)]
    """Examples of an optimizer step; answers, where the model learns from its own."""
    micro_batch_size: Count = 0
    world_size: Annotated[int, Field(ge=1)]
    strategy: Literal["Auto", "DDP", "ZeRO1", "ZeRO2", "ZeRO3"] = "Auto"
    offload: Literal["None", "Auto", "Optimizer", "OptimizerAndParameters"] = "None"


def trainable_parameters(shape: ModelShape, tuning: Tuning) -> int:
    """T. For PEFT methods the adapter's size, for Freeze the last blocks and the head."""
    match tuning.type:
        case "LoRA" | "QLoRA" | "DoRA":
            rank = (tuning.lora or LoRA()).rank
            magnitudes = shape.target_outputs if tuning.type == "DoRA" else 0
            return rank * shape.target_features + magnitudes
        case "IA3":
            return shape.target_outputs
        case "PromptTuning":
            return tuning.virtual_tokens * shape.hidden_size
        case "PrefixTuning":
            return tuning.virtual_tokens * 2 * shape.layers * (shape.key_value_size or shape.hidden_size)
        case "Freeze":
            per_block = shape.block_parameters or shape.linear_parameters // max(1, shape.layers)
            return trained_layers(shape, tuning) * per_block + shape.vocab_size * shape.hidden_size
        case "Full":
            return shape.parameters


def trained_layers(shape: ModelShape, tuning: Tuning) -> int:
    """Blocks through which gradients flow: below the first that is trained nothing is kept for a backward pass."""
    return min((tuning.freeze or Freeze()).trainable_layers, shape.layers) if tuning.type == "Freeze" else shape.layers
