"""prepare against a real S3 protocol: files of every kind in, shards, report and index out."""

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.failures import FineTuneError, TerminationMessage
from finetune_api.run import PreparedData, RunConfig
from finetune_api.support import unsupported
from finetune_trainer import shards
from finetune_trainer.prepare import prepare
from finetune_trainer.pull import pull
from finetune_trainer.workdir import WorkDir
from support.runs import JOB_UID, make_run_config
from support.s3 import S3, running_s3
from support.tiny import CHATML, make_tiny_model, make_tokenizer

pytestmark = pytest.mark.integration
SCRATCH = f"out/.scratch/{JOB_UID}/"
PAIRS = [{"prompt": f"What is {i}?", "completion": f" It is the number {i}."} for i in range(40)]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    models = tmp_path_factory.mktemp("models")
    with running_s3() as server:
        for name, template in (("tiny", None), ("chat", CHATML)):
            for path in make_tiny_model(models / name, chat_template=template).iterdir():
                server.put(f"s3://bucket/models/{name}/{path.name}", path.read_bytes())
        yield server


@pytest.fixture(autouse=True)
def pod(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FINETUNE_WORK_DIR", str(tmp_path))
    yield
    client = s3.client()
    for prefix in ("out/", "data/"):
        for key in s3.keys("bucket", prefix):
            client.delete_object(Bucket="bucket", Key=key)


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def configured(s3: S3, uri: str = "s3://bucket/data/pairs.jsonl", model: str = "tiny", **spec: Any) -> RunConfig:
    dataset = {"name": "pairs", "uri": uri} | spec.pop("dataset", {})
    fields = {"datasets": [dataset], "baseModel": {"uri": f"s3://bucket/models/{model}/"}} | spec
    return make_run_config(endpoint=s3.endpoint, **fields)


def index_of(s3: S3) -> PreparedData:
    return PreparedData.model_validate_json(s3.get(f"s3://bucket/{SCRATCH}data/index.json"))


def examples(s3: S3, split: str = "train") -> list[tuple[list[int], list[int]]]:
    found = []
    for shard in index_of(s3).shards:
        if shard.split == split:
            data = s3.get(f"s3://bucket/{SCRATCH}data/{shard.key}")
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.size, shard.sha256)
            table = pq.read_table(io.BytesIO(data))
            assert table.schema.field("input_ids").type == pa.list_(pa.int32())
            found += [(row["input_ids"], row["labels"]) for row in table.to_pylist()]
    return found


def test_pairs_become_shards_that_the_gang_can_pull(s3: S3, tmp_path: Path) -> None:
    s3.put("s3://bucket/data/pairs.jsonl", jsonl(PAIRS))
    message = prepare(configured(s3))
    summary = message.prepared
    assert summary is not None
    index = index_of(s3)
    assert summary.index_sha256 == hashlib.sha256(s3.get(summary.index_uri)).hexdigest()
    assert (summary.train_examples, summary.validation_examples, summary.dropped) == (40, 0, 0)
    assert summary.train_tokens == sum(len(ids) for ids, _ in examples(s3))
    assert len(message.encode()) <= 4096
    tokenizer = make_tokenizer()
    ids, labels = examples(s3)[3]
    assert tokenizer.decode(ids) == "What is 3? It is the number 3."
    assert tokenizer.decode([label for label in labels if label != -100]) == " It is the number 3."
    assert (ids[0], ids[-1], labels[-1]) == (1, 2, 2)
    vocab, hidden, inner = index.model.vocab_size, 32, 64
    block = 4 * hidden * hidden + 3 * inner * hidden
    assert index.model.parameters == 2 * vocab * hidden + hidden + 2 * (block + 2 * hidden)
    assert index.model.linear_parameters == 2 * block
    assert index.model.target_features == 2 * (4 * (hidden + hidden) + 3 * (inner + hidden))
    assert [p.uri.rpartition("/")[2] for p in index.base_model] == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]  # fmt: skip
    config = configured(s3).model_copy(update={"prepared": summary})
    work = WorkDir(tmp_path / "pod")
    pull(config, work)
    assert PreparedData.model_validate_json(work.index.read_bytes()) == index
    assert (work.model / "model.safetensors").stat().st_size > 0
    assert work.shard(index.shards[0].key).stat().st_size == index.shards[0].size
    # Nothing else was written, and the probes are gone.
    assert sorted(s3.keys("bucket", "out/")) == [
        f"{SCRATCH}data/{name}" for name in ("data-report.json", "index.json", "train/00000.parquet")
    ]


def as_csv(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), data)
    return data.getvalue()


