"""Where things lie below $FINETUNE_WORK_DIR: the one place that the launcher and the ranks agree on.

A stage of a job with stages has folders of its own in `data`, `checkpoints` and `output`; else they are the job's.

model/                    the base model, as pulled (config.json, *.safetensors, tokenizer files)
adapter/                  the earlier adapter, where the job starts from one
reward-model/             the reward model, where one is named; of a stage in a folder of its own
data/index.json           finetune_api.run.PreparedData
data/<Shard.key>          every shard under its key
checkpoints/step-…/       checkpoints, being stored or being resumed
uploader.lock             held while a checkpoint may still be on its way
output/                   what is published
teachers/<name>/          the model that a stage which generates asks, where that is another one
outcomes/rank-<r>.json    how rank r ended
heartbeats/rank-<r>       where rank r is, and beside it the stacks that it was asked for
traffic/                  how many bytes each client has moved from and to the object store
finished                  how many stages were finished by earlier attempts
stages/<name>/            the result of a stage that is finished
merged/<name>/            that result's adapter worked into the model that it was trained on
"""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WorkDir:
    root: Path
    stage: str = ""

    @classmethod
    def from_env(cls) -> "WorkDir":
        return cls(Path(os.environ["FINETUNE_WORK_DIR"]))

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def reward_model(self) -> Path:
        return self.root / "reward-model" / self.stage

    @property
    def judge(self) -> Path:
        """The reward model of spec.evaluation."""
        return self.root / "judge"

    @property
    def data(self) -> Path:
        return self.root / "data" / self.stage

    @property
    def index(self) -> Path:
        return self.data / "index.json"

    def shard(self, key: str) -> Path:
        """The file of a `Shard.key`, which is relative to the prefix of the index."""
        return self.data / key

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints" / self.stage

    @property
    def uploader_lock(self) -> Path:
        """Held while a process of this pod may still be storing a checkpoint."""
        return self.root / "uploader.lock"

    @property
    def output(self) -> Path:
        return self.root / "output" / self.stage

    @property
    def teacher(self) -> Path:
        return self.root / "teachers" / self.stage

    def of_stage(self, name: str) -> "WorkDir":
        return WorkDir(self.root, name)

    @property
    def finished(self) -> Path:
        """Written by the pull, read by the launcher: how many stages need not run again."""
        return self.root / "finished"

    def result(self, stage: str) -> Path:
        return self.root / "stages" / stage

    def merged(self, stage: str) -> Path:
        return self.root / "merged" / stage

    @property
    def outcomes(self) -> Path:
        return self.root / "outcomes"

    def heartbeat(self, name: str) -> Path:
        """Of `pull`, `rank-0` and so on: see `heartbeat`."""
        return self.root / "heartbeats" / name

    def outcome(self, rank: int) -> Path:
        """Written by rank `rank` when it ends, read by the launcher."""
        return self.outcomes / f"rank-{rank}.json"
