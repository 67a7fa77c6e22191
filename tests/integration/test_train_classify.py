"""Texts with classes: a head that is learned with each tuning, by one worker and by two, and loads anywhere."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.dataset import Holdout
from finetune_api.run import PreparedData
from finetune_trainer.prepare import prepare
from finetune_trainer.pull import pull
from finetune_trainer.workdir import WorkDir
from support.gang import make_tiny_model
from support.preferring import PreferenceGang, make_preference_gang
from support.s3 import S3, running_s3
from support.tiny import make_tiny_model as make_model_with_tokenizer

pytestmark = [pytest.mark.integration, pytest.mark.gang]

SMALL = {"rank": 4, "alpha": 8}
TUNINGS: dict[str, dict[str, Any]] = {
    "LoRA": {"type": "LoRA", "lora": SMALL},
    "QLoRA": {"type": "QLoRA", "lora": SMALL},
    "DoRA": {"type": "DoRA", "lora": SMALL},
    "IA3": {"type": "IA3"},
    "Freeze": {"type": "Freeze", "freeze": {"trainableLayers": 1}},
    "Full": {"type": "Full"},
}
FIGURES = ("evalLoss", "accuracy", "precision", "recall", "f1")
NAMES = ["high", "low", "middle"]
Run = tuple[PreferenceGang, dict[str, float]]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(s3: S3, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Of a tuning: what one worker learned, trained once."""
    return functools.cache(
        lambda name: trained(name, tmp_path_factory.mktemp("alone"), s3, model, workers=1, micro_batch=16)
    )


def trained(name: str, directory: Path, s3: S3, model: Path, **places: Any) -> Run:
    prefix = f"classes-{name}-{places['workers']}-{places.get('strategy', 'DDP')}".lower()
    datasets = [{"name": "pairs", "uri": "s3://bucket/data/texts.jsonl", "format": "Labelled"}]
    merged = name not in ("Freeze", "Full") and places["workers"] == 1
    rate = {"Freeze": 0.01, "Full": 0.01, "IA3": 0.1}.get(name, 0.03)
    gang = make_preference_gang(
        directory / prefix,
        s3,
        model,
        {"type": "SFT"},
        bucket_prefix=prefix,
        datasets=datasets,
        tuning=TUNINGS[name],
        output={"uri": f"s3://bucket/{prefix}/", "merged": merged},
        training={"learningRate": rate, "maxSteps": 12},
        **places,
    )
    result = gang.run().result
    assert result
    return gang, result.metrics


@pytest.mark.parametrize("name", TUNINGS)
def test_a_head_learns_with_each_tuning_and_what_is_published_loads_anywhere(
    name: str, alone: Callable[[str], Run], model: Path, tmp_path: Path
) -> None:
    gang, metrics = alone(name)
    for figure in ("accuracy", "f1"):
        assert metrics[figure] > metrics[f"{figure}Before"] + 0.1, figure
    assert metrics["evalLoss"] < metrics["evalLossBefore"]
    published = gang.published(tmp_path / "published")
    assert figures_of(load(published, model, gang), gang) == pytest.approx(of(metrics), abs=1e-4)
    page = (published / "report.html").read_text()
    assert f'<td class="n">{metrics["accuracy"]:.4f}</td>' in page
    assert '<table class="matrix">' in page
    if gang.config.spec.output.merged:
        assert figures_of(load(published / "merged", model, gang), gang) == pytest.approx(of(metrics), abs=1e-3)
    for path in published.rglob("*.*"):
        assert str(tmp_path.parent).encode() not in path.read_bytes(), f"{path.name} names a folder of the pod"


@pytest.mark.parametrize(("name", "strategy"), [("LoRA", "DDP"), ("DoRA", "ZeRO2"), ("Full", "ZeRO3")])
def test_two_workers_learn_what_one_learns(
    name: str, strategy: str, alone: Callable[[str], Run], s3: S3, model: Path, tmp_path: Path
) -> None:
    one, figures = alone(name)
    two, others = trained(name, tmp_path, s3, model, workers=2, micro_batch=4, strategy=strategy)
    assert two.losses() == pytest.approx(one.losses(), abs=1e-3)
    assert of(others) == pytest.approx(of(figures), abs=5e-3)


def test_what_prepare_writes_is_learned_and_the_classes_keep_their_names(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model_with_tokenizer(tmp_path / "model")
    for path in base.iterdir():
        s3.put(f"s3://bucket/models/tiny/{path.name}", path.read_bytes())
    rows = [
        {"text": f"the {'quick' if i % 2 else 'lazy'} dog {i}", "label": i % 2, "lang": "en" if i % 3 else "fr"}
        for i in range(40)
    ]
    s3.put("s3://bucket/data/texts.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    gang = make_preference_gang(
        tmp_path,
        s3,
        base,
        {"type": "SFT"},
        bucket_prefix="classes-prepared",
        datasets=[
            {
                "name": "pairs",
                "uri": "s3://bucket/data/texts.jsonl",
                "format": "Labelled",
                "columns": {"slice": "lang"},
            }
        ],
        workers=1,
        micro_batch=16,
        training={"maxSteps": 2},
    )
    spec = gang.config.spec.model_copy(update={"validation": Holdout(fraction=0.2)})
    gang.config = gang.config.model_copy(update={"spec": spec})
    for name, value in (s3.environment | {"FINETUNE_WORK_DIR": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    pod = WorkDir(tmp_path / "pulled")
    monkeypatch.setenv("FINETUNE_ATTEMPT_UID", "attempt-0")
    pull(gang.config.model_copy(update={"prepared": prepare(gang.config).prepared}), pod)
    gang.prepared, gang.shards = PreparedData.model_validate_json(pod.index.read_bytes()), pod
    result = gang.run().result
    assert result
    assert result.metrics.keys() >= {*FIGURES, *(f"{name}Before" for name in FIGURES)}
    config = json.loads((gang.published(tmp_path / "published") / "config.json").read_bytes())
    assert config["id2label"] == {"0": "0", "1": "1"}


def of(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in FIGURES}


def load(folder: Path, model: Path, gang: PreferenceGang) -> Any:
    """What was published, by peft and transformers alone; its config names the classes."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig

    config = AutoConfig.from_pretrained(folder)
    assert list(config.id2label.values()) == NAMES
    if not (folder / "adapter_config.json").exists():
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantized = {"quantization_config": nf4} if gang.config.spec.tuning.type == "QLoRA" else {}
    base = AutoModelForSequenceClassification.from_pretrained(model, config=config, **quantized)
    return PeftModel.from_pretrained(base, folder).train(bool(quantized))


def figures_of(loaded: Any, gang: PreferenceGang) -> dict[str, float]:
    """Of the held-out rows, one at a time, by transformers' own loss and scikit-learn."""
    import torch
    from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

    losses, predicted, label = [], [], []
    with torch.no_grad():
        for row in gang.rows["validation"]:
            label.append(NAMES.index(row["label"]))
            known = loaded(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor(label[-1:]))
            losses.append(float(known.loss))
            predicted.append(int(known.logits.argmax()))
    scores = (
        score(label, predicted, average="macro", zero_division=0) for score in (precision_score, recall_score, f1_score)
    )
    values = (sum(losses) / len(losses), accuracy_score(label, predicted), *scores)
    return dict(zip(FIGURES, map(float, values), strict=True))
