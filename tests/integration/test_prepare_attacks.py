"""Files that are made to break a library, to run for ever or to fill the memory: each is refused by its name."""

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

from finetune_api.failures import OUTCOMES, FineTuneError, Reason
from finetune_api.run import RunConfig
from finetune_trainer.data import readers, sources
from finetune_trainer.prepare import prepare
from support.runs import make_run_config
from support.s3 import S3, running_s3
from support.tiny import make_tiny_model

pytestmark = pytest.mark.integration
MODEL = "s3://bucket/models/broken/"
GOOD = "".join(json.dumps({"prompt": f"q {i}", "completion": f"a {i}"}) + "\n" for i in range(10)).encode()
TREE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"


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


def refused(s3: S3, reason: Reason, text: str, **spec: Any) -> None:
    with pytest.raises(FineTuneError) as caught:
        prepare(configured(s3, **spec))
    said = str(caught.value)
    assert re.search(text, said), said
    assert caught.value.reason == reason, said
    assert reason not in OUTCOMES, "a job that cannot work is not tried again"
    assert not re.search("[\x00-\x1f\ud800-\udfff]", said)
    assert len(said) <= 2048


def configured(s3: S3, **spec: Any) -> RunConfig:
    return make_run_config(
        endpoint=s3.endpoint, **({"datasets": [{"name": "p", "uri": "s3://bucket/good.jsonl"}]} | spec)
    )


Change = Callable[[dict[str, bytes]], dict[str, bytes]]


def with_json(name: str, **fields: Any) -> Change:
    def change(files: dict[str, bytes]) -> dict[str, bytes]:
        return files | {name: json.dumps(json.loads(files[name]) | fields).encode()}

    return change


def with_config(**fields: Any) -> Change:
    return with_json("config.json", **fields)


def with_tokenizer(**fields: Any) -> Change:
    return with_json("tokenizer.json", **fields)


def with_header(header: bytes, length: int | None = None) -> Change:
    size = len(header) if length is None else length
    return lambda files: files | {"model.safetensors": struct.pack("<Q", size) + header + bytes(64)}


def replacing(*pairs: tuple[dict[str, str], str]) -> dict[str, Any]:
    steps = [{"type": "Replace", "pattern": pattern, "content": content} for pattern, content in pairs]
    return {"type": "Sequence", "normalizers": steps}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def splitting(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTES]}


def with_added(*contents: str) -> Change:
    def change(files: dict[str, bytes]) -> dict[str, bytes]:
        tokenizer = json.loads(files["tokenizer.json"])
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = [{"id": 10_000 + number, "content": text, **flags} for number, text in enumerate(contents)]
        tokenizer["added_tokens"] += added
        return files | {"tokenizer.json": json.dumps(tokenizer).encode()}

    return change


def with_merges(files: dict[str, bytes]) -> dict[str, bytes]:
    tokenizer = json.loads(files["tokenizer.json"])
    tokenizer["model"]["merges"] = [["nowhere", "to be found"]]
    return files | {"tokenizer.json": json.dumps(tokenizer).encode()}


def raw(name: str, data: bytes) -> Change:
    return lambda files: files | {name: data}


def numbered(name: str, number: str) -> Change:
    """config.json with a number that Python's JSON would not write."""

    def change(files: dict[str, bytes]) -> dict[str, bytes]:
        text = json.dumps(json.loads(files["config.json"]) | {name: "HERE"})
        return files | {"config.json": text.replace('"HERE"', number).encode()}

    return change


