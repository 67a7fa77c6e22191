"""What of the model is trained: spec.tuning."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from finetune_api.model import ApiModel

ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.*-]+$", max_length=253)]
Modules = Annotated[list[ModuleName], Field(min_length=1, max_length=64)]
Rank = Annotated[int, Field(ge=1, le=4096)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


class LoRA(ApiModel):
    """LoRA's parameters, also those of DoRA and QLoRA, which differ in the base weights alone."""

    rank: Rank = 16
    alpha: Annotated[float, Field(gt=0, le=65536)] = 32
    dropout: Dropout = 0.0
    target_modules: Modules = ["AllLinear"]
    """Names of modules, or `AllLinear`: every linear layer but the head."""
    scaling: Literal["Standard", "RankStabilized"] = "Standard"
    initialization: Literal["Default", "PiSSA"] = "Default"


class IA3(ApiModel):
    target_modules: Modules = ["AllLinear"]


class VirtualTokens(ApiModel):
    tokens: Annotated[int, Field(ge=1, le=4096)] = 20


class Freeze(ApiModel):
    trainable_layers: Annotated[int, Field(ge=1, le=1024)] = 2
    """The last n blocks (and the head) learn, the rest is frozen."""


class Tuning(ApiModel):
    union: ClassVar = {
        "LoRA": "lora",
        "QLoRA": "lora",
        "DoRA": "lora",
        "IA3": "ia3",
        "PromptTuning": "prompt_tuning",
        "PrefixTuning": "prefix_tuning",
        "Freeze": "freeze",
    }
    type: Literal["LoRA", "QLoRA", "DoRA", "IA3", "PromptTuning", "PrefixTuning", "Freeze", "Full"] = "LoRA"
    lora: LoRA | None = None
    ia3: IA3 | None = None
    prompt_tuning: VirtualTokens | None = None
    prefix_tuning: VirtualTokens | None = None
    freeze: Freeze | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether what is trained stands beside the model's weights, rather than being some of them."""
        return self.type not in ("Freeze", "Full")

    @property
    def target_modules(self) -> list[str]:
        """The modules that an adapter sits on; of no meaning where there is none."""
        return (self.ia3 or IA3()).target_modules if self.type == "IA3" else (self.lora or LoRA()).target_modules

    @property
    def virtual_tokens(self) -> int:
        """Of PromptTuning and PrefixTuning; 0 elsewhere."""
        prompts = {"PromptTuning": self.prompt_tuning, "PrefixTuning": self.prefix_tuning}
        return (prompts[self.type] or VirtualTokens()).tokens if self.type in prompts else 0
