"""Whatever one object says, nothing about it leaves it: all else is read, planned, settled and measured."""

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_api.failures import FineTuneError, TerminationMessage
from finetune_api.modelfiles import FIELDS, model_shape, parse_config, parse_header
from finetune_api.shape import Device, ModelShape, Request
from finetune_api.sizing import DoesNotFit, explain, gpu_hours, size
from finetune_api.tuning import Tuning
from finetune_operator.progress import parse
from finetune_operator.progress_auth import Refused
from finetune_operator.progress_state import JobKey, ProgressBook
from finetune_operator.progress_writer import as_patch
from finetune_operator.reconcile import utc_now
from finetune_operator.review import Malformed, judge_job, judge_profile
from finetune_operator.review import Request as Review
from support.poison import ANYTHING, NUMBERS, PLACES, Change, changes, dumped, put, values, wrecked
from support.tally import Tally
from support.town import Town, honest, lived_through, stages

pytestmark = pytest.mark.faults
READING = (ValidationError, KeyError, TypeError, AttributeError, ValueError, RecursionError)
"""What an object that cannot be read may raise, within itself. Nothing else may: no arithmetic overflows, nothing
recurses without end, and nothing that could be read is then stumbled upon."""
FAMILIES = {
    "jobs": ("FineTuneJob",),
    "children": ("Job", "Pod"),
    "messages": ("message",),
    "profiles": ("FineTuneProfile",),
    "everything": ("FineTuneJob", "Job", "Pod", "message", "FineTuneProfile"),
}
SMALL, WHOLE = 150, 20_000
"""Cases of each family, of which there are five."""


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def run_many(whole: bool) -> Any:
    return settings(
        max_examples=WHOLE if whole else SMALL,
        # The sample is the same each time; what is new is for the long form to find.
        derandomize=not whole,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.timeout(7200)
def test_nothing_leaves_the_object_that_says_it(
    family: str, whole: bool, tally: Tally, tmp_path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    logging.getLogger("finetune_operator").setLevel(logging.CRITICAL)
    neighbour = loop.run_until_complete(honest())
    lives = loop.run_until_complete(stages())
    seen = 0

    @run_many(whole)
    @given(st.sampled_from(lives), changes(FAMILIES[family]))
    def check(stage: Any, made: list[Change]) -> None:
        nonlocal seen
        seen += 1
        town = Town(wrecked(stage, made), wrecked(neighbour, []))
        operator, told = loop.run_until_complete(lived_through(town, tmp_path))
        for where, namespace, name, error in operator.errors:
            assert isinstance(error, READING), f"{where} {namespace}/{name}: {error!r}"
            assert not isinstance(error, AssertionError)
            assert (namespace, name) != ("honest", "bot"), f"{where}: {error!r}"
        status = town.objects["FineTuneJob", "honest", "bot"]["status"]
        assert status["state"] == "Running"
        assert 'finetune_operator_job_step{job_name="bot",job_namespace="honest"} 7.0' in told
        assert 'finetune_operator_budget_gpu_hours{job_namespace="honest",profile="honest"} 1000.0' in told
        assert "honest/honest" in town.settled

    check()
    tally.count(f"poison: {family}", dict.fromkeys(map(str, range(seen)), ""))


def shapes() -> st.SearchStrategy[dict[str, Any]]:
    schema = ModelShape.model_json_schema(by_alias=True)["properties"]
    sound = {
        name: st.one_of(st.integers(0, 2**53), NUMBERS) for name, one in schema.items() if one["type"] == "integer"
    }
    return st.fixed_dictionaries(sound | {"architecture": st.just("X"), "dtype": st.just("BFloat16")})


TUNINGS = st.sampled_from(["LoRA", "QLoRA", "DoRA", "IA3", "PromptTuning", "PrefixTuning", "Freeze", "Full"])


def test_every_shape_that_is_one_can_be_sized(whole: bool, tally: Tally) -> None:
    seen = 0

    @run_many(whole)
    @given(shapes(), TUNINGS, st.integers(0, 2**53), st.sampled_from([1, 2, 7, 65536]), st.floats(5e-324, 100_000))
    def check(raw: dict[str, Any], tuning: Any, memory: int, world: int, tflops: float) -> None:
        nonlocal seen
        seen += 1
        try:
            shape = ModelShape.model_validate(raw)
        except ValidationError:
            return
        how = Tuning(type=tuning)
        request = Request(
            tuning=how, sequence_length=4_194_304, global_batch_size=world * 64, world_size=world, offload="Auto"
        )
        device = Device(kind="CUDA", memory_bytes=memory)
        hours = gpu_hours(shape, how, 2**53 * 1000, tflops)
        assert 0 <= hours <= 2**53
        explain(shape, request, device)
        try:
            json.dumps(size(shape, request, device).to_json(), allow_nan=False)
        except DoesNotFit:
            return

    check()
    tally.count("poison: sizing", dict.fromkeys(map(str, range(seen)), ""))


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
NAMES = sorted({*CONFIG, *(name for names in FIELDS.values() for name in names), "n_inner", "ffn_dim"})
HEADER = {
    "model.layers.0.self_attn.q_proj.weight": {"dtype": "BF16", "shape": [64, 64], "data_offsets": [0, 8192]},
    "model.embed_tokens.weight": {"dtype": "BF16", "shape": [100, 64], "data_offsets": [8192, 20992]},
}
ENTRIES = [(name, *path) for name in HEADER for path in ((), ("dtype",), ("shape",), ("shape", 0), ("data_offsets", 1))]


def test_a_models_files_end_as_a_sentence_or_as_a_shape(whole: bool, tally: Tally) -> None:
    seen = 0

    @run_many(whole)
    @given(
        st.lists(st.tuples(st.sampled_from(NAMES), ANYTHING), max_size=3),
        st.lists(st.tuples(st.sampled_from(ENTRIES), ANYTHING), max_size=2),
        TUNINGS,
    )
    def check(fields: list[tuple[str, Any]], entries: list[tuple[Any, Any]], tuning: Any) -> None:
        nonlocal seen
        seen += 1
        config, header = dict(CONFIG), dict(HEADER)
        for name, value in fields:
            config = put(config, (name,), value)
        for path, value in entries:
            header = put(header, path, value)
        data = dumped(header).encode()
        try:
            known = parse_config(dumped(config).encode(), "s3://m/config.json")
            tensors = parse_header(data, 8 + len(data) + 20992, "s3://m/model.safetensors")
            shape = model_shape(known, tensors, Tuning(type=tuning), "s3://m/")
        except FineTuneError as refusal:
            found = refusal
        else:
            assert ModelShape.model_validate(shape.model_dump()) == shape
            return
        assert found.reason in ("ModelInvalid", "InvalidSpec")
        assert len(str(found)) < 20_000

    check()
    tally.count("poison: models", dict.fromkeys(map(str, range(seen)), ""))


MESSAGES = st.lists(
    st.sampled_from(PLACES["message"]).flatmap(lambda p: st.tuples(st.just(p.path), values(p.schema))), max_size=4
)


def test_a_termination_message_is_one_or_is_none(whole: bool, tally: Tally) -> None:
    seen = 0

    @run_many(whole)
    @given(MESSAGES)
    def check(made: list[tuple[Any, Any]]) -> None:
        nonlocal seen
        seen += 1
        raw: Any = {"reason": "RankFailed"}
        for path, value in made:
            raw = put(raw, path, value)
        if message := TerminationMessage.decode(dumped(raw)):
            assert len(message.encode()) <= 4096
            assert TerminationMessage.decode(message.encode().decode()) is not None

    check()
    tally.count("poison: messages alone", dict.fromkeys(map(str, range(seen)), ""))


REPORTS = [place for place in PLACES["FineTuneJob"] if place.path[:2] == ("status", "trainerStatus")]
NEXT = st.sampled_from(REPORTS).flatmap(lambda p: st.tuples(st.just(p.path[1:]), values(p.schema)))


def test_a_report_is_refused_or_can_be_written(whole: bool, tally: Tally) -> None:
    seen = 0

    @run_many(whole)
    @given(st.lists(st.lists(NEXT, max_size=4), min_size=1, max_size=4))
    def check(reports: list[list[tuple[Any, Any]]]) -> None:
        nonlocal seen
        seen += 1
        book, key = ProgressBook(5.0), JobKey("n", "j")
        for second, made in enumerate(reports):
            raw: Any = {"trainerStatus": {"step": 3 * second, "totalSteps": 2**53}}
            for path, value in made:
                raw = put(raw, path, value)
            try:
                report = parse(dumped(raw).encode(), 1.8e9)
            except Refused:
                continue
            book.accept(key, "uid", 0, report, float(second))
        for write in book.due(100.0):
            patch = as_patch(write.status)
            json.dumps(patch, allow_nan=False)
            type(write.status).model_validate(patch)  # as the API server's schema does

    check()
    tally.count("poison: reports", dict.fromkeys(map(str, range(seen)), ""))


def test_a_review_is_malformed_or_has_an_answer(whole: bool, tally: Tally, loop: asyncio.AbstractEventLoop) -> None:
    seen = 0
    [stage] = [one for one in loop.run_until_complete(stages()) if one.name == "new"]

    @run_many(whole)
    @given(changes(("FineTuneJob", "FineTuneProfile")))
    def check(made: list[Change]) -> None:
        nonlocal seen
        seen += 1
        found = wrecked(stage, made)
        for kind in ("FineTuneJob", "FineTuneProfile"):
            [one] = found[kind]
            body = {"request": {"uid": "u", "kind": {"kind": kind}, "operation": "CREATE", "namespace": "team-a"}}
            try:
                review = Review.read(put(body, ("request", "object"), one))
                judge_profile(review) if kind == "FineTuneProfile" else judge_job(
                    review, found["FineTuneProfile"], utc_now()
                )
            except Malformed:
                continue

    check()
    tally.count("poison: reviews", dict.fromkeys(map(str, range(seen)), ""))