DEEP = b'{"a": ' * 100_000 + b"1" + b"}" * 100_000
MODELS: dict[str, tuple[Change, str]] = {
    "a normalizer that makes a gigabyte of a letter": (
        with_tokenizer(normalizer=replacing(*[({"String": "e"}, "e" * 1000)] * 3)),
        r"tokenizer.json cannot encode short texts: (it takes more than|a library ended the process)"),
    "a normalizer that makes a gigabyte of anything": (
        with_tokenizer(normalizer=replacing(*[({"Regex": "."}, "e" * 1000)] * 3)),
        r"tokenizer.json cannot encode short texts: (it takes more than|a library ended the process)"),
    "a normalizer that makes much of a letter": (
        with_tokenizer(normalizer=replacing(({"String": "e"}, "e" * 10_000))),
        r"tokenizer.json makes [\d,]+ tokens of [\d,]+ characters"),
    "a pattern that looks back without end": (
        with_tokenizer(pre_tokenizer=splitting("(a+)+(a+)+(a+)+(a+)+(a+)+$")),
        "tokenizer.json cannot encode short texts"),
    "a pattern that is none": (with_tokenizer(pre_tokenizer=splitting("(((")), "tokenizer.json cannot be loaded"),
    "a post-processor that adds without end": (
        with_tokenizer(post_processor={
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 5000,
            "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * 100, "tokens": ["<s>"] * 100}}}),
        "tokenizer.json (makes [\\d,]+ tokens of|cannot)"),
    "merges of tokens that are missing": (with_merges, "tokenizer.json cannot be loaded"),
    "a hundred thousand tokens more": (with_added(*(f"t{i}" for i in range(100_000))), "tokenizer.json has token"),
    "a tokenizer of a wrong shape": (raw("tokenizer.json", b"[]"), "tokenizer.json cannot be loaded"),
    "a tokenizer that is deep": (raw("tokenizer.json", DEEP), "tokenizer.json cannot be loaded"),
    "a config that is deep": (raw("config.json", DEEP), "config.json: it is not valid JSON"),
    "an index that is deep": (raw("model.safetensors.index.json", DEEP), "is not an index of safetensors files"),
    "settings that are deep": (raw("tokenizer_config.json", DEEP), "tokenizer_config.json is not valid JSON"),
    "a negative width of a head": (with_config(head_dim=-8), "`head_dim` must be a whole number from 1 to .*found -8"),
    "a width of a head of 400 digits": (with_config(head_dim=10**400), "`head_dim` must be a (whole|finite) number"),
    "a vocabulary of 400 digits": (with_config(vocab_size=10**400), "`vocab_size` must be a (whole|finite) number"),
    "a width of 5,000 digits": (numbered("hidden_size", "1" * 5000), "config.json: it is not valid JSON"),
    "layers without end": (
        with_config(num_hidden_layers=10**400), "`num_hidden_layers` must be a (whole|finite) number"),
    "a billion of layers": (
        with_config(num_hidden_layers=10**9), "config.json says that there are 1000000000 layers; the weights have 2"),
    "a width that is a truth value": (with_config(hidden_size=True), "`hidden_size` must be a whole number"),
    "a width that is NaN": (numbered("hidden_size", "NaN"), "`hidden_size` must be a whole number"),
    "a width that is infinite": (numbered("hidden_size", "1e999"), "`hidden_size` must be a whole number"),
    "a base that is NaN": (numbered("rope_theta", "NaN"), "`rope_theta` must be a finite number; found nan"),
    "an epsilon that is a text": (with_config(rms_norm_eps="small"), "`rms_norm_eps` must be a number; found 'small'"),
    "a flag that is a text": (with_config(tie_word_embeddings="no"), "`tie_word_embeddings` must be true or false"),
    "heads that cannot be shared": (with_config(num_key_value_heads=3), "it must divide `num_attention_heads`"),
    "a padding beyond the vocabulary": (with_config(pad_token_id=10**6), "`pad_token_id` must be a token below"),
    "settings of generation without end": (
        raw("generation_config.json", b'{"max_length": 1' + b"0" * 400 + b"}"),
        "generation_config.json: `max_length` must be a finite number"),
    "settings of generation that are a list": (raw("generation_config.json", b"[1]"), "must be one JSON object"),
    "a chat template that is a number": (
        with_json("tokenizer_config.json", chat_template=5), "`chat_template` must be a text, or a list .*found 5"),
    "an end that is a list": (with_json("tokenizer_config.json", eos_token=[1]), "`eos_token` must be a text"),
    "a family of half characters": (
        with_config(architectures=["\ud800ForCausalLM"]), "the model's files describe no model: architecture: found"),
    "an end of half a character": (
        with_json("tokenizer_config.json", eos_token="\ud800"),
        "tokenizer_config.json has half of a surrogate pair, which is no character"),
    "a chat template of half a character": (
        with_json("tokenizer_config.json", chat_template="\udfff{{ messages }}"),
        "tokenizer_config.json has half of a surrogate pair"),
    "a chat template that calls itself twice": (
        raw("chat_template.jinja", TREE.encode()),
        r"the template failed: it takes more than 200,000 steps .*the model's chat template.*, on a question"),
    "a chat template of 3,000 parentheses": (
        raw("chat_template.jinja", b"{{ " + b"(" * 3000 + b"1" + b")" * 3000 + b" }}"),
        "the chat template cannot be compiled: its parentheses, lists or blocks lie too deep"),
    "a chat template without end": (
        raw("chat_template.jinja", b"x" * 300_000), "it has 300,000 characters; at most 262,144 are allowed"),
    "a chat template in Latin-1": (raw("chat_template.jinja", b"\xfc"), "chat_template.jinja: byte 1 is not UTF-8"),
    "an end that is a huge number": (
        lambda f: with_config(eos_token_id=-(2**70))(with_json("tokenizer_config.json", eos_token=None)(f)),
        "`eos_token_id` must be a finite number"),
    "a header that says it is large": (
        with_header(b"{}", 2**62), "its header would have 4,611,686,018,427,387,904 bytes"),
    "a header that is deep": (with_header(DEEP), "its safetensors header is not valid JSON"),
    "a header of numbers": (with_header(b'{"a": 1}'), "the tensor a has a broken entry"),
    "a header with a shape of 400 digits": (
        with_header(json.dumps(
            {"a": {"dtype": "F8", "shape": [10**400, 10**400], "data_offsets": [0, 64]}}).encode()),
        "the tensor a has a broken entry in the safetensors header"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "text"), MODELS.values(), ids=MODELS.keys())
def test_a_model_that_breaks_a_library_is_refused(s3: S3, model: dict[str, bytes], change: Change, text: str) -> None:
    for name, data in change(model).items():
        s3.put(f"{MODEL}{name}", data)
    refused(s3, Reason.MODEL_INVALID, rf"^spec.baseModel.uri: .*({text})", baseModel={"uri": MODEL})


def line(**row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


def parquet(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def not_utf8() -> bytes:
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    return parquet(pa.table({"prompt": pa.concat_arrays([pa.array(["a"]), broken]), "completion": ["a", "b"]}))


PAIR = {"prompt": "p", "completion": "c"}
FILES: dict[str, tuple[str, Callable[[], bytes], str, dict[str, Any]]] = {
    "half a character in a reference": (
        "x.jsonl", lambda: GOOD + line(**PAIR, reference="\ud800"), "line 11: the text has half of a surrogate pair",
        {"method": {"type": "GRPO", "grpo": {"rewards": [{"name": "r", "expression": "words(completion)"}]}}}),
    "half a character in a column's name": (
        "x.jsonl", lambda: line(**{"\ud800": "x"}), "found the columns �, which fit no format", {}),
    "half a character in a role": (
        "x.jsonl", lambda: line(messages=[{"role": "\ud800", "content": "x"}]), "line 1: .*role` must be one of", {}),
    "an integer of a million digits": (
        "x.jsonl", lambda: GOOD + b'{"prompt": ' + b"1" * 10**6 + b"}\n",
        "line 11: invalid JSON: Exceeds the limit", {}),
    "a million keys": (
        "x.jsonl", lambda: b"{" + b", ".join(b'"k%d": 1' % i for i in range(10**6)) + b"}\n",
        "which fit no format", {}),
    "a million keys and one of them twice": (
        "x.jsonl", lambda: GOOD + b"{" + b", ".join(b'"k%d": 1' % (i % 999_999) for i in range(10**6)) + b"}\n",
        "line 11: invalid JSON: the key 'k0' stands twice", {}),
    "tools that are deep": (
        "x.jsonl", lambda: line(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                                tools="[" * 10**5), "line 1: `tools` is text that is not JSON", {}),
    "a CSV of a million columns": (
        "x.csv", lambda: b",".join(b"c%d" % i for i in range(10**6)) + b"\n",
        "line 1: it names 1,000,000 columns; at most 10,000 are allowed", {}),
    "a gzip file of many members": (
        "x.jsonl.gz", lambda: gzip.compress(GOOD) + gzip.compress(b" " * 2**20) * 30,
        r"line \d+: (the line has more than|.*more than 200 to one are refused)", {}),
    "rows of nothing": (
        "x.parquet", lambda: parquet(pa.table({"prompt": pa.nulls(3_000_000, pa.string())})),
        r"it has 3,000,000 rows in [\d,]+ bytes; a row takes at least a byte", {}),
    "two columns of one name": (
        "x.parquet", lambda: parquet(pa.table([["a"], ["b"]], names=["prompt", "prompt"])),
        "the column 'prompt' stands twice", {}),
    "more columns than there can be": (
        "x.parquet", lambda: parquet(pa.table({f"c{i}": ["a"] for i in range(10_001)})),
        "it has 10,001 columns; at most 10,000 are allowed", {}),
    "text of parquet that is not UTF-8": (
        "x.parquet", not_utf8, "row 2: it has a value that cannot be read .*utf-8", {}),
    "a date before all dates": (
        "x.parquet", lambda: parquet(pa.table({
            "prompt": pa.array([2**62], pa.timestamp("us")), "completion": ["a"]})),
        "row 1: it has a value that cannot be read", {}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "data", "text", "spec"), FILES.values(), ids=FILES.keys())
def test_a_file_that_breaks_a_library_is_refused(
    s3: S3, name: str, data: Callable[[], bytes], text: str, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "FREE", 1_000_000)
    s3.put(f"s3://bucket/data/{name}", data())
    field = r"^spec.datasets\[0\].*"
    refused(s3, Reason.DATA_INVALID, field + text, datasets=[{"name": "p", "uri": f"s3://bucket/data/{name}"}], **spec)


TEMPLATES: dict[str, tuple[str, Reason, str]] = {
    "a macro that calls itself twice": (
        TREE, Reason.DATA_INVALID, "line 1: the template failed: it takes more than 200,000 steps"),
    "a text that doubles": (
        "{% set ns = namespace(x=prompt) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        Reason.DATA_INVALID, "line 1: the template failed: it makes a text of more than 4,194,304 characters"),
    "an unknown codec": (
        "{{ prompt.encode('nope') }}", Reason.DATA_INVALID,
        "line 1: the template failed: access to attribute 'encode'"),
    "half a character": (
        "{{ prompt }}\ud800", Reason.DATA_INVALID, "line 1: the text has half of a surrogate pair|surrogate"),
    "many parentheses": (
        "{{ " + "(" * 1900 + "1" + ")" * 1900 + " }}", Reason.INVALID_SPEC,
        "template: its parentheses, lists or blocks lie too deep within each other"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "reason", "text"), TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_template_that_does_harm_is_refused(s3: S3, template: str, reason: Reason, text: str) -> None:
    source = {"name": "p", "uri": "s3://bucket/good.jsonl", "template": "x"}
    config = configured(s3, datasets=[source], dataPolicy={"invalid": "Drop"})
    dataset = config.spec.datasets[0].model_copy(update={"template": template})
    config = config.model_copy(update={"spec": config.spec.model_copy(update={"datasets": [dataset]})})
    with pytest.raises(FineTuneError, match=text) as caught:
        prepare(config)
    assert caught.value.reason == reason


def test_a_prefix_of_too_many_objects_is_refused(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        s3.put(f"s3://bucket/data/{number:03}.jsonl", GOOD)
    datasets = [{"name": "p", "uri": "s3://bucket/data/"}]
    monkeypatch.setattr(sources, "FILES", 10)
    refused(
        s3, Reason.DATA_INVALID, r"s3://bucket/data/ has more than 10 data files; write its rows", datasets=datasets
    )
    monkeypatch.setattr(sources, "KEYS", 5)
    refused(s3, Reason.DATA_INVALID, r"s3://bucket/data/ has more than 5 objects; name a prefix", datasets=datasets)
