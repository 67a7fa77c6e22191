"""A manifest in, a verified adapter out: the real operator, real pods as processes, real S3 protocol."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.laptop import BUCKET, Laptop

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400), pytest.mark.gang]


def wait_for(probe: Callable[[], Any], what: str, timeout: float, until: Callable[[Any], object] = bool) -> Any:
    """The first value of `probe` that `until` accepts. TimeoutError with the last one."""
    deadline = time.monotonic() + timeout
    while True:
        value = probe()
        if until(value):
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {timeout:.0f} s; last: {value!r}")
        time.sleep(0.3)


def ranks_of(job: str) -> dict[int, int]:
    """Rank -> process number of a job's rank processes that live on this machine."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            env = dict(pair.partition(b"=")[::2] for pair in (entry / "environ").read_bytes().split(b"\0"))
        except (OSError, ValueError):
            continue
        if b"finetune_trainer.train" in command and env.get(b"FINETUNE_POD_NAME", b"").startswith(f"{job}-".encode()):
            found[int(env[b"RANK"])] = int(entry.name)
    return found


def test_two_workers_from_manifest_to_verified_adapter(laptop: Laptop, tmp_path: Path) -> None:
    manifest = laptop.manifest("main", distribution={"workers": 2})
    ran = laptop.finetune("run", "-f", str(manifest))
    assert ran.code == 0, ran.out + ran.err
    job = laptop.job("main")
    status = job["status"]
    assert status["state"] == "Complete"
    assert [(a["number"], a["outcome"]) for a in status["attempts"]] == [(0, "Succeeded")]
    assert status["attemptCount"] == 1
    assert status["gpus"] == 2
    metrics = status["result"]["metrics"]
    assert metrics["evalLoss"] < metrics["evalLossBefore"] - 0.2
    assert status["data"]["trainExamples"] + status["data"]["validationExamples"] == 240
    assert status["trainerStatus"]["step"] == 30
    uri = status["result"]["uri"]
    assert uri in ran.out
    # It can be loaded with nothing but peft, and every byte is what the manifest says.
    adapter = tmp_path / "adapter"
    fetched = laptop.finetune("fetch", "main", "-o", str(adapter))
    assert fetched.code == 0, fetched.err
    assert_answers(adapter, laptop.directory / "tiny")
    # Nothing that is not the job's own was touched, and nothing is left at the top of the output.
    assert {key.split("/")[1] for key in laptop.keys("adapters/")} <= {"main", ".scratch"}


