"""Whatever the configurations of transformers' language models declare is on the list of known keys, or off it by
decision."""

import inspect
import json

import pytest

from finetune_api.configkeys import CONFIG_KEYS
from finetune_trainer.data.configvalues import check_values

OFF = {
    *("self", "kwargs", "args", "attribute_map", "_auto_class", "base_config_key", "sub_configs_defaults"),
    *("extra_files", "extra_config_files"),
}
"""Of the Python class, or what names files; and plans, which say how a model is cut over devices."""


@pytest.mark.slow
def test_every_family_can_be_told() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    missing: dict[str, list[str]] = {}
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = CONFIG_MAPPING[family]
        declared = {*getattr(config, "__dataclass_fields__", {}), *inspect.signature(config.__init__).parameters}
        declared |= set(getattr(config, "attribute_map", {}))
        if new := sorted(key for key in declared - CONFIG_KEYS - OFF if not key.endswith("_plan")):
            missing[family] = new
    assert missing == {}


@pytest.mark.slow
def test_what_every_family_has_by_default_is_allowed() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # This one cannot be made without arguments.
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - {"gemma4_assistant"}:
        config = CONFIG_MAPPING[family]()
        check_values(json.loads(config.to_json_string(use_diff=False)), family)
