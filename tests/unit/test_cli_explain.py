"""`finetune lint --explain`: the sum that sizing makes, from a model's files or a few numbers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune_api.job import FineTuneJob
from finetune_api.modelfiles import llama_tensors
from finetune_api.placing import device_of, request_of
from finetune_api.profile import FineTuneProfile
from finetune_api.sizing import size
from finetune_api.stages import effective
from finetune_api.tuning import Tuning
from finetune_cli import __main__ as entry
from finetune_cli import explain, modelsource, yamldoc
from finetune_cli.errors import CliError
from finetune_cli.objectstore import Access

LLAMA_8B = "hidden=4096,layers=32,intermediate=14336,vocab=128256,keyValue=1024"
JOB = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: support-bot, namespace: team-a}
spec:
  baseModel: {uri: s3://models/small/}
  datasets:
    - {name: tickets, uri: s3://data/tickets/}
  distribution: {workers: 8}
  output: {uri: s3://adapters/team-a/}
"""
PROFILE = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneProfile
metadata: {name: gpus}
spec:
  image: trainer
  accelerator: {memory: 24Gi}
"""


def run(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str, job: str = JOB) -> tuple[int, str]:
    (folder / "job.yaml").write_text(job)
    (folder / "profile.yaml").write_text(PROFILE)
    line = ["lint", str(folder / "job.yaml"), "--profile", str(folder / "profile.yaml"), "--explain", *arguments]
    code = entry.run(entry.cli, "finetune", line)
    said = capsys.readouterr()
    return code, said.out + said.err


def test_the_sum_is_the_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = run(tmp_path, capsys, "--model", LLAMA_8B)
    assert code == 0
    job = FineTuneJob.model_validate(yamldoc.load(JOB)[0].data)
    profile = FineTuneProfile.model_validate(yamldoc.load(PROFILE)[0].data)
    shape = modelsource.of(LLAMA_8B, Access()).shape(job.spec.tuning)
    plan = size(shape, request_of(effective(job.spec), 0), device_of(profile.spec))
    inside = told[told.index("memory of one process") : told.index("  taken")]
    amounts = [float(found) for found in re.findall(r"^    \w[\w ]+?  +([\d.]+) GiB", inside, re.MULTILINE)]
    assert sum(amounts[:-1]) == pytest.approx(amounts[-1], abs=0.05)
    assert amounts[-1] == pytest.approx(plan.memory_per_gpu / 2**30, abs=0.01)
    assert f"taken      {plan.strategy}, micro-batch {plan.micro_batch_size}" in told
    assert "8.03B parameters" in told
    assert re.search(r"not taken  DDP, micro-batch 1: [\d.]+ GiB, does not fit at micro-batch 1", told)


def test_what_does_not_fit_is_said_with_the_least_that_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = run(tmp_path, capsys, "--model", LLAMA_8B, job=JOB.replace("8", "2") + "  tuning: {type: Full}\n")
    assert code == 0
    assert "taken      nothing: the job would end as DoesNotFit before a GPU is asked for" in told
    assert "does not fit: 21.60 GiB may be filled, 0.9 of the GPU's 24.00 GiB" in told


def test_each_stage_has_its_own_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = "  stages:\n    - {name: first}\n    - {name: second, tuning: {type: QLoRA}}\n"
    _, told = run(tmp_path, capsys, "--model", LLAMA_8B, job=JOB + stages)
    assert told.index("stage first") < told.index("LoRA: 41.9M") < told.index("stage second")
    assert "in 4 bits x 0.52 bytes" in told


def test_hours_follow_from_tokens_and_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", LLAMA_8B, "--tokens", "1000000000", "--tflops", "100")
    _, told = run(
        tmp_path, capsys, *arguments, job=JOB.replace("{workers: 8}", "{workers: 8}\n  training: {epochs: 2}")
    )
    # 6 x 8.03e9 operations for each token where activations are recomputed.
    assert re.search(r"time       26\d\.\d GPU-hours for 2 x 1,000,000,000 tokens at 100 TFLOPS", told)


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "vocab_size": 128}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = llama_tensors(32, 2, 64, 128, 16)
    save_file(
        {name: np.zeros(tensor.shape, np.float16) for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def test_a_folder_has_the_shape_that_its_numbers_say(tmp_path: Path) -> None:
    tuning = Tuning(type="LoRA")
    found = modelsource.of(str(model_folder(tmp_path / "model")), Access()).shape(tuning)
    numbers = modelsource.of("hidden=32,layers=2,intermediate=64,vocab=128,keyValue=16", Access()).shape(tuning)
    assert found.model_copy(update={"dtype": "BFloat16"}) == numbers


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere", "nowhere has no config.json; --model takes"),
        ("hidden=4096,layers=32", "--model: found 'hidden=4096,layers=32'; write hidden=4096"),
        ("hidden=4096,layers=many,intermediate=1,vocab=1", "--model: found"),
    ],
)
def test_a_model_that_is_not_there_is_said(model: str, words: str) -> None:
    with pytest.raises(CliError, match=re.escape(words)):
        modelsource.of(model, Access())


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(CliError, match=r"model\.safetensors is not a safetensors file"):
        modelsource.of(str(folder), Access())
    (folder / "model.safetensors").unlink()
    with pytest.raises(CliError, match=r"has no \.safetensors file"):
        modelsource.of(str(folder), Access())


def test_a_target_that_the_model_lacks_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = JOB + "  tuning: {type: LoRA, lora: {targetModules: [q_prj]}}\n"
    code, told = run(tmp_path, capsys, "--model", str(model_folder(tmp_path / "model")), job=job)
    assert code == 2
    assert "did you mean q_proj?" in told


def test_it_needs_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    assert entry.run(entry.cli, "finetune", ["lint", str(tmp_path / "job.yaml"), "--explain"]) == 2
    assert "say with --profile" in capsys.readouterr().err


def test_placements_are_told_in_words() -> None:
    place = explain.Placement("ZeRO3", 2, True, "OptimizerAndParameters")
    assert explain.told(place) == "ZeRO3, micro-batch 2, activations recomputed, all in the host's memory"
