"""Sizing: which plan is taken, and what is said where none fits."""

import pytest

from finetune_api.sizing import (
    Device,
    DoesNotFit,
    ModelShape,
    Placement,
    Request,
    Strategy,
    explain,
    memory,
    size,
    trainable_parameters,
)
from finetune_api.tuning import Freeze, LoRA, Tuning

GIB = 1024**3
# Llama-3-8B-like: 32 blocks of 4096, q/k/v/o and a gated MLP of 14336.
SHAPE_8B = ModelShape(
    architecture="LlamaForCausalLM",
    parameters=8_030_000_000,
    hidden_size=4096,
    layers=32,
    vocab_size=128_256,
    linear_parameters=6_979_321_856,
    target_features=32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)),
    largest_layer_parameters=525_336_576,
    max_positions=8192,
    dtype="BFloat16",
)


def request(**changes: object) -> Request:
    fields: dict[str, object] = {
        "tuning": Tuning(type="LoRA", lora=LoRA(rank=16)),
        "sequence_length": 2048,
        "global_batch_size": 64,
        "world_size": 8,
    }
    return Request.model_validate(fields | changes)


def gpu(gib: int) -> Device:
    return Device(kind="CUDA", memory_bytes=gib * GIB)


def test_trainable_parameters_of_lora_are_the_papers() -> None:
    # 41.9M: what peft prints for Llama-3-8B with rank 16 on every linear layer.
    assert trainable_parameters(SHAPE_8B, Tuning(type="LoRA", lora=LoRA(rank=16))) == 41_943_040


@pytest.mark.parametrize(
    ("tuning", "gib", "strategy"),
    [
        ("LoRA", 80, "DDP"),
        ("LoRA", 24, "DDP"),
        ("LoRA", 16, "ZeRO3"),
        ("QLoRA", 16, "DDP"),
        ("Full", 80, "ZeRO1"),
        ("Full", 40, "ZeRO2"),
        ("Full", 30, "ZeRO3"),
    ],
)
def test_the_cheapest_strategy_that_fits_is_taken(tuning: str, gib: int, strategy: str) -> None:
    assert size(SHAPE_8B, request(tuning=Tuning(type=tuning)), gpu(gib)).strategy == strategy


def test_recomputation_only_where_it_is_needed() -> None:
    assert not size(SHAPE_8B, request(), gpu(80)).gradient_checkpointing
    assert size(SHAPE_8B, request(), gpu(24)).gradient_checkpointing


def test_the_plan_keeps_the_global_batch_and_stays_below_the_memory() -> None:
    for gib in (16, 24, 40, 80, 140):
        plan = size(SHAPE_8B, request(), gpu(gib))
        assert plan.micro_batch_size * plan.gradient_accumulation * 8 == 64
        assert plan.memory_per_gpu <= 0.9 * gib * GIB


def test_a_chosen_micro_batch_is_kept() -> None:
    assert size(SHAPE_8B, request(micro_batch_size=2), gpu(80)).micro_batch_size == 2


