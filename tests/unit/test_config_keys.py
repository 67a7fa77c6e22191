"""What the files of a model may say: known keys and no code, at any depth."""

from typing import Any

import pytest

from finetune_api.configkeys import CONFIG_KEYS, check_adapter_config, check_beside, check_config
from finetune_api.failures import FineTuneError, Reason

LLAMA: dict[str, Any] = {
    "_name_or_path": "x",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "id2label": {"0": "auto_map"},
    "model_type": "llama",
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "rope_type": "llama3"},
    "task_specific_params": {"text-generation": {"do_sample": True}},
    "torch_dtype": "bfloat16",
}
LORA: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": "s3://models/a/",
    "eva_config": None,
    "loftq_config": {},
    "lora_alpha": 32,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "r": 16,
    "target_modules": ["q_proj"],
    "use_dora": False,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "`auto_map` asks to run the model's own code"),
        ({"text_config": {"auto_map": {}}}, "`text_config.auto_map`"),
        ({"rope_scaling": [{"auto_map": {}}]}, "`rope_scaling.auto_map`"),
        ({"_attn_implementation_internal": "org/kernel"}, "code from a hub"),
        ({"attn_implementation": "org/kernel"}, "code from a hub"),
        ({"trust_remote_code": True}, "`trust_remote_code`"),
        ({"attribute_map": {"a": "b"}}, "found the key `attribute_map`"),
        ({"extra_files": ["x.py"]}, "found the key `extra_files`"),
        ({"sub_configs_defaults": {}}, "found the key `sub_configs_defaults`"),
        ({"base_model_tp_plan": {}}, "found the key `base_model_tp_plan`"),
        ({"text_config": {"experts_implementation": "x"}}, "found the key `text_config.experts_implementation`"),
        ({"__class__": "x"}, "found the key `__class__`"),
    ],
)
def test_a_models_configuration_says_no_more_than_what_a_model_is(change: Any, words: str) -> None:
    check_config(LLAMA, "s3://m/config.json")
    with pytest.raises(FineTuneError) as caught:
        check_config(LLAMA | change, "s3://m/config.json")
    assert caught.value.reason is Reason.MODEL_INVALID
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"auto_mapping": {"parent_library": "os"}}, "`auto_mapping` names classes to import"),
        ({"megatron_config": {"a": 1}}, "`megatron_config` names a module to import"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "`tokenizer_kwargs`"),
        ({"loftq_config": {"a": 1}}, "found the key `loftq_config`"),
        ({"next_years_config": {"a": 1}}, "found the key `next_years_config`"),
    ],
)
def test_an_adapters_says_no_more_than_how_it_is_applied(change: Any, words: str) -> None:
    check_adapter_config(LORA, "s3://a/adapter_config.json")
    check_adapter_config(LORA | {"next_years_config": None}, "s3://a/adapter_config.json")
    with pytest.raises(FineTuneError, match="adapter_config") as caught:
        check_adapter_config(LORA | change, "s3://a/adapter_config.json")
    assert words in str(caught.value)


def test_files_beside_it_may_say_what_they_like_but_code() -> None:
    check_beside({"chat_template": "{{ a }}", "anything": {"at": ["all"]}}, "s3://m/tokenizer_config.json")
    with pytest.raises(FineTuneError, match="`auto_map` asks to run"):
        check_beside({"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "s3://m/tokenizer_config.json")


def test_the_list_names_no_files_no_classes_and_no_plans() -> None:
    dangerous = ("auto_map", "_plan", "_files", "module", "custom", "remote", "hub", "url", "kernel_config")
    assert [key for key in CONFIG_KEYS for word in dangerous if word in key] == []
