"""Starting from an earlier adapter: prepare looks at it, the gang pulls it; what does not belong is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import PreparedData, RunConfig
from finetune_api.tuning import Tuning
from finetune_trainer.prepare import prepare
from finetune_trainer.publish import publish
from finetune_trainer.pull import pull
from finetune_trainer.storage import Store
from finetune_trainer.workdir import WorkDir
from support.runs import make_run_config
from support.s3 import S3, running_s3
from support.tiny import make_tiny_model

pytestmark = pytest.mark.integration
LORA = {"type": "LoRA", "lora": {"rank": 4, "alpha": 8}}
BASE, ADAPTER = "s3://bucket/models/tiny/", "s3://bucket/adapters/first/"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with running_s3() as server:
        for path in make_tiny_model(tmp_path_factory.mktemp("models") / "tiny").iterdir():
            server.put(f"{BASE}{path.name}", path.read_bytes())
        rows = [{"prompt": f"What is {i}?", "completion": f" It is the number {i}."} for i in range(8)]
        server.put("s3://bucket/data/pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        yield server


@pytest.fixture(scope="module")
def adapters(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind of tuning, as peft saves them; a new one that nobody has trained."""
    import torch

    from finetune_trainer.model import load_model
    from finetune_trainer.tuning import tune

    base = make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")
    made = {}
    for name in ("LoRA", "DoRA", "IA3", "PromptTuning", "PrefixTuning"):
        tuning = Tuning.model_validate(LORA | {"type": name} if name in ("LoRA", "DoRA") else {"type": name})
        made[name] = tmp_path_factory.mktemp(name)
        loaded = load_model(base, torch.float32, "sdpa", None)
        tune(loaded, tuning, BASE, 0, False, masters=True).save_pretrained(made[name], save_embedding_layers=False)
    return made


@pytest.fixture(autouse=True)
def pod(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FINETUNE_WORK_DIR", str(tmp_path / "work"))
    yield
    for key in s3.keys("bucket", "adapters/"):
        s3.client().delete_object(Bucket="bucket", Key=key)


def configured(s3: S3, tuning: dict[str, Any]) -> RunConfig:
    return make_run_config(
        endpoint=s3.endpoint, baseModel={"uri": BASE, "adapterUri": ADAPTER}, tuning=tuning, training={"maxLength": 64}
    )


def put(s3: S3, directory: Path) -> None:
    for path in directory.iterdir():
        s3.put(f"{ADAPTER}{path.name}", path.read_bytes())


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "IA3", "PromptTuning", "PrefixTuning"])
def test_what_peft_saved_is_pulled(name: str, s3: S3, adapters: dict[str, Path]) -> None:
    put(s3, adapters[name])
    config = configured(s3, LORA | {"type": name} if name in ("LoRA", "DoRA") else {"type": name})
    prepared = prepare(config).prepared
    assert prepared
    pull(config.model_copy(update={"prepared": prepared}), WorkDir.from_env())
    weights = WorkDir.from_env().adapter / "adapter_model.safetensors"
    assert weights.read_bytes() == (adapters[name] / weights.name).read_bytes()


def refusal(s3: S3, tuning: dict[str, Any]) -> str:
    with pytest.raises(FineTuneError) as caught:
        prepare(configured(s3, tuning))
    assert caught.value.reason == Reason.MODEL_INVALID
    assert str(caught.value).startswith("spec.baseModel.adapterUri: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("tuning", "words"),
    [
        ({"type": "IA3"}, "is a LORA adapter; spec.tuning.type IA3 continues IA3 only"),
        ({"type": "LoRA", "lora": {"rank": 8, "alpha": 8}}, "its rank is 4, spec.tuning says 8"),
        ({"type": "LoRA", "lora": {"rank": 4, "alpha": 16}}, "its alpha is 8, spec.tuning says 16"),
        ({"type": "DoRA", "lora": {"rank": 4, "alpha": 8}}, "its DoRA is False, spec.tuning says True"),
        (
            {"type": "LoRA", "lora": {"rank": 4, "alpha": 8, "targetModules": ["q_proj"]}},
            "which spec.tuning does not train",
        ),
    ],
)
def test_another_tuning_is_refused(tuning: dict[str, Any], words: str, s3: S3, adapters: dict[str, Path]) -> None:
    put(s3, adapters["LoRA"])
    assert words in refusal(s3, tuning)


def test_an_adapter_of_another_model_is_refused(s3: S3, adapters: dict[str, Path], tmp_path: Path) -> None:
    put(s3, adapters["LoRA"])
    tensors = load_file(adapters["LoRA"] / "adapter_model.safetensors")
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    save_file({**tensors, name: tensors[name][:, :-1].copy()}, tmp_path / "other")
    s3.put(f"{ADAPTER}adapter_model.safetensors", (tmp_path / "other").read_bytes())
    assert "has the shape [4, 31]; the base model needs [4, 32]" in refusal(s3, LORA)
    del tensors[name]
    save_file(tensors, tmp_path / "other")
    s3.put(f"{ADAPTER}adapter_model.safetensors", (tmp_path / "other").read_bytes())
    assert "it is of another model, or of other targetModules" in refusal(s3, LORA)


def test_pickles_are_refused(s3: S3, adapters: dict[str, Path]) -> None:
    s3.put(f"{ADAPTER}adapter_config.json", (adapters["LoRA"] / "adapter_config.json").read_bytes())
    s3.put(f"{ADAPTER}adapter_model.bin", b"x")
    assert "has no adapter_model.safetensors" in refusal(s3, LORA)


def test_a_manifest_is_held_to(s3: S3, adapters: dict[str, Path]) -> None:
    """Its own hashes when the files are pulled, the base model's hash before that."""
    config = configured(s3, LORA)
    with Store(config.storage) as store:
        publish(store, adapters["LoRA"], ADAPTER, kind="Adapter", step=1, created_time="2026-01-01T00:00:00Z")
    prepared = prepare(config).prepared
    assert prepared
    whole = config.model_copy(update={"prepared": prepared})
    pull(whole, WorkDir.from_env())

    good = (adapters["LoRA"] / "adapter_config.json").read_bytes()
    s3.put(f"{ADAPTER}adapter_config.json", good.replace(b"CAUSAL_LM", b"CAUSAL_ML"))
    prepared = prepare(config).prepared
    with pytest.raises(FineTuneError, match=r"adapterUri: .*adapter_config.json.*SHA-256"):
        pull(config.model_copy(update={"prepared": prepared}), WorkDir.from_env())
    s3.put(f"{ADAPTER}adapter_config.json", b"{}")
    assert "is not the file that the manifest names" in refusal(s3, LORA)
    s3.put(f"{ADAPTER}adapter_config.json", good)

    manifest = json.loads(s3.get(f"{ADAPTER}manifest.json"))
    manifest["run"] = {
        "namespace": "a",
        "job": "b",
        "jobUid": "c",
        "attempt": 0,
        "attemptUid": "d",
        "specSha256": "0" * 64,
        "baseModelUri": "s3://bucket/models/other/",
        "baseModelSha256": "1" * 64,
        "datasetsSha256": {},
    }
    s3.put(f"{ADAPTER}manifest.json", json.dumps(manifest).encode())
    assert "was trained on other files than those below spec.baseModel.uri" in refusal(s3, LORA)


def test_a_job_without_one_has_none(s3: S3) -> None:
    config = make_run_config(endpoint=s3.endpoint, baseModel={"uri": BASE}, training={"maxLength": 64})
    prepared = prepare(config).prepared
    assert prepared
    index = s3.get(prepared.index_uri)
    assert PreparedData.model_validate_json(index).adapter == []