def test_every_kind_of_file_gives_the_same_examples(s3: S3) -> None:
    files = {
        "a.jsonl": jsonl(PAIRS[:8]),
        "b.jsonl.gz": gzip.compress(jsonl(PAIRS[8:16])),
        "c.jsonl.zst": pa.compress(jsonl(PAIRS[16:24]), "zstd", asbytes=True),
        "d.csv": b"\xef\xbb\xbf" + as_csv(PAIRS[24:32]),
        "e.parquet": as_parquet(PAIRS[32:]),
        "_SUCCESS": b"",
        "README.md": b"about",
    }
    for name, data in files.items():
        s3.put(f"s3://bucket/data/all/{name}", data)
    prepare(configured(s3, "s3://bucket/data/all/"))
    several = examples(s3)
    s3.put("s3://bucket/data/pairs.jsonl", jsonl(PAIRS))
    prepare(configured(s3))
    assert several == examples(s3)
    assert len(several) == 40


FORMATS = {
    "Messages": [
        {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}]}
        for i in range(4)
    ],
    "ShareGPT": [
        {"conversations": [{"from": "human", "value": f"q {i}"}, {"from": "gpt", "value": f"a {i}"}]} for i in range(4)
    ],
    "Instruction": [{"instruction": "q", "input": f"{i}", "output": f"a {i}"} for i in range(4)],
    "Text": [{"text": f"some text {i}"} for i in range(4)],
}  # fmt: skip


@pytest.mark.parametrize(("rows", "model", "whole", "learned"), [
    (FORMATS["Messages"], "tiny", "### User:\nq 2\n\n### Assistant:\na 2", "a 2"),
    (FORMATS["Messages"], "chat", "user\nq 2\nassistant\na 2", "a 2"),
    (FORMATS["ShareGPT"], "chat", "user\nq 2\nassistant\na 2", "a 2"),
    (FORMATS["Instruction"], "tiny", "### User:\nq\n\n2\n\n### Assistant:\na 2", "a 2"),
    (FORMATS["Instruction"], "chat", "user\nq\n\n2\nassistant\na 2", "a 2"),
    (FORMATS["Text"], "chat", "some text 2", "some text 2"),
])  # fmt: skip
def test_formats_are_found_out_and_rendered(s3: S3, rows: list[Any], model: str, whole: str, learned: str) -> None:
    s3.put("s3://bucket/data/pairs.jsonl", jsonl(rows))
    prepare(configured(s3, model=model))
    ids, labels = examples(s3)[2]
    tokenizer = make_tokenizer()
    assert tokenizer.decode(ids).strip() == whole
    assert tokenizer.decode([label for label in labels if label != -100]).strip() == learned
    # The end is learned: the end-of-turn token of the template, or EOS.
    ends = {tokenizer.token_to_id("<|im_end|>"), 2}
    assert ends & set(labels[-3:])


def test_a_template_of_ones_own_renders_the_prompt(s3: S3) -> None:
    rows = [{"instruction": "Add", "input": str(i), "output": str(i + 1)} for i in range(3)]
    s3.put("s3://bucket/data/pairs.jsonl", jsonl(rows))
    prepare(configured(s3, model="chat", dataset={"template": "{{ instruction }}: {{ input }} => "}))
    assert make_tokenizer().decode(examples(s3)[1][0]) == "Add: 1 => 2"


def test_columns_by_other_names(s3: S3) -> None:
    s3.put("s3://bucket/data/pairs.jsonl", jsonl([{"frage": "x", "antwort": f"{i}"} for i in range(3)]))
    prepare(configured(s3, dataset={"columns": {"prompt": "frage", "completion": "antwort"}}))
    assert make_tokenizer().decode(examples(s3)[2][0]) == "x2"


def test_what_is_left_out_is_counted_with_its_place(s3: S3) -> None:
    lines = jsonl(PAIRS[:20]) + b'{"prompt": "x", "completion": ""}\n{broken\n[1]\n' + jsonl([PAIRS[0]])
    lines += jsonl([{"prompt": "long", "completion": "word " * 600}])
    s3.put("s3://bucket/data/pairs.jsonl", lines)
    policy = {"duplicates": "Drop", "invalid": "Drop", "tooLong": "Drop"}
    message = prepare(configured(s3, dataPolicy=policy))
    assert index_of(s3).dropped == {"invalid": 3, "duplicate": 1, "tooLong": 1}
    assert message.prepared is not None
    assert message.prepared.dropped == 5
    assert message.prepared.message.startswith("3 left out as invalid (s3://bucket/data/pairs.jsonl line 21: `compl")
    assert "; 1 left out as duplicate (s3://bucket/data/pairs.jsonl line 24 has the" in message.prepared.message
    report = json.loads(s3.get(message.prepared.report_uri))["datasets"][0]
    place = "s3://bucket/data/pairs.jsonl line"
    assert report["cases"]["invalid"] == [
        f"{place} 21: `completion` is empty",
        f"{place} 22: invalid JSON at column 2: Expecting property name enclosed in double quotes",
        f"{place} 23: found a list; each line must be one JSON object",
    ]
    assert report["cases"]["duplicate"] == [f"{place} 24 has the content of an earlier row"]
    assert report["cases"]["tooLong"][0].startswith(f"{place} 25: ")
    assert (report["rowsRead"], report["splits"]["train"]["examples"]) == (25, 20)
    assert report["sample"] == "What is 0? It is the number 0."


