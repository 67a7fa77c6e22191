"""The model as it was before: what a method that may not stray too far compares with.

Where a new adapter lies upon frozen weights, that is the model with the adapter switched off. Everywhere else (an
adapter that goes on learning, weights of the model itself, PiSSA's factors) the first values of what is trained are
kept beside it and stand in its place while the reference computes. They are no parameters: no optimizer, checkpoint or
published file sees them, and a resumed run makes them again from what the first attempt started from.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from finetune_trainer.model import trained_parameters


class Reference(Protocol):
    def begin(self, trainer: Any) -> None:
        """Once DDP or DeepSpeed have wrapped the model, before anything is trained or restored. Collective."""

    def active(self) -> AbstractContextManager[None]:
        """While it lasts the trainer's model is the reference. No backward pass within. Collective under ZeRO-3."""


class SwitchedOff:
    """`model`: with an adapter."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def begin(self, trainer: Any) -> None:
        pass

    def active(self) -> AbstractContextManager[None]:
        off: AbstractContextManager[None] = self._model.disable_adapter()
        return off


class FirstValues:
    """A copy of what is trained: as many bytes as it takes itself; of a rank's share alone under ZeRO-3."""

    def begin(self, trainer: Any) -> None:
        self._zero = _partitioning(trainer)
        if self._zero:
            self._zero.empty_partition_cache()
        self._places = [_place(parameter) for parameter in trained_parameters(trainer.model).values()]
        self._values = [place.data.clone() for place in self._places]

    @contextmanager
    def active(self) -> Iterator[None]:
        now = [place.data for place in self._places]
        self._put(self._values)
        try:
            yield
        finally:
            self._put(now)

    def _put(self, values: list[torch.Tensor]) -> None:
        # What ZeRO-3 has gathered, and what autocast has cast, is of the other values.
        if self._zero:
            self._zero.empty_partition_cache()
        torch.clear_autocast_cache()
        for place, value in zip(self._places, values, strict=True):
            place.data = value


def reference_of(model: Any, keeps: bool) -> Reference | None:
    """`keeps`: see `finetune_api.stages.keeps_reference`. None: there is none, since none is asked for."""
    if keeps:
        return FirstValues()
    return SwitchedOff(model) if hasattr(model, "disable_adapter") else None


def _partitioning(trainer: Any) -> Any:
    """ZeRO-3's optimizer; None elsewhere."""
    optimizer = getattr(trainer.model_wrapped, "optimizer", None) if trainer.is_deepspeed_enabled else None
    return optimizer if hasattr(optimizer, "empty_partition_cache") else None


def _place(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Where this rank keeps its values: ZeRO-3 leaves a share of them with each rank."""
    share: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
    return parameter if share is None else share
