"""A gang of ranks as real processes over gloo: model and shards on each pod's disk, checkpoints and output in S3."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.failures import TerminationMessage
from finetune_api.run import PreparedData, RunConfig, Shard
from finetune_trainer.outcome import read_outcome
from finetune_trainer.underway import at_work
from finetune_trainer.workdir import WorkDir
from support import warm
from support.runs import JOB_UID, events_of, make_run_config
from support.s3 import S3, unused_port
from support.warm_start.sitecustomize import Fork

VOCABULARY = 64
SHAPE = {
    "architecture": "LlamaForCausalLM",
    "parameters": 20_000,
    "hiddenSize": 32,
    "layers": 2,
    "vocabSize": VOCABULARY,
    "linearParameters": 16_000,
    "targetFeatures": 1_000,
    "largestLayerParameters": 8_000,
    "maxPositions": 256,
    "dtype": "Float32",
}
SHORT_ANSWERS = {"generation": {"maxNewTokens": 4}}
"""For whoever does not look at what the model answers before and after: it would take most of the time."""
Example = tuple[list[int], list[int]]
"""Token ids and labels."""


def make_tiny_model(directory: Path) -> Path:
    """A Llama of 2 layers and 32 dimensions with random weights; each token is a word of its own: `t7 t8`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        # Larger than usual: random weights that differ enough for attention to matter.
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    words = ["<pad>", "<s>", "</s>", *(f"t{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 256}))
    return directory


def make_examples(count: int, seed: int = 0) -> list[Example]:
    """Sequences of constant stride, of 6 to 30 tokens; the first three tokens are the prompt."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        start, stride, length = rng.integers(3, VOCABULARY), rng.integers(1, 6), rng.integers(6, 31)
        ids = [int(3 + (start + stride * i) % (VOCABULARY - 3)) for i in range(length)]
        examples.append((ids, [-100] * 3 + ids[3:]))
    return examples


@dataclass
class Gang:
    """One job: `config` says how many pods and processes; every pod has a folder of its own below `directory`."""

    directory: Path
    config: RunConfig
    s3: S3
    model: Path
    train: dict[str, list[Example]]
    validation: list[Example] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    attempt_uid: str = "attempt-0"
    processes: list[Fork] = field(default_factory=list)

    def work(self, rank: int) -> WorkDir:
        return WorkDir(self.directory / f"pod-{rank // self.config.devices.processes_per_worker}" / "work")

    def start(self) -> "Gang":
        index = self._index()
        (self.directory / "run.json").write_text(self.config.model_dump_json(by_alias=True, exclude_none=True))
        port, devices = str(unused_port()), self.config.devices
        for rank in range(devices.world_size):
            work = self.work(rank)
            if rank % devices.processes_per_worker == 0:
                work.data.mkdir(parents=True, exist_ok=True)
                work.index.write_text(index.model_dump_json(by_alias=True, exclude_none=True))
                for shard in index.shards:
                    work.shard(shard.key).parent.mkdir(exist_ok=True)
                    work.shard(shard.key).write_bytes((self.directory / "shards" / shard.key).read_bytes())
                if not work.model.exists():
                    work.model.symlink_to(self.model)
            work.outcome(rank).unlink(missing_ok=True)
            self.processes.append(self._spawn(rank, port))
        return self

    def wait(self, timeout: float = 120.0) -> list[TerminationMessage]:
        """What each rank said; none may be silent."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        ended = [process.exitcode is not None for process in self.processes]
        self.kill()
        assert all(ended), f"the gang did not end:\n{self.log()}"
        ends = [read_outcome(self.work(rank).outcome(rank)) for rank in range(len(self.processes))]
        assert all(ends), self.log()
        return [end.message for end in ends if end]

    def run(self, timeout: float = 120.0) -> TerminationMessage:
        """Rank 0's message of a gang that must succeed."""
        messages = self.start().wait(timeout)
        assert [process.exitcode for process in self.processes] == [0] * len(self.processes), self.log()
        return messages[0]

    def until(self, condition: Callable[[], object], timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.log()
            assert all(process.is_alive() for process in self.processes), self.log()
            time.sleep(0.02)

    def signal(self, rank: int, number: int = signal.SIGTERM) -> None:
        pid = self.processes[rank].pid
        assert pid
        os.kill(pid, number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        while at_work(self.work(0)):  # as the launcher
            time.sleep(0.02)

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.directory.glob("rank-*.log")))

    def events(self, name: str) -> list[dict[str, Any]]:
        """Rank 0's log lines of one event."""
        return events_of(self.directory / "rank-0.log", name)

    def losses(self) -> list[float]:
        """The training loss of each step, from the published metrics.jsonl: over all attempts."""
        prefix = self.config.output_uri + self.attempt_uid
        lines = self.s3.get(f"{prefix}/metrics.jsonl").decode().splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]

    def published(self, directory: Path) -> Path:
        """The published files, downloaded into `directory`."""
        return self.fetch(f"{self.config.output_uri}{self.attempt_uid}/", directory)

    def fetch(self, uri: str, directory: Path) -> Path:
        """Everything below a prefix, downloaded into `directory`."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        for key in self.s3.keys(bucket, prefix):
            path = directory / key.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.s3.get(f"s3://{bucket}/{key}"))
        return directory

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints."""
        bucket, _, prefix = f"{self.config.scratch_uri}checkpoints/".removeprefix("s3://").partition("/")
        keys = self.s3.keys(bucket, prefix)
        return sorted(int(key.split("/step-")[1][:8]) for key in keys if key.endswith("/manifest.json"))

    def _spawn(self, rank: int, port: str) -> Fork:
        devices = self.config.devices
        env = os.environ | self.s3.environment | {
            "FINETUNE_RUN_CONFIG": str(self.directory / "run.json"),
            "FINETUNE_WORK_DIR": str(self.work(rank).root),
            "FINETUNE_POD_IP": "127.0.0.1",
            "FINETUNE_ATTEMPT_UID": self.attempt_uid,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % devices.processes_per_worker),
            "WORLD_SIZE": str(devices.world_size),
            "LOCAL_WORLD_SIZE": str(devices.processes_per_worker),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **warm.variables(),
        } | self.env  # fmt: skip
        log = self.directory / f"rank-{rank}.log"
        with log.open("wb") as output:
            return Fork("finetune_trainer.train", [], env, os.getcwd(), {1: output.fileno(), 2: output.fileno()})

    def _index(self) -> PreparedData:
        shards = [
            self._shard("train", name, number, examples) for number, (name, examples) in enumerate(self.train.items())
        ]
        if self.validation:
            shards.append(self._shard("validation", next(iter(self.train)), 0, self.validation))
        return PreparedData.model_validate(
            {
                "jobUid": JOB_UID,
                "specSha256": self.config.spec_sha256,
                "inputs": [],
                "datasetsSha256": dict.fromkeys(self.train, "d" * 64),
                "baseModel": [],
                "baseModelSha256": "b" * 64,
                "model": SHAPE,
                "shards": shards,
            }
        )

    def _shard(self, split: str, dataset: str, number: int, examples: list[Example]) -> Shard:
        key = f"{split}/{number:05d}.parquet"
        path = self.directory / "shards" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = pa.list_(pa.int32())
        columns = {"input_ids": [ids for ids, _ in examples], "labels": [labels for _, labels in examples]}
        pq.write_table(pa.table({name: pa.array(values, kind) for name, values in columns.items()}), path)
        return Shard.model_validate(
            {
                "key": key,
                "split": split,
                "dataset": dataset,
                "rows": len(examples),
                "tokens": sum(len(ids) for ids, _ in examples),
                "trainedTokens": sum(label != -100 for _, labels in examples for label in labels),
                "size": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        )


def make_gang(
    directory: Path,
    s3: S3,
    model: Path,
    *,
    bucket_prefix: str,
    workers: int = 2,
    processes: int = 1,
    strategy: str = "DDP",
    offload: str = "None",
    micro_batch: int = 2,
    examples: int = 64,
    validation: int = 10,
    training: dict[str, Any] | None = None,
    **spec: Any,
) -> Gang:
    """A LoRA job over stride sequences: 16 examples a step, 8 steps unless `training` says otherwise."""
    chosen: dict[str, Any] = {
        "globalBatchSize": 16,
        "maxSteps": 8,
        "learningRate": 0.02,
        "maxLength": 64,
        "warmupRatio": 0.1,
        "microBatchSize": micro_batch,
    } | (training or {})
    data = {
        "tuning": {"type": "LoRA", "lora": {"rank": 4, "alpha": 8}},
        "training": {name: value for name, value in chosen.items() if value is not None},
        "checkpoint": {"interval": {"type": "Steps", "steps": 1000}},
        "evaluation": SHORT_ANSWERS,
    } | spec
    # Of one that has ended well, too, tests look at what it saved.
    data["checkpoint"] = {"whenComplete": "Retain"} | data["checkpoint"]
    config = make_run_config(workers=workers, processes=processes, endpoint=s3.endpoint, **data)
    accumulation = chosen["globalBatchSize"] // (workers * processes * micro_batch)
    fields = config.to_json() | {
        "attempt": 0,
        "scratchUri": f"s3://bucket/{bucket_prefix}/.scratch/{JOB_UID}/",
        "outputUri": f"s3://bucket/{bucket_prefix}/bot/",
        "prepared": {
            "indexURI": f"s3://bucket/{bucket_prefix}/.scratch/{JOB_UID}/data/index.json",
            "indexSHA256": "0" * 64,
            "reportURI": f"s3://bucket/{bucket_prefix}/.scratch/{JOB_UID}/data/data-report.json",
            "model": SHAPE,
            "trainExamples": examples,
            "validationExamples": validation,
            "testExamples": 0,
            "trainTokens": 1,
            "dropped": 0,
            "maxTokens": 30,
        },
        "sizing": {
            "strategy": strategy,
            "microBatchSize": micro_batch,
            "gradientAccumulation": accumulation,
            "offload": offload,
            "memoryPerGPU": 1,
        },
    }
    directory.mkdir(parents=True, exist_ok=True)
    names = [dataset.name for dataset in config.spec.datasets]
    train = {name: make_examples(examples, seed) for seed, name in enumerate(names)}
    return Gang(
        directory,
        RunConfig.model_validate(fields),
        s3,
        model,
        train,
        make_examples(validation, 99) if validation else [],
    )