def assert_answers(adapter: Path, base: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"s3://{BUCKET}/models/tiny/"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    after, before = 0.0, 0.0
    for row in map(json.loads, (base.parent / "facts.jsonl").read_text().splitlines()[:40]):
        head = tokenizer(row["prompt"])["input_ids"]
        tail = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        tail.append(tokenizer.eos_token_id)
        ids = torch.tensor([head + tail])
        labels = torch.tensor([[-100] * len(head) + tail])
        with torch.no_grad():
            after += float(model(input_ids=ids, labels=labels).loss) / 40
            with model.disable_adapter():
                before += float(model(input_ids=ids, labels=labels).loss) / 40
    assert after < before - 0.1


def test_kill_of_a_rank_resumes_and_publishes_once(laptop: Laptop) -> None:
    manifest = laptop.manifest(
        "killed",
        distribution={"workers": 2},
        training={"maxSteps": 300, "learningRate": 0.005, "globalBatchSize": 8, "maxLength": 128},
        checkpoint={"interval": {"type": "Steps", "steps": 20}},
    )
    assert laptop.finetune("submit", "-f", str(manifest)).code == 0
    scratch = f"adapters/.scratch/{laptop.job('killed')['metadata']['uid']}/checkpoints/"
    wait_for(lambda: [key for key in laptop.keys(scratch) if key.endswith("manifest.json")], "checkpoint", timeout=120)
    victims = ranks_of("killed")
    assert set(victims) == {0, 1}
    os.kill(victims[1], signal.SIGKILL)
    ran = laptop.finetune("wait", "killed", "--timeout", "240", timeout=260)
    status = laptop.job("killed")["status"]
    assert ran.code == 0, (ran.out, ran.err, status)
    first, second = status["attempts"]
    assert (first["outcome"], first["reason"], first["rank"]) == ("Retryable", "RankFailed", 1), first
    assert second["outcome"] == "Succeeded"
    assert second["resumedFromStep"] >= 20
    manifests = [key for key in laptop.keys("adapters/killed/") if key.endswith("manifest.json")]
    assert len(manifests) == 1
    assert {key.split("/")[2] for key in laptop.keys("adapters/killed/")} == {second["uid"]}
    assert wait_for(lambda: not ranks_of("killed"), "end of all ranks", timeout=30)


def test_suspend_and_resume_continues(laptop: Laptop) -> None:
    manifest = laptop.manifest(
        "paused", training={"maxSteps": 1500, "learningRate": 0.005, "globalBatchSize": 8, "maxLength": 128}
    )
    assert laptop.finetune("submit", "-f", str(manifest)).code == 0
    wait_for(
        lambda: (laptop.job("paused")["status"].get("trainerStatus") or {}).get("step", 0) >= 5, "step 5", timeout=120
    )
    assert laptop.finetune("suspend", "paused").code == 0
    wait_for(lambda: laptop.job("paused")["status"]["state"] == "Suspended", "suspension", timeout=30)
    wait_for(lambda: not ranks_of("paused"), "end of the ranks", timeout=60)
    assert laptop.finetune("resume", "paused").code == 0
    ran = laptop.finetune("wait", "paused", "--timeout", "240", timeout=260)
    status = laptop.job("paused")["status"]
    assert ran.code == 0, (ran.out, ran.err, status)
    first, second = status["attempts"]
    assert first["outcome"] == "Preempted"
    assert second["outcome"] == "Succeeded"
    assert second["resumedFromStep"] >= 5


def test_deletion_ends_the_pods_and_leaves_the_data(laptop: Laptop) -> None:
    manifest = laptop.manifest("gone", training={"maxSteps": 100000, "globalBatchSize": 8, "maxLength": 128})
    assert laptop.finetune("submit", "-f", str(manifest)).code == 0
    wait_for(lambda: ranks_of("gone"), "ranks", timeout=120)
    before = laptop.keys("data/") | laptop.keys("models/")
    assert laptop.finetune("delete", "gone").code == 0
    wait_for(lambda: not ranks_of("gone"), "end of the ranks", timeout=60)
    assert laptop.keys("data/") | laptop.keys("models/") == before


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    # name: (spec, reason, words of the message)
    "no-bucket": (
        {"datasets": [{"name": "a", "uri": "s3://no-such-bucket/a.jsonl"}]},
        "Storage",
        "no-such-bucket",
    ),
    "no-key": ({"datasets": [{"name": "a", "uri": f"s3://{BUCKET}/data/absent.jsonl"}]}, "DataInvalid", "absent.jsonl"),
    "bad-line": ({"datasets": [{"name": "a", "uri": f"s3://{BUCKET}/bad/line.jsonl"}]}, "DataInvalid", "line 3"),
    "no-output": ({"output": {"uri": "s3://no-such-bucket/out/"}}, "Storage", "no-such-bucket"),
    "no-model": ({"baseModel": {"uri": f"s3://{BUCKET}/models/absent/"}}, "ModelInvalid", "models/absent/"),
    "bad-model": ({"baseModel": {"uri": f"s3://{BUCKET}/bad/model/"}}, "ModelInvalid", "config.json"),
    "pickle": ({"baseModel": {"uri": f"s3://{BUCKET}/bad/pickle/"}}, "ModelInvalid", "safetensors"),
    "no-module": (
        {"tuning": {"type": "LoRA", "lora": {"targetModules": ["q_prj"]}}},
        "InvalidSpec",
        "q_proj",
    ),
    "too-few": (
        {"training": {"globalBatchSize": 3}, "distribution": {"workers": 2}},
        "DoesNotFit",
        "training.globalBatchSize",
    ),
    "no-rewards": ({"method": {"type": "PPO"}}, "InvalidSpec", "spec.method.ppo.rewardModel"),
    "no-profile": ({"profile": "absent"}, "ProfileNotFound", "absent"),
}


