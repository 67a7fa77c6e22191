"""What is wrong with a job's inputs ends prepare in one sentence that names field, key or line."""

import gzip
import io
import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import RunConfig
from finetune_trainer.data import readers
from finetune_trainer.prepare import prepare
from support.runs import make_run_config
from support.s3 import S3, running_s3
from support.tiny import make_tiny_model

pytestmark = pytest.mark.integration
DATA = "s3://bucket/data/pairs.jsonl"
MODEL = "s3://bucket/models/broken/"
GOOD = "".join(json.dumps({"prompt": f"q {i}", "completion": f"a {i}"}) + "\n" for i in range(10)).encode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = make_tiny_model(tmp_path_factory.mktemp("model"))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def s3(model: dict[str, bytes]) -> Iterator[S3]:
    with running_s3() as server:
        for name, data in model.items():
            server.put(f"s3://bucket/models/tiny/{name}", data)
        server.put("s3://bucket/good.jsonl", GOOD)
        yield server


@pytest.fixture(autouse=True)
def pod(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FINETUNE_WORK_DIR", str(tmp_path))
    yield
    client = s3.client()
    for prefix in ("out/", "data/", "models/broken/"):
        for key in s3.keys("bucket", prefix):
            client.delete_object(Bucket="bucket", Key=key)


def configured(s3: S3, **spec: Any) -> RunConfig:
    gang = spec.get("distribution", {"workers": 1, "gpusPerWorker": 1})
    return make_run_config(endpoint=s3.endpoint, workers=gang["workers"], processes=gang["gpusPerWorker"], **spec)


def refusal(config: RunConfig) -> FineTuneError:
    with pytest.raises(FineTuneError) as caught:
        prepare(config)
    assert "\n" not in str(caught.value)
    return caught.value


def line(number: int, text: bytes) -> bytes:
    """GOOD with line `number` (from 1) replaced."""
    lines = GOOD.splitlines(keepends=True)
    return b"".join([*lines[: number - 1], text, *lines[number:]])


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 9\n"


def parquet(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


FILES: dict[str, tuple[str, bytes, str]] = {
    "invalid JSON": ("p.jsonl", line(7, b'{"prompt": "x", \n'), "line 7: invalid JSON at column 16"),
    "a list": ("p.jsonl", line(3, b"[1, 2]\n"), "line 3: found a list; each line must be one JSON object"),
    "a wrong type": (
        "p.jsonl", line(4, b'{"prompt": 3, "completion": "x"}\n'), "line 4: `prompt` must be text; found int"),
    "a missing column": ("p.jsonl", line(5, b'{"prompt": "x"}\n'), "line 5: the column 'completion' or .* is missing"),
    "an empty answer": ("p.jsonl", line(6, b'{"prompt": "x", "completion": " "}\n'), "line 6: `completion` is empty"),
    "half a character": ("p.jsonl", line(2, b'{"prompt": "\\ud800", "completion": "x"}\n'), "line 2: .*surrogate"),
    "another encoding": (
        "p.jsonl", line(8, '{"prompt": "ü", "completion": "x"}\n'.encode("latin-1")), "line 8: byte 13 is not UTF-8"),
    "UTF-16": ("p.jsonl", GOOD.decode().encode("utf-16"), "line 1: the file is UTF-16 or UTF-32; it must be UTF-8"),
    "UTF-16 without a mark": ("p.jsonl", GOOD.decode().encode("utf-16-le"), "line 1: the file is UTF-16"),
    "a cut gzip": ("p.jsonl.gz", gzip.compress(GOOD * 50)[:-40], r"line \d+: the compressed data end or break here"),
    "no gzip": ("p.jsonl.gz", GOOD, "line 1: the compressed data end or break here .*[Nn]ot a gzipped file"),
    "a cut zstd": ("p.jsonl.zst", pa.compress(GOOD * 50, "zstd", asbytes=True)[:-9], r"line \d+: the compressed data"),
    "no parquet": ("p.parquet", GOOD, "p.parquet: it is not a readable parquet file"),
    "a short CSV line": ("p.csv", b"prompt,completion\na,b\nc\n", "line 3: found 1 fields; the first line names 2"),
    "a CSV without names": ("p.csv", b"prompt,prompt\na,b\n", "line 1: the first line must name the columns"),
    "an open quote": ("p.csv", b'prompt,completion\n"a,b\n', "line 2: invalid CSV"),
    "a key that stands twice": (
        "p.jsonl", line(4, b'{"prompt": "x", "prompt": "y", "completion": "z"}\n'),
        "line 4: invalid JSON: the key 'prompt' stands twice in one object"),
    "deep nesting": (
        "p.jsonl", line(2, b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"),
        "line 2: invalid JSON: lists and objects lie in more than 64 others"),
    "nesting that only code of ours would fail on": (
        "p.jsonl", line(2, b'{"completion": "x", "prompt": ' + b"[" * 400 + b"]" * 400 + b"}\n"),
        "line 2: invalid JSON: lists and objects lie in more than 64 others"),
    "a bomb of empty lines": (
        "p.jsonl.gz", gzip.compress(GOOD + b"\n" * 2_000_000),
        r"line \d+: [\d,]+ bytes were unpacked to [\d,]+; more than 200 to one are refused"),
    "a bomb in zstd": (
        "p.jsonl.zst", pa.compress(GOOD + b"\n" * 2_000_000, "zstd", asbytes=True), "more than 200 to one are refused"),
    "an endless line": (
        "p.jsonl", line(3, b'{"prompt": "' + b"x" * 200_000), "line 3: the line has more than 100,000 bytes"),
    "an endless line in gzip": (
        "p.jsonl.gz", gzip.compress(b'{"prompt": "' + b"x" * 200_000), "line 1: the line has more than 100,000 bytes"),
    "an endless field of a CSV": (
        "p.csv", b"prompt,completion\na," + b"x" * 200_000, "line 2: the line has more than 100,000 bytes"),
    "a strange role": (
        "p.jsonl", b'{"messages": [{"role": "bot", "content": "x"}]}\n',
        r"line 1: `messages\[0\].role` must be one of system, user, assistant, tool; found 'bot'"),
    "roles out of order": (
        "p.jsonl", b'{"messages": [{"role": "assistant", "content": "x"}]}\n', "roles are out of order: turn 1,"),
    "conversations without an answer": (
        "p.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', "line 1: found no turn of the assistant"),
    "an empty file": ("p.jsonl", b"", "there are no rows"),
    "an empty parquet file": ("p.parquet", b"", "it is not a readable parquet file"),
    "a text that reserves our marks": (
        "p.jsonl", line(2, json.dumps({"prompt": "\ufdd2", "completion": "x"}).encode() + b"\n"), "noncharacter"),
    "no rows": ("p.jsonl", b"\n\n", "there are no rows"),
    "a pointer of Git LFS": ("p.jsonl", LFS, "the file is a pointer of Git LFS; upload the data"),
    "a pointer of Git LFS for parquet": ("p.parquet", LFS, "the file is a pointer of Git LFS; upload the data"),
    "a pretty JSON array": (
        "p.jsonl", json.dumps([{"prompt": "x", "completion": "y"}], indent=1).encode(), "line 1: invalid JSON at"),
    "a JSON array in one line": (
        "p.jsonl", b'[{"prompt": "x", "completion": "y"}]', "line 1: found a list; each line must be one JSON object"),
    "a web page": ("p.jsonl", b"<!DOCTYPE html>\n<html>403</html>\n", "line 1: invalid JSON at column 1"),
    "a zip archive": ("p.jsonl.gz", b"PK\x03\x04" + bytes(60), "line 1: the compressed data end or break here"),
    "a cut parquet file": ("p.parquet", parquet(prompt=["a"] * 99, completion=["b"] * 99)[:-30], "is not a readable"),
    "a parquet file of numbers": (
        "p.parquet", parquet(prompt=[1, 2], completion=["a", "b"]), "row 1: `prompt` must be text; found int"),
    "a parquet file of bytes": (
        "p.parquet", parquet(prompt=[b"a"], completion=["b"]), "row 1: `prompt` must be text; found bytes"),
    "a CSV in UTF-16": ("p.csv", "prompt,completion\na,b\n".encode("utf-16"), "line 1: the file is UTF-16 or UTF-32"),
    "a CSV in Latin-1": (
        "p.csv", "prompt,completion\nü,b\n".encode("latin-1"), "line 2: byte 1 of the line is not UTF-8"),
    "a column without a name": (
        "p.csv", b"prompt,,completion\na,b,c\n", "line 1: the first line must name the columns"),
    "a quote that is never closed": (
        "p.csv", b'prompt,completion\na,"' + b"x\n" * 100_000, "line \\d+: invalid CSV"),
    "nothing where text should be": (
        "p.jsonl", line(3, b'{"prompt": null, "completion": "x"}\n'), "line 3: `prompt` must be text; found NoneType"),
    "a number that is none": (
        "p.jsonl", line(3, b'{"prompt": NaN, "completion": "x"}\n'), "line 3: `prompt` must be text; found float"),
    "a conversation without turns": ("p.jsonl", b'{"messages": []}\n', "line 1: `messages`"),
    "a turn without words": (
        "p.jsonl", b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}\n', "line 1: `messages"),
    "a conversation in one string": ("p.jsonl", b'{"messages": "hello"}\n', "line 1: `messages`"),
    "turns that are strings": ("p.jsonl", b'{"messages": ["hello"]}\n', "line 1: `messages"),
    "an unknown kind": ("p.json", GOOD, "is of no known kind; names end in .jsonl"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "data", "text"), FILES.values(), ids=FILES.keys())
def test_a_bad_file_is_named_with_its_line(
    s3: S3, name: str, data: bytes, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small limits, so that the files that exceed them are small.
    monkeypatch.setattr(readers, "LINE_LIMIT", 300_000 if b"[[" in data else 100_000)
    monkeypatch.setattr(readers, "FREE", 1_000_000)
    s3.put(f"s3://bucket/data/{name}", data)
    s3.put("s3://bucket/out/bot/earlier/adapter", b"precious")
    error = refusal(configured(s3, datasets=[{"name": "pairs", "uri": f"s3://bucket/data/{name}"}]))
    assert error.reason == Reason.DATA_INVALID
    assert str(error).startswith("spec.datasets[0]")
    assert f"s3://bucket/data/{name}" in str(error)
    assert re.search(text, str(error)), str(error)
    # Nothing was published, overwritten or deleted.
    assert [key for key in s3.keys("bucket", "out/") if "/data/train/" not in key] == ["out/bot/earlier/adapter"]


SPECS: dict[str, tuple[dict[str, Any], Reason, str]] = {
    "a missing bucket": (
        {"datasets": [{"name": "p", "uri": "s3://nowhere/x.jsonl"}]}, Reason.STORAGE_DENIED,
        r"spec.datasets\[0\].uri: cannot read s3://nowhere/x.jsonl: .*\(NoSuchBucket\)"),
    "a missing key": (
        {"datasets": [{"name": "p", "uri": "s3://bucket/x.jsonl"}]}, Reason.DATA_INVALID,
        r"spec.datasets\[0\].uri: cannot read s3://bucket/x.jsonl: there is no such object \(NoSuchKey\)"),
    "a denied bucket": (
        {"datasets": [{"name": "p", "uri": "s3://forbidden/x.jsonl"}]}, Reason.STORAGE_DENIED,
        r"spec.datasets\[0\].uri: cannot read s3://forbidden/x.jsonl: .*\(AccessDenied\)"),
    "an empty prefix": (
        {"datasets": [{"name": "p", "uri": "s3://bucket/none/"}]}, Reason.DATA_INVALID, "has nothing below it"),
    "a prefix without its slash": (
        {"datasets": [{"name": "p", "uri": "s3://bucket/models"}]}, Reason.DATA_INVALID,
        "write s3://bucket/models/ to read"),
    "no data in a prefix": (
        {"datasets": [{"name": "p", "uri": "s3://bucket/models/"}]}, Reason.DATA_INVALID,
        "no file of a known kind .*; found s3://bucket/models/tiny/config.json"),
    "an output that is denied": (
        {"output": {"uri": "s3://forbidden/out/"}}, Reason.STORAGE_DENIED,
        r"spec.output.uri: cannot write s3://forbidden/out/bot/.probe-.*\(AccessDenied\)"),
    "an output bucket that is missing": (
        {"output": {"uri": "s3://nowhere/out/"}}, Reason.STORAGE_DENIED, r"spec.output.uri: .*\(NoSuchBucket\)"),
    "a model that is missing": (
        {"baseModel": {"uri": "s3://bucket/models/none/"}}, Reason.MODEL_INVALID,
        "spec.baseModel.uri: there is nothing below s3://bucket/models/none/"),
    "a model's bucket that is missing": (
        {"baseModel": {"uri": "s3://nowhere/m/"}}, Reason.STORAGE_DENIED, r"spec.baseModel.uri: .*\(NoSuchBucket\)"),
    "a target that is missing": (
        {"tuning": {"type": "LoRA", "lora": {"targetModules": ["q_prj"]}}}, Reason.INVALID_SPEC,
        r"spec.tuning.lora.targetModules: found 'q_prj'; .*; did you mean q_proj\?"),
    "a template that cannot be compiled": (
        {"datasets": [{"name": "p", "uri": "s3://bucket/good.jsonl", "template": "{% if %}"}]}, Reason.INVALID_SPEC,
        r"spec.datasets\[0\].template: line 1: "),
    "a template with an unknown column": (
        {"datasets": [{"name": "p", "uri": "s3://bucket/good.jsonl", "template": "{{ q }}"}]}, Reason.DATA_INVALID,
        "line 1: the template failed: 'q' is undefined"),
    "a column that is missing": (
        {"datasets": [{"name": "p", "uri": "s3://bucket/good.jsonl", "format": "Text"}]}, Reason.DATA_INVALID,
        "line 1: the column 'text' is missing; found completion, prompt"),
    "fewer rows than processes": (
        {"distribution": {"workers": 4, "gpusPerWorker": 3}}, Reason.DATA_INVALID,
        "spec.datasets: 10 training examples are left; each of the 12 processes needs one"),
    "too few rows": (
        {"dataPolicy": {"tooLong": "Drop"}, "training": {"maxLength": 8},
         "datasets": [{"name": "p", "uri": "s3://bucket/good.jsonl", "template": "a long prompt, too long"}]},
        Reason.DATA_INVALID, r"0 training examples are left \(10 were left out: .* at most 8 are allowed"),
    "too long": (
        {"dataPolicy": {"tooLong": "Fail"}, "training": {"maxLength": 8},
         "datasets": [{"name": "p", "uri": "s3://bucket/good.jsonl", "template": "a long prompt, too long"}]},
        Reason.DATA_INVALID, r"line 1: \d+ tokens; at most 8 are allowed \(dataPolicy.tooLong is Fail\)"),
    "leakage": (
        {"datasets": [{"name": "p", "uri": "s3://bucket/good.jsonl"}],
         "validation": {"datasets": [{"name": "v", "uri": "s3://bucket/good.jsonl"}]}},
        Reason.DATA_LEAKAGE, r"spec.datasets\[0\]: s3://bucket/good.jsonl line 1 is in the validation data too"),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "reason", "text"), SPECS.values(), ids=SPECS.keys())
def test_a_bad_reference_is_named_with_its_field(s3: S3, spec: dict[str, Any], reason: Reason, text: str) -> None:
    error = refusal(configured(s3, **({"datasets": [{"name": "p", "uri": "s3://bucket/good.jsonl"}]} | spec)))
    assert re.search(text, str(error)), str(error)
    assert error.reason == reason


def test_duplicates_can_fail_the_job(s3: S3) -> None:
    s3.put(DATA, GOOD + GOOD.splitlines(keepends=True)[2].replace(b"q 2", b" q  2"))
    error = refusal(configured(s3, dataPolicy={"duplicates": "Fail"}))
    assert str(error) == (
        f"spec.datasets[0]: {DATA} line 11 has the content of an earlier row (dataPolicy.duplicates is Fail)"
    )


def test_columns_that_fit_two_formats_are_not_guessed(s3: S3) -> None:
    s3.put(DATA, b'{"instruction": "a", "input": "", "output": "b", "text": "c"}\n')
    error = refusal(configured(s3))
    assert re.search(r"spec.datasets\[0\].format: .*which fit Instruction and Text; set format to", str(error)), str(
        error
    )


def test_columns_that_fit_no_format_are_told(s3: S3) -> None:
    s3.put("s3://bucket/data/pairs.csv", b"prompt;completion\na;b\n")
    error = refusal(configured(s3, datasets=[{"name": "pairs", "uri": "s3://bucket/data/pairs.csv"}]))
    assert str(error).startswith("spec.datasets[0].format: found the columns prompt;completion, which fit no format")


Change = Callable[[dict[str, bytes]], dict[str, bytes]]


def with_config(**fields: Any) -> Change:
    def change(files: dict[str, bytes]) -> dict[str, bytes]:
        return files | {"config.json": json.dumps(json.loads(files["config.json"]) | fields).encode()}

    return change


def with_header(edit: Callable[[dict[str, Any]], None]) -> Change:
    def change(files: dict[str, bytes]) -> dict[str, bytes]:
        data = files["model.safetensors"]
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        edit(header)
        new = json.dumps(header).encode()
        return files | {"model.safetensors": struct.pack("<Q", len(new)) + new + data[8 + length :]}

    return change


def without(name: str, **others: bytes) -> Change:
    return lambda files: {key: data for key, data in files.items() if key != name} | others


def as_index(names: list[str]) -> Change:
    index = json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(names)}}).encode()
    return lambda files: files | {"model.safetensors.index.json": index}


def _move(header: dict[str, Any]) -> None:
    entry = header["model.norm.weight"]
    entry["data_offsets"] = [entry["data_offsets"][0] + 4, entry["data_offsets"][1] + 4]


MODELS: dict[str, tuple[Change, str]] = {
    "no config": (without("config.json"), "has no config.json; found model.safetensors, tokenizer.json"),
    "a config that is no JSON": (lambda f: f | {"config.json": b"{"}, "config.json: it is not valid JSON"),
    "a config that is a list": (lambda f: f | {"config.json": b"[]"}, "config.json: it must be one JSON object"),
    "code of its own": (with_config(auto_map={"AutoModel": "x.Y"}), "`auto_map` asks to run the model's own code"),
    "code of a part": (
        with_config(text_config={"auto_map": {"AutoModel": "x.Y"}}), "`text_config.auto_map` asks to run the"),
    "an attention of its own": (
        with_config(_attn_implementation_internal="org/kernel"), "`_attn_implementation_internal` names an"),
    "a key that nobody knows": (with_config(extra_files=["a.py"]), "found the key `extra_files`, which no"),
    "code of a tokenizer": (
        lambda f: f | {"tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["x.Y", null]}}'},
        "tokenizer_config.json: `auto_map` asks to run the model's own code"),
    "code of a generation": (
        lambda f: f | {"generation_config.json": b'{"custom_generate": "org/code"}'},
        "generation_config.json: `custom_generate` asks to run"),
    "a shard elsewhere": (as_index(["../../x.safetensors"]), "names '../../x.safetensors'; a shard is a .safetensors"),
    "a shard that is a pickle": (as_index(["pytorch_model.bin"]), "names 'pytorch_model.bin'; a shard is a"),
    "an encoder": (with_config(architectures=["BertModel"]), "found the architecture BertModel"),
    "no architecture": (with_config(architectures=None), "`architectures` is missing"),
    "no width": (
        with_config(hidden_size="big"), "`hidden_size` must be a whole number of 1 to 2,147,483,647; found 'big'"),
    "quantised weights": (with_config(quantization_config={}), "the weights are quantised already"),
    "a smaller vocabulary": (with_config(vocab_size=100), "tokenizer.json has token .*vocab_size is 100"),
    "no tokenizer": (without("tokenizer.json"), "has no tokenizer.json"),
    "a broken tokenizer": (lambda f: f | {"tokenizer.json": b'{"model": 1}'}, "tokenizer.json cannot be loaded: "),
    "pickles": (without("model.safetensors", **{"pytorch_model.bin": b"x"}), "pytorch_model.bin: safetensors only"),
    "no weights": (without("model.safetensors"), "has no model.safetensors and no model.safetensors.index.json"),
    "a shard that is missing": (as_index(["model-1.safetensors"]), "names model-1.safetensors, which does not exist"),
    "an index that is none": (
        lambda f: f | {"model.safetensors.index.json": b"[]"}, "is not an index of safetensors files"),
    "weights that are cut off": (
        lambda f: f | {"model.safetensors": f["model.safetensors"][:-100]}, "model.safetensors: .*it is cut off"),
    "weights that are a pointer of Git LFS": (
        lambda f: f | {"model.safetensors": LFS}, "model.safetensors is a pointer of Git LFS; upload the file that it"),
    "weights that are none": (lambda f: f | {"model.safetensors": b"\xff" * 64}, "is not a safetensors file"),
    "overlapping tensors": (with_header(_move), "do not follow each other without a gap"),
    "an embedding of another size": (
        with_config(hidden_size=16), r"model.embed_tokens.weight has the shape \[.*, 32\]; .*say \[.*, 16\]"),
    "no positive size": (
        with_config(num_hidden_layers=0),
        "`num_hidden_layers` must be a whole number of 1 to 2,147,483,647; found 0"),
    "weights of integers": (
        with_header(lambda h: [entry.update(dtype="I32") for name, entry in h.items() if name != "__metadata__"]),
        "found weights of type I32; BF16, F16 and F32 are supported"),
    "a header that is no JSON": (
        lambda f: f | {"model.safetensors": struct.pack("<Q", 8) + b"{{{{{{{{" + f["model.safetensors"]},
        "its safetensors header"),
    "tokeniser settings that are a list": (
        lambda f: f | {"tokenizer_config.json": b"[]"}, "tokenizer_config.json must be one JSON object"),
    "a broken entry": (
        with_header(lambda h: h["lm_head.weight"].update(shape=[-1, 4])), "lm_head.weight has a broken entry"),
    "a broken chat template": (
        lambda f: f | {"chat_template.jinja": b"{% for %}"}, "the chat template cannot be compiled: line 1"),
    "no end of sequence": (
        lambda f: with_config(eos_token_id=None)(f) | {"tokenizer_config.json": b"{}"}, "no end-of-sequence token"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "text"), MODELS.values(), ids=MODELS.keys())
def test_a_bad_model_is_named_with_its_file(s3: S3, model: dict[str, bytes], change: Change, text: str) -> None:
    for name, data in change(model).items():
        s3.put(f"{MODEL}{name}", data)
    error = refusal(configured(s3, baseModel={"uri": MODEL}, datasets=[{"name": "p", "uri": "s3://bucket/good.jsonl"}]))
    assert error.reason == Reason.MODEL_INVALID
    assert str(error).startswith("spec.baseModel.uri: ")
    assert re.search(text, str(error)), str(error)
