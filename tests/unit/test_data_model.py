"""Headers and config -> the model's shape."""

import json

import pytest

from finetune_api.failures import FineTuneError
from finetune_api.modelfiles import Tensor, linear_modules, model_shape, parse_header, targeted
from finetune_api.tuning import LoRA, Tuning

GPT2 = {
    "wte.weight": Tensor("F32", (100, 8)),
    "wpe.weight": Tensor("F32", (16, 8)),
    "h.0.ln_1.weight": Tensor("F32", (8,)),
    "h.0.attn.c_attn.weight": Tensor("F32", (8, 24)),
    "h.0.mlp.c_fc.weight": Tensor("F32", (8, 32)),
    "ln_f.weight": Tensor("F32", (8,)),
}
LLAMA = {
    "model.embed_tokens.weight": Tensor("BF16", (100, 8)),
    "lm_head.weight": Tensor("BF16", (100, 8)),
    "model.norm.weight": Tensor("F32", (8,)),
    "model.layers.0.self_attn.q_proj.weight": Tensor("BF16", (8, 8)),
    "model.layers.0.mlp.up_proj.weight": Tensor("BF16", (16, 8)),
    "model.layers.0.mlp.up_proj.bias": Tensor("BF16", (16,)),
    "model.layers.10.self_attn.q_proj.weight": Tensor("BF16", (8, 8)),
}
CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 100}


def on(targets: list[str]) -> Tuning:
    return Tuning(type="LoRA", lora=LoRA(target_modules=targets))


def test_linear_layers_are_those_of_the_blocks() -> None:
    assert set(linear_modules(GPT2)) == {"h.0.attn.c_attn", "h.0.mlp.c_fc"}
    assert len(linear_modules(LLAMA)) == 3


def test_a_llamas_shape() -> None:
    shape = model_shape(CONFIG, LLAMA, Tuning(), "s3://b/m/")
    assert shape.parameters == 800 + 800 + 8 + 64 + 128 + 16 + 64
    assert shape.linear_parameters == 64 + 128 + 64
    assert shape.target_features == 16 + 24 + 16
    assert shape.target_outputs == 8 + 16 + 8
    assert shape.block_parameters == (64 + 128 + 16 + 64) // 2
    assert shape.key_value_size == 8
    assert shape.largest_layer_parameters == 800
    assert (shape.dtype, shape.layers, shape.max_positions) == ("BFloat16", 2, 2**31 - 1)


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["q_proj"], 2), (["q_proj", "up_proj"], 3), (["layers.10.self_attn.q_proj"], 1), (["mlp.up_proj"], 1)],
)
def test_targets_are_whole_names_or_their_ends(targets: list[str], count: int) -> None:
    assert len(targeted(linear_modules(LLAMA), on(targets))) == count


@pytest.mark.parametrize("target", ["proj", "0.self_attn", "lm_head", "q_proj.*"])
def test_what_is_no_linear_module_is_no_target(target: str) -> None:
    with pytest.raises(FineTuneError, match="the model's linear modules are q_proj, up_proj"):
        targeted(linear_modules(LLAMA), on([target]))


def test_weights_of_other_types_are_refused() -> None:
    tensors = {"model.layers.0.x.weight": Tensor("I8", (8, 8))}
    with pytest.raises(FineTuneError, match="found weights of type I8"):
        model_shape(CONFIG, tensors, Tuning(), "s3://b/m/")


def test_an_unknown_type_is_measured_by_its_offsets() -> None:
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    assert parse_header(header, 8 + len(header) + 4, "s3://b/x")["x"].size == 4
