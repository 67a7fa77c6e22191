"""prepare for the methods beside SFT: what the shards hold, and what a rank reads from them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import PreparedData, RunConfig
from finetune_trainer import shards
from finetune_trainer.batches import IGNORED, Examples
from finetune_trainer.prepare import prepare
from finetune_trainer.pull import pull
from finetune_trainer.workdir import WorkDir
from support.runs import make_run_config
from support.s3 import S3, running_s3
from support.tiny import CHATML, make_tiny_model, make_tokenizer

pytestmark = pytest.mark.integration
DATA = "s3://bucket/data/rows.jsonl"
TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    models = tmp_path_factory.mktemp("models")
    with running_s3() as server:
        for name, template in (("tiny", None), ("chat", CHATML)):
            for path in make_tiny_model(models / name, chat_template=template).iterdir():
                server.put(f"s3://bucket/models/{name}/{path.name}", path.read_bytes())
        yield server


@pytest.fixture(autouse=True)
def pod(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FINETUNE_WORK_DIR", str(tmp_path))


def configured(s3: S3, rows: list[Any], kind: str, form: str = "Auto", model: str = "tiny", **spec: Any) -> RunConfig:
    s3.put(DATA, "".join(json.dumps(row) + "\n" for row in rows).encode())
    dataset = {"name": "rows", "uri": DATA, "format": form}
    base = {"uri": f"s3://bucket/models/{model}/"}
    method = {"type": kind} | ({kind.lower(): spec.pop(kind.lower())} if kind.lower() in spec else {})
    return make_run_config(
        endpoint=s3.endpoint, **({"datasets": [dataset], "baseModel": base, "method": method} | spec)
    )


def pulled(config: RunConfig, tmp_path: Path, split: Any = "train") -> tuple[PreparedData, WorkDir]:
    """prepare, pull and decode, as a job and a pod of its gang would."""
    message = prepare(config)
    work = WorkDir(tmp_path / "pod")
    pull(config.model_copy(update={"prepared": message.prepared}), work)
    index = PreparedData.model_validate_json(work.index.read_bytes())
    shards.decode(index, [dataset.name for dataset in config.spec.datasets], split, work)
    return index, work


def texts(examples: Examples) -> list[tuple[str, str]]:
    """(all, what is learned) of each."""
    found = []
    for start, stop in zip(examples.offsets[:-1], examples.offsets[1:], strict=True):
        labels = [int(label) for label in examples.labels[start:stop] if label != IGNORED]
        found.append((TOKENIZER.decode(examples.input_ids[start:stop].tolist()), TOKENIZER.decode(labels)))
    return found


@pytest.mark.parametrize("method", ["DPO", "ORPO", "Reward"])
def test_pairs(s3: S3, tmp_path: Path, method: str) -> None:
    rows = [{"prompt": f"q {i}", "chosen": f" good {i}", "rejected": f" not so good {i}"} for i in range(5)]
    index, work = pulled(configured(s3, rows, method), tmp_path)
    assert index.kind == "Pairs"
    pairs = shards.load_pairs("train", work)
    assert texts(pairs.chosen)[3] == ("q 3 good 3", " good 3")
    assert texts(pairs.rejected)[3] == ("q 3 not so good 3", " not so good 3")
    assert len(pairs.chosen) == len(pairs.rejected) == 5
    assert index.shards[0].rejected_tokens == pairs.rejected.offsets[-1] > index.shards[0].tokens
    assert index.max_tokens == max(pairs.rejected.lengths)


def test_pairs_of_conversations_share_their_prompt(s3: S3, tmp_path: Path) -> None:
    user = {"role": "user", "content": "q"}
    chosen, rejected = ([user, {"role": "assistant", "content": text}] for text in ("yes", "no"))
    _, work = pulled(configured(s3, [{"chosen": chosen, "rejected": rejected}], "DPO", model="chat"), tmp_path)
    pairs = shards.load_pairs("train", work)
    prompts = []
    for one in (pairs.chosen, pairs.rejected):
        learned = int((one.labels[: one.offsets[1]] == IGNORED).argmin())
        prompts.append(one.input_ids[:learned].tolist())
    assert prompts[0] == prompts[1]
    assert TOKENIZER.decode(prompts[0]).strip() == "user\nq\nassistant"


def test_unpaired(s3: S3, tmp_path: Path) -> None:
    rows = [{"prompt": f"q {i}", "completion": f" a {i}", "label": i % 2 == 0} for i in range(4)]
    index, work = pulled(configured(s3, rows, "KTO"), tmp_path)
    unpaired = shards.load_unpaired("train", work)
    assert index.kind == "Unpaired"
    assert unpaired.desirable.tolist() == [True, False, True, False]
    assert texts(unpaired.examples)[1] == ("q 1 a 1", " a 1")


def test_pairs_give_kto_two_examples_each(s3: S3, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(3)]
    _, work = pulled(configured(s3, rows, "KTO", "Preference"), tmp_path)
    unpaired = shards.load_unpaired("train", work)
    assert unpaired.desirable.tolist() == [True, False] * 3
    with pytest.raises(FineTuneError, match="every answer is desirable; KTO needs good and bad ones"):
        prepare(configured(s3, [{"prompt": "q", "completion": "a", "label": True}], "KTO"))


def test_classes(s3: S3, tmp_path: Path) -> None:
    rows = [{"text": f"some text {i}", "label": ("spam", "ham", "eggs")[i % 3]} for i in range(6)]
    index, work = pulled(configured(s3, rows, "SFT", "Labelled"), tmp_path)
    assert (index.kind, index.classes) == ("Classes", ["eggs", "ham", "spam"])
    classes = shards.load_classes("train", work, index.classes)
    assert classes.label.tolist() == [2, 1, 0, 2, 1, 0]
    assert texts(classes.examples)[4] == ("some text 4", "")


def test_a_class_that_training_does_not_show_is_named(s3: S3) -> None:
    s3.put("s3://bucket/data/held.jsonl", b'{"text": "x", "label": "fish"}\n')
    held = {"datasets": [{"name": "held", "uri": "s3://bucket/data/held.jsonl", "format": "Labelled"}]}
    rows = [{"text": f"t {i}", "label": i % 2} for i in range(4)]
    with pytest.raises(FineTuneError) as caught:
        prepare(configured(s3, rows, "SFT", "Labelled", validation=held))
    assert caught.value.reason == Reason.DATA_INVALID
    assert str(caught.value) == (
        "spec.validation.datasets[0]: s3://bucket/data/held.jsonl line 1: the class 'fish' is in no training row; "
        "found 0, 1"
    )


@pytest.mark.parametrize(
    ("model", "whole"),
    [("tiny", "What is 2?"), ("chat", "<|im_start|>user\nWhat is 2?<|im_end|>\n<|im_start|>assistant\n")],
)
def test_prompts_end_where_the_answer_begins(s3: S3, tmp_path: Path, model: str, whole: str) -> None:
    rows = [{"prompt": f"What is {i}?"} | ({"answer": str(i)} if i else {}) for i in range(3)]
    index, work = pulled(configured(s3, rows, "GRPO", model=model), tmp_path)
    prompts = shards.load_prompts("train", work)
    assert index.kind == "Prompts"
    assert prompts.references == [None, "1", "2"]
    start, stop = prompts.examples.offsets[2:4]
    ids = prompts.examples.input_ids[start:stop].tolist()
    assert TOKENIZER.decode(ids, skip_special_tokens=False).removeprefix("<s>") == whole
    assert set(prompts.examples.labels[start:stop].tolist()) == {IGNORED}


def test_an_answer_needs_room_beside_its_prompt(s3: S3, tmp_path: Path) -> None:
    rows = [{"prompt": "one two three four five six seven eight nine ten"}, {"prompt": "a"}]
    index, _ = pulled(configured(s3, rows, "PPO", ppo={"maxNewTokens": 500}), tmp_path)
    assert (index.shards[0].rows, index.dropped) == (1, {"tooLong": 1})
    with pytest.raises(FineTuneError, match="found maxNewTokens 512; the model has 512 positions"):
        prepare(configured(s3, rows, "PPO", ppo={"maxNewTokens": 512}))


def test_data_of_another_method_are_refused(s3: S3) -> None:
    rows = [{"prompt": "q", "completion": "a"}]
    with pytest.raises(FineTuneError, match=r"datasets\[0\].format: found Text; method DPO needs Preference"):
        prepare(configured(s3, rows, "DPO", "Text"))
    with pytest.raises(FineTuneError, match=r"found the columns completion, prompt, which fit no format \(Preference"):
        prepare(configured(s3, rows, "DPO"))