@pytest.mark.parametrize(
    ("changes", "gib", "words"),
    [
        ({"global_batch_size": 10}, 80, "training.globalBatchSize: found 10; it must be a multiple of the 8 processes"),
        ({"global_batch_size": 4}, 80, "for example 8"),
        ({"micro_batch_size": 3}, 80, "training.microBatchSize: found 3; it must divide the 8 examples"),
        ({"strategy": "DDP"}, 16, "tuning.type QLoRA would fit"),
        ({"tuning": Tuning(type="Full"), "world_size": 1}, 32, "distribution.offload Auto would fit"),
        ({"tuning": Tuning(type="QLoRA")}, 4, "a profile with more memory per GPU is needed"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(changes: dict[str, object], gib: int, words: str) -> None:
    with pytest.raises(DoesNotFit, match=words.replace(".", r"\.")):
        size(SHAPE_8B, request(**changes), gpu(gib))


def test_memory_falls_with_each_stage_and_grows_with_each_cost() -> None:
    full = request(tuning=Tuning(type="Full"))
    stages = [memory(SHAPE_8B, full, gpu(80), Placement(s, 1, True)) for s in ("DDP", "ZeRO1", "ZeRO2", "ZeRO3")]
    assert stages == sorted(stages, reverse=True)
    assert memory(SHAPE_8B, full, gpu(80), Placement("DDP", 2, False)) > memory(
        SHAPE_8B, full, gpu(80), Placement("DDP", 1, False)
    )
    assert memory(SHAPE_8B, full, gpu(80), Placement("ZeRO2", 1, True, "Optimizer")) < stages[2]


def test_freezing_all_layers_never_trains_more_than_there_is() -> None:
    tuning = Tuning(type="Freeze", freeze=Freeze(trainable_layers=1000))
    assert trainable_parameters(SHAPE_8B, tuning) <= SHAPE_8B.parameters


@pytest.mark.parametrize(("strategy", "bytes_each"), [("DDP", 4.0), ("ZeRO2", 2.0), ("ZeRO3", 2.0 / 8)])
def test_a_reference_takes_as_much_as_what_is_trained(strategy: Strategy, bytes_each: float) -> None:
    placement, full = Placement(strategy, 1, True), Tuning(type="Full")
    without = memory(SHAPE_8B, request(tuning=full, world_size=8), gpu(80), placement)
    kept = memory(SHAPE_8B, request(tuning=full, world_size=8, reference=True), gpu(80), placement)
    assert kept - without == pytest.approx(bytes_each * SHAPE_8B.parameters, rel=1e-6)


def test_a_head_needs_no_logits_for_each_token() -> None:
    tokens = memory(SHAPE_8B, request(), gpu(80), Placement("DDP", 4, True))
    rows = memory(SHAPE_8B, request(head=True), gpu(80), Placement("DDP", 4, True))
    assert tokens - rows == pytest.approx(10 * 4 * 2048 * SHAPE_8B.vocab_size)


@pytest.mark.parametrize("gib", [16, 24, 80])
@pytest.mark.parametrize("tuning", ["LoRA", "QLoRA", "Full", "Freeze"])
def test_what_is_explained_is_what_is_estimated(tuning: str, gib: int) -> None:
    wanted = request(tuning=Tuning(type=tuning), offload="Auto")
    found = explain(SHAPE_8B, wanted, gpu(gib))
    plan = size(SHAPE_8B, wanted, gpu(gib))
    assert found.sizing == plan
    assert sum(term.bytes for term in found.terms) == plan.memory_per_gpu
    assert found.placement == Placement(plan.strategy, plan.micro_batch_size, plan.gradient_checkpointing, plan.offload)


def test_what_does_not_fit_is_explained_too() -> None:
    found = explain(SHAPE_8B, request(tuning=Tuning(type="Full"), strategy="DDP"), gpu(24))
    assert found.sizing is None
    assert sum(term.bytes for term in found.terms) > found.budget
    assert [other.placement.checkpointing for other in found.others] == [False]


def test_the_other_ways_are_told_with_their_reason() -> None:
    found = explain(SHAPE_8B, request(), gpu(24))
    told = {(other.placement.strategy, other.placement.checkpointing): other.why_not for other in found.others}
    assert found.placement.strategy == "DDP"
    assert told["DDP", False] == "does not fit at micro-batch 1"
    assert told["ZeRO3", True] == "fits too, and is slower"
    assert len(told) == 7


def test_offloading_is_chosen_only_where_it_may_be_and_nothing_else_fits() -> None:
    full = request(tuning=Tuning(type="Full"), world_size=2)
    with pytest.raises(DoesNotFit, match=r"distribution\.offload Auto would fit"):
        size(SHAPE_8B, full.model_copy(update={"tuning": Tuning(type="Full")}), gpu(48))
    plan = size(SHAPE_8B, full.model_copy(update={"offload": "Auto"}), gpu(48))
    assert (plan.strategy, plan.offload) == ("ZeRO2", "Optimizer")
    assert size(SHAPE_8B, request(offload="Auto"), gpu(80)).offload == "None"


def test_one_rank_offloads_to_its_host() -> None:
    alone = request(tuning=Tuning(type="Full"), world_size=1, offload="Optimizer")
    assert size(SHAPE_8B, alone, gpu(80)).strategy == "ZeRO2"