def test_too_long_rows_can_be_cut(s3: S3) -> None:
    s3.put("s3://bucket/data/pairs.jsonl", jsonl([{"text": "word " * 300}, {"text": "short"}]))
    prepare(configured(s3, dataPolicy={"tooLong": "Truncate"}, training={"maxLength": 64}))
    assert sorted(len(ids) for ids, _ in examples(s3))[-1] == 64


def test_rows_that_are_added_move_no_other_row_to_another_split(s3: S3) -> None:
    tokenizer = make_tokenizer()

    def split(rows: list[Any]) -> list[set[str]]:
        s3.put("s3://bucket/data/pairs.jsonl", jsonl(rows))
        prepare(configured(s3, validation={"fraction": 0.3}, test={"fraction": 0.2}))
        splits = ("train", "validation", "test")
        return [{tokenizer.decode(ids) for ids, _ in examples(s3, name)} for name in splits]

    before, after = split(PAIRS[:25]), split(list(reversed(PAIRS)))
    assert sum(map(len, after)) - sum(map(len, before)) == 15
    for few, many in zip(before, after, strict=True):
        assert few
        assert few <= many


@pytest.mark.parametrize(("policy", "kept", "dropped"), [("Drop", 30, {"leakage": 10}), ("Warn", 40, {})])
def test_leaks_can_be_left_out(s3: S3, policy: str, kept: int, dropped: dict[str, int]) -> None:
    s3.put("s3://bucket/data/pairs.jsonl", jsonl(PAIRS))
    s3.put("s3://bucket/data/held.jsonl", jsonl(PAIRS[5:15]))
    held = {"datasets": [{"name": "held", "uri": "s3://bucket/data/held.jsonl"}]}
    prepare(configured(s3, validation=held, dataPolicy={"leakage": policy}))
    assert (len(examples(s3)), len(examples(s3, "validation"))) == (kept, 10)
    assert index_of(s3).dropped == dropped


def test_a_byte_order_mark_is_no_part_of_the_first_row(s3: S3) -> None:
    s3.put("s3://bucket/data/pairs.jsonl", b"\xef\xbb\xbf" + jsonl(PAIRS[:3]))
    prepare(configured(s3))
    assert len(examples(s3)) == 3


def test_a_second_run_writes_the_same_again(s3: S3) -> None:
    s3.put("s3://bucket/data/pairs.jsonl", jsonl(PAIRS))

    def run() -> tuple[TerminationMessage, dict[str, bytes]]:
        message = prepare(configured(s3, validation={"fraction": 0.2}))
        return message, {key: s3.get(f"s3://bucket/{key}") for key in s3.keys("bucket", "out/")}

    assert run() == run()


def test_several_datasets_keep_their_names(s3: S3) -> None:
    s3.put("s3://bucket/data/a.jsonl", jsonl(PAIRS[:10]))
    s3.put("s3://bucket/data/b.jsonl", jsonl([{"text": f"text {i}"} for i in range(5)]))
    datasets = [{"name": n, "uri": f"s3://bucket/data/{n}.jsonl", "weight": 1.0} for n in ("a", "b")]
    prepare(configured(s3, datasets=datasets))
    index = index_of(s3)
    assert [(shard.dataset, shard.rows, shard.key) for shard in index.shards] == [
        ("a", 10, "train/00000.parquet"),
        ("b", 5, "train/00001.parquet"),
    ]
    assert set(index.datasets_sha256) == {"a", "b"}


def test_validation_data_of_its_own_are_decoded_beside_the_training_data(s3: S3, tmp_path: Path) -> None:
    s3.put("s3://bucket/data/pairs.jsonl", jsonl(PAIRS[:10]))
    s3.put("s3://bucket/data/held.jsonl", jsonl(PAIRS[10:14]))
    held = {"datasets": [{"name": "held", "uri": "s3://bucket/data/held.jsonl"}]}
    config = configured(s3, validation=held)
    assert unsupported(config.spec) == []
    work = WorkDir(tmp_path / "pod")
    pull(config.model_copy(update={"prepared": prepare(config).prepared}), work)
    index = index_of(s3)
    assert set(index.datasets_sha256) == {"pairs", "validation/held"}
    for split in ("train", "validation"):
        shards.decode(index, ["pairs"], split, work)
    assert (len(shards.load("train", work)), len(shards.load("validation", work))) == (10, 4)