def test_bad_input_ends_in_a_sentence_within_a_minute_and_costs_nothing(laptop: Laptop, tmp_path: Path) -> None:
    line = tmp_path / "line.jsonl"
    line.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n{"prompt": oops}\n')
    laptop.put(line, "bad/line.jsonl")
    for path in (laptop.directory / "tiny").iterdir():
        laptop.put(path, f"bad/model/{path.name}")
        if path.suffix != ".safetensors":
            laptop.put(path, f"bad/pickle/{path.name}")
    garbage = tmp_path / "config.json"
    garbage.write_text("not json")
    laptop.put(garbage, "bad/model/config.json")
    laptop.put(garbage, "bad/pickle/pytorch_model.bin")
    before = {key: tag for key, tag in laptop.keys().items() if "/.scratch/" not in key}

    started = time.monotonic()
    for name, (spec, _, _) in BAD.items():
        ran = laptop.finetune("submit", "-f", str(laptop.manifest(name, **spec)))
        # What lint knows to be wrong is refused at once, and is not a job then.
        assert ran.code in (0, 2), (name, ran.err)
        if ran.code == 2:
            assert BAD[name][2] in ran.err, (name, ran.err)
    jobs = json.loads(laptop.finetune("list", "-o", "json").out)["items"]
    waiting = {job["metadata"]["name"] for job in jobs} & set(BAD)
    assert len(waiting) >= 8

    def unfinished() -> dict[str, Any]:
        jobs = {name: laptop.job(name).get("status", {}) for name in waiting}
        return {name: status.get("message") for name, status in jobs.items() if not said(status, BAD[name][1])}

    wait_for(unfinished, "end of every bad job", timeout=110, until=lambda left: not left)
    # Ten jobs prepare on two cores at once: a minute is for one of them, the slowest of all took this long.
    assert time.monotonic() - started < 120
    for name in waiting:
        job, (_, reason, words) = laptop.job(name), BAD[name]
        assert words in job["status"]["message"], (name, job["status"])
        assert not job["status"].get("attempts"), name
        assert reason in str(job["status"]["conditions"]), name
    assert {key: tag for key, tag in laptop.keys().items() if "/.scratch/" not in key} == before


def said(status: dict[str, Any], reason: str) -> bool:
    """Whether a condition gives the reason (ProfileNotFound is no end: profiles come)."""
    return any(c["reason"].startswith(reason) for c in status.get("conditions", ()))


@pytest.mark.parametrize(
    ("changes", "line", "words"),
    [
        ({"foo": 1}, "foo: 1", "spec.foo"),
        ({"distribution": {"workers": -1}}, "workers: -1", "spec.distribution.workers"),
        ({"training": {"epochs": 1, "maxSteps": 2}}, "training:", "epochs and maxSteps cannot both be given"),
    ],
)
def test_an_invalid_manifest_is_refused_with_its_line(
    laptop: Laptop, changes: dict[str, Any], line: str, words: str
) -> None:
    path = laptop.manifest("invalid", **changes)
    for command in ("lint", "submit", "run"):
        ran = laptop.finetune(*([command, str(path)] if command == "lint" else [command, "-f", str(path)]))
        assert ran.code == 2, (command, ran)
        text = ran.out + ran.err
        assert words in text, (command, text)
        number = [text.strip() for text in path.read_text().splitlines()].index(line) + 1
        assert f"{path.name}:{number}" in text, (command, text)
