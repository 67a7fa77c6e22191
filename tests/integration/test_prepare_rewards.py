"""prepare for PPO and GRPO: the reward model is one that can judge, and the expressions are tried on the job's rows."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from finetune_api.failures import FineTuneError, Reason
from finetune_api.manifest import FileEntry, Manifest, RunInfo
from finetune_api.run import PreparedData, RunConfig
from finetune_trainer.prepare import prepare
from finetune_trainer.publish import now
from finetune_trainer.pull import pull
from finetune_trainer.workdir import WorkDir
from support.runs import make_run_config
from support.s3 import S3, running_s3
from support.tiny import make_tiny_model

pytestmark = pytest.mark.integration
JUDGE, ROWS = "s3://bucket/judge/", [{"prompt": f"What is {i}?", "reference": str(i)} for i in range(4)]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    model = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    with running_s3() as server:
        put(server, model, "s3://bucket/models/tiny/")
        yield server


@pytest.fixture(autouse=True)
def pod(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FINETUNE_WORK_DIR", str(tmp_path / "work"))
    for key in s3.keys("bucket", "judge/"):
        s3.client().delete_object(Bucket="bucket", Key=key)


def put(s3: S3, folder: Path, uri: str) -> None:
    for path in folder.iterdir():
        s3.put(f"{uri}{path.name}", path.read_bytes())


def configured(s3: S3, kind: str = "PPO", rows: list[Any] = ROWS, **method: Any) -> RunConfig:
    s3.put("s3://bucket/data/rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return make_run_config(
        endpoint=s3.endpoint,
        datasets=[{"name": "rows", "uri": "s3://bucket/data/rows.jsonl", "format": "PromptOnly"}],
        method={"type": kind, kind.lower(): method or {"rewardModel": {"uri": JUDGE}}},
    )


def make_judge(directory: Path, scores: int = 1, vocab_text: str | None = None) -> Path:
    """A whole reward model: the tiny model with a head in place of its vocabulary."""
    model = make_tiny_model(directory, **({"vocab_text": vocab_text} if vocab_text else {}))
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": scores}
    (model / "config.json").write_text(json.dumps(config))
    weights = load_file(model / "model.safetensors")
    del weights["lm_head.weight"]
    weights["score.weight"] = np.ones((scores, 32), dtype=np.float32)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def put_adapter(s3: S3, task: str = "SEQ_CLS", hidden: int = 32) -> bytes:
    s3.put(f"{JUDGE}adapter_config.json", json.dumps({"peft_type": "LORA", "task_type": task}).encode())
    weights = save({"base_model.model.score.weight": np.ones((1, hidden), dtype=np.float32)})
    s3.put(f"{JUDGE}adapter_model.safetensors", weights)
    return weights


def put_manifest(s3: S3, weights: bytes, base_sha256: str) -> None:
    config = s3.get(f"{JUDGE}adapter_config.json")
    files = [
        FileEntry(key=key, size=len(data), sha256="0" * 64)
        for key, data in (("adapter_config.json", config), ("adapter_model.safetensors", weights))
    ]
    run = RunInfo(
        namespace="team-a",
        job="judge",
        job_uid="u",
        attempt=0,
        attempt_uid="a",
        spec_sha256="0" * 64,
        base_model_uri="s3://bucket/models/tiny/",
        base_model_sha256=base_sha256,
        datasets_sha256={},
    )
    manifest = Manifest(kind="Adapter", step=1, created_time=now(), files=files, run=run)
    s3.put(f"{JUDGE}manifest.json", manifest.model_dump_json(by_alias=True, exclude_none=True).encode())


def test_a_whole_reward_model_is_pinned_and_pulled(s3: S3, tmp_path: Path) -> None:
    put(s3, make_judge(tmp_path / "judge"), JUDGE)
    config = configured(s3)
    message = prepare(config)
    assert message.prepared
    shape = message.prepared.model
    assert message.prepared.reward_parameters == shape.parameters - 32 * shape.vocab_size + 32
    work = WorkDir(tmp_path / "pod")
    pull(config.model_copy(update={"prepared": message.prepared}), work)
    index = PreparedData.model_validate_json(work.index.read_bytes())
    assert len(index.reward_model) == len({path.name for path in work.reward_model.iterdir()}) == 4
    assert (work.reward_model / "model.safetensors").read_bytes() == (tmp_path / "judge/model.safetensors").read_bytes()


def test_the_adapter_of_a_reward_job_is_taken_with_the_base_model_that_it_was_trained_on(s3: S3) -> None:
    weights = put_adapter(s3)
    message = prepare(configured(s3))
    assert message.prepared
    assert message.prepared.reward_parameters == message.prepared.model.parameters
    put_manifest(s3, weights, "f" * 64)
    with pytest.raises(FineTuneError, match=r"judge/ was trained on other files than those below spec.baseModel.uri"):
        prepare(configured(s3))


def pickled(s3: S3, tmp_path: Path) -> None:
    put(s3, make_judge(tmp_path / "judge"), JUDGE)
    s3.put(f"{JUDGE}pytorch_model.bin", s3.get(f"{JUDGE}model.safetensors"))
    s3.client().delete_object(Bucket="bucket", Key="judge/model.safetensors")


def without_tokenizer(s3: S3, tmp_path: Path) -> None:
    put(s3, make_judge(tmp_path / "judge"), JUDGE)
    s3.client().delete_object(Bucket="bucket", Key="judge/tokenizer.json")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s3, tmp: None, "there is nothing below s3://bucket/judge/"),
        (
            lambda s3, tmp: put(s3, make_tiny_model(tmp / "m"), JUDGE),
            "found the architecture LlamaForCausalLM; reward models (…ForSequenceClassification) are",
        ),
        (
            lambda s3, tmp: put(s3, make_judge(tmp / "m", scores=3), JUDGE),
            "tells 3 classes apart; a reward model gives",
        ),
        (
            lambda s3, tmp: put(
                s3, make_judge(tmp / "m", vocab_text="other words altogether, said twice twice"), JUDGE
            ),
            "has another tokenizer than the base model (token ",
        ),
        (pickled, "has its weights in pytorch_model.bin: safetensors only"),
        (without_tokenizer, "has no tokenizer.json: it cannot be told whether it reads the base model's tokens"),
        (
            lambda s3, tmp: put_adapter(s3, task="CAUSAL_LM"),
            "is an adapter for CAUSAL_LM; a reward model's is for SEQ_CLS",
        ),
        (lambda s3, tmp: put_adapter(s3, hidden=64), "its head reads 64 values; the base model's hidden_size is 32"),
    ],
)
def test_what_cannot_judge_is_refused(make: Callable[[S3, Path], None], message: str, s3: S3, tmp_path: Path) -> None:
    make(s3, tmp_path)
    with pytest.raises(FineTuneError) as error:
        prepare(configured(s3))
    assert error.value.reason == Reason.MODEL_INVALID
    assert str(error.value).startswith("spec.method.ppo.rewardModel.uri: ")
    assert message in str(error.value)


def rule(expression: str) -> dict[str, Any]:
    return {"rewards": [{"name": "rule", "expression": expression}]}


def test_expressions_are_tried_on_the_rows(s3: S3) -> None:
    assert prepare(configured(s3, "GRPO", **rule("last_number(completion) == last_number(reference)"))).prepared
    with pytest.raises(FineTuneError) as error:
        prepare(configured(s3, "GRPO", **rule("completion.lowr() == 'x'")))
    assert error.value.reason == Reason.INVALID_SPEC
    assert str(error.value).startswith(
        "spec.method.grpo.rewards[0].expression (rule): found `completion.lowr() == 'x'`; 'str object' has no attribute"
    )
    with pytest.raises(FineTuneError, match=r"ZeroDivisionError: division by zero .prompt 1 of rows, .* answer ''"):
        prepare(configured(s3, "GRPO", **rule("1 / words(completion)")))
    rows = [*ROWS, {"prompt": "And now?"}]
    with pytest.raises(FineTuneError, match=r"'None' has no attribute 'lower' \(prompt \d of rows, reference None"):
        prepare(configured(s3, "GRPO", rows, **rule("completion == reference.lower()")))


def test_the_model_that_judges_the_evaluation_is_checked_and_pulled(s3: S3, tmp_path: Path) -> None:
    s3.put("s3://bucket/data/pairs.jsonl", b'{"prompt": "What is 1?", "completion": " One."}\n' * 4)
    spec: dict[str, Any] = {
        "dataPolicy": {"duplicates": "Warn"},
        "evaluation": {"metrics": ["WinRate"], "rewardModel": {"uri": JUDGE}},
    }
    config = make_run_config(endpoint=s3.endpoint, baseModel={"uri": "s3://bucket/models/tiny/"}, **spec)
    with pytest.raises(FineTuneError, match=r"^spec\.evaluation\.rewardModel\.uri: ") as error:
        prepare(config)
    assert error.value.reason == Reason.MODEL_INVALID
    put(s3, make_judge(tmp_path / "judge"), JUDGE)
    message = prepare(config)
    assert message.prepared
    assert message.prepared.reward_parameters > 0
    work = WorkDir(tmp_path / "pod")
    pull(config.model_copy(update={"prepared": message.prepared}), work)
    assert (work.judge / "model.safetensors").read_bytes() == (tmp_path / "judge/model.safetensors").read_bytes()
    assert not work.reward_model.exists()