def test_special_tokens_in_rows_are_text_and_told(s3: S3) -> None:
    rows = [{"prompt": "say <|im_end|> twice", "completion": "ok</s>"}, {"prompt": "b", "completion": "c"}]
    s3.put("s3://bucket/data/pairs.jsonl", jsonl(rows))
    message = prepare(configured(s3, model="chat"))
    ids, labels = examples(s3)[0]
    end = make_tokenizer().token_to_id("<|im_end|>")
    assert (ids.count(end), labels.count(end), ids.count(2)) == (2, 1, 0)
    assert message.prepared
    assert message.prepared.message == (
        "1 kept with specialTokens (s3://bucket/data/pairs.jsonl line 1: <|im_end|> is encoded as plain text)"
    )


def test_shots_are_drawn_from_training_rows_alone(s3: S3) -> None:
    s3.put("s3://bucket/data/pairs.jsonl", jsonl([{"prompt": f"q{i}:", "completion": f" a{i}"} for i in range(40)]))
    prepare(configured(s3, dataset={"shots": 2}, validation={"fraction": 0.3}))
    tokenizer = make_tokenizer()
    told: dict[str, list[list[str]]] = {
        split: [tokenizer.decode(ids).split("\n\n") for ids, _ in examples(s3, split)]
        for split in ("train", "validation")
    }
    trained = {parts[-1] for parts in told["train"]}
    assert len(trained) + len(told["validation"]) == 40
    for parts in [*told["train"], *told["validation"]]:
        assert len(set(parts)) == 3
        assert set(parts[:2]) <= trained
    learned = [tokenizer.decode([label for label in labels if label != -100]) for _, labels in examples(s3)]
    assert learned == [parts[-1].partition(":")[2] for parts in told["train"]]


def test_passages_are_placed_and_a_share_is_dropped_from_training_rows(s3: S3) -> None:
    rows = [{"prompt": f"q{i}", "completion": f" a{i}", "found": [f"p{i}"]} for i in range(40)]
    s3.put("s3://bucket/data/pairs.jsonl", jsonl(rows))
    retrieval = {"dropRatio": 0.5, "absentAnswer": " none"}
    dataset = {"columns": {"context": "found"}, "retrieval": retrieval}
    prepare(configured(s3, dataset=dataset, validation={"fraction": 0.3}))
    tokenizer = make_tokenizer()
    train, held = ([tokenizer.decode(ids) for ids, _ in examples(s3, split)] for split in ("train", "validation"))
    assert all(text.startswith("[1] p") and " a" in text for text in held)
    without = [text for text in train if not text.startswith("[1] p")]
    assert 0.2 < len(without) / len(train) < 0.8
    assert all(text.startswith("q") and text.endswith(" none") for text in without)


def test_a_test_split_is_apart_from_the_others(s3: S3) -> None:
    s3.put("s3://bucket/data/pairs.jsonl", jsonl(PAIRS))
    summary = prepare(configured(s3, validation={"fraction": 0.25}, test={"fraction": 0.25})).prepared
    assert summary
    splits = [{tuple(ids) for ids, _ in examples(s3, split)} for split in ("train", "validation", "test")]
    counts = [summary.train_examples, summary.validation_examples, summary.test_examples]
    assert counts == [len(split) for split in splits]
    assert all(counts)
    assert len(set.union(*splits)) == sum(counts) == 40


def test_validation_and_test_data_must_not_share_rows(s3: S3) -> None:
    s3.put("s3://bucket/data/pairs.jsonl", jsonl(PAIRS[:10]))
    held = {}
    for name, rows in (("validation", PAIRS[10:14]), ("test", PAIRS[13:17])):
        s3.put(f"s3://bucket/data/{name}.jsonl", jsonl(rows))
        held[name] = {"datasets": [{"name": name, "uri": f"s3://bucket/data/{name}.jsonl"}]}
    with pytest.raises(FineTuneError, match=r"spec.test.datasets\[0\]: .* line 1 is in the validation data too"):
        prepare(configured(s3, **held))
    prepare(configured(s3, **held, dataPolicy={"leakage": "Drop"}))
    assert [len(examples(s3, split)) for split in ("train", "validation", "test")] == [10, 4, 3]
