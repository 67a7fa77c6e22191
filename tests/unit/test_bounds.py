"""Numbers and times from outside are bounded where they are parsed."""

import datetime
import importlib
import json
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

import finetune_api
from finetune_api.bounds import EARLIEST, LATEST, MOST, instant, later, parse_time, shown, whole
from finetune_api.crd import crds
from finetune_api.failures import FineTuneError, TerminationMessage
from finetune_api.jobstatus import Attempt
from finetune_api.model import ApiModel, problems_of
from finetune_api.modelfiles import model_shape, parse_config, parse_header
from finetune_api.profile import Accelerator, Budget
from finetune_api.tuning import Tuning
from finetune_operator import essentials
from finetune_operator.connection import parsed

UTC = datetime.UTC


def models() -> list[type[ApiModel]]:
    for module in pkgutil.iter_modules(finetune_api.__path__):
        importlib.import_module(f"finetune_api.{module.name}")
    found, rest = [], [ApiModel]
    while rest:
        found += (
            subclasses := [one for one in rest.pop().__subclasses__() if one.__module__.startswith("finetune_api")]
        )
        rest += subclasses
    return found


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(inner)


@pytest.mark.parametrize("model", models(), ids=lambda model: model.__name__)
def test_every_whole_number_of_every_model_has_bounds(model: type[ApiModel]) -> None:
    for node in nodes(TypeAdapter(model).json_schema()):
        if node.get("type") == "integer":
            assert node["maximum"] <= MOST
            assert node["minimum"] >= -MOST
    assert model.model_config["allow_inf_nan"] is False


@pytest.mark.parametrize("crd", crds(), ids=lambda crd: crd["metadata"]["name"])
def test_an_api_server_takes_no_number_beyond_them(crd: dict[str, Any]) -> None:
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    assert all("maximum" in node and "minimum" in node for node in nodes(schema) if node.get("type") == "integer")


@pytest.mark.parametrize(
    "number", [MOST + 1, 2**63, 10**400, -(10**400), 10**5000], ids=lambda number: f"{number.bit_length()} bits"
)
def test_what_is_out_of_bounds_is_told_with_its_field(number: int) -> None:
    with pytest.raises(ValidationError) as refused:
        Attempt.model_validate({"number": number, "job": "j-0"})
    [problem] = problems_of(refused.value)
    assert problem.path == ("number",)
    assert str(problem).startswith(f"number: found a number of {number.bit_length()} bits; input should be")


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+14:00", "1969-12-31T23:59:59Z", "9999-12-31T23:59:59-12:00"])
def test_a_time_of_another_age_is_refused_in_a_model_and_moved_in_an_object(time: str) -> None:
    with pytest.raises(ValidationError, match="it must lie between the years 1970 and 3000"):
        Attempt.model_validate({"number": 0, "job": "j", "startTime": time})
    assert parse_time(time) in (EARLIEST, LATEST)


def test_a_time_without_a_zone_is_utc() -> None:
    attempt = Attempt.model_validate({"number": 0, "job": "j", "startTime": "2026-03-01T12:00:00"})
    assert attempt.start_time == datetime.datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert attempt.to_json()["startTime"] == "2026-03-01T12:00:00Z"


@given(st.datetimes(timezones=st.timezones() | st.none()), st.floats(min_value=0))
def test_no_time_overflows(time: datetime.datetime, seconds: float) -> None:
    found = parse_time(time.isoformat())
    assert found.tzinfo is UTC
    for reached in (later(found, seconds), found + datetime.timedelta(days=365 * 100)):
        assert (reached - EARLIEST).total_seconds() >= -86_400
    assert later(found, seconds) <= LATEST


@given(st.floats() | st.integers() | st.text() | st.none() | st.booleans())
def test_a_count_is_a_count(value: object) -> None:
    known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST
    if known:
        assert whole(value) == value
        return
    with pytest.raises(ValueError, match="it must be a whole number of 0 to 2\\^53"):
        whole(value)
    assert shown(value)


@pytest.mark.parametrize("text", ["9" * 30 + "Ti", "8.1Pi", "9007199254740994"])
def test_a_quantity_beyond_what_is_counted_in_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="it must be at most 8Pi"):
        Accelerator(memory=text)
    assert Accelerator(memory="8Pi")


@pytest.mark.parametrize("hours", [float("inf"), float("nan"), 1e300])
def test_a_budget_has_an_end(hours: float) -> None:
    with pytest.raises(ValidationError):
        Budget(gpu_hours=hours)


CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 8}
HEADER = {"model.layers.0.q_proj.weight": {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 16384]}}


def read(config: dict[str, Any], header: dict[str, Any], size: int = 16384) -> None:
    data = json.dumps(header).encode()
    tensors = parse_header(data, 8 + len(data) + size, "s3://m/model.safetensors")
    model_shape(
        parse_config(json.dumps(config).encode(), "s3://m/config.json"), tensors, Tuning(), "s3://m/config.json"
    )


ODD = [10**400, -1, -(10**400), 2**31, 0]


@pytest.mark.parametrize("value", ODD, ids=["huge", "negative", "huge and negative", "too large", "zero"])
@pytest.mark.parametrize(
    "field", ["head_dim", "intermediate_size", "n_inner", "num_hidden_layers", "hidden_size", "num_key_value_heads"]
)
def test_a_number_of_config_json_ends_as_model_invalid_with_field_and_range(field: str, value: int) -> None:
    read(CONFIG, HEADER)
    with pytest.raises(FineTuneError) as refused:
        read(CONFIG | {field: value}, HEADER)
    assert refused.value.reason == "ModelInvalid"
    assert f"s3://m/config.json: `{field}` must be a whole number of 1 to 2,147,483,647; found" in str(refused.value)


def test_numbers_that_are_too_large_together_end_so_too() -> None:
    with pytest.raises(
        FineTuneError, match="the model's files describe no model: key_value_size: found a number of 62"
    ):
        read(CONFIG | {"head_dim": 2**31 - 1, "num_key_value_heads": 2**31 - 1}, HEADER)


@pytest.mark.parametrize(
    "shape",
    [[10**400, 1], [2**53, 2**53], [1] * 65, [-1, -16384], [2**53, 0, 10**20]],
    ids=lambda shape: str(shape)[:9],
)
def test_a_tensor_has_a_size(shape: list[int]) -> None:
    odd = {"x.weight": {"dtype": "F8", "shape": shape, "data_offsets": [16384, 16384]}}
    with pytest.raises(FineTuneError, match=r"the tensor x\.weight has a broken entry in the safetensors header"):
        read(CONFIG, HEADER | odd)


def test_figures_that_are_no_numbers_cost_no_message() -> None:
    result = {"uri": "s3://abc/x", "manifestSHA256": "a" * 64, "sizeBytes": 1}
    said = TerminationMessage.model_validate({"result": result | {"metrics": {"a": float("nan"), "b": 1.0}}})
    assert said.result
    assert said.result.metrics == {"b": 1.0}
    assert TerminationMessage(message="a\ud800b").message == "a?b"


def test_what_an_api_server_nests_deeper_than_python_reads_is_read() -> None:
    depth = 10_000
    found = parsed(essentials.whole, b'{"items":[' + b'{"a":' * depth + b"1" + b"}" * depth + b"]}")
    assert found["items"][0]["a"]
    with pytest.raises(RecursionError):
        parsed(essentials.whole, b"[" * 100_000 + b"]" * 100_000)
    assert instant(datetime.datetime(2026, 1, 1)).tzinfo is UTC
