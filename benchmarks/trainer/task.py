"""What a contender is told and what it writes down. It imports nothing that a peer's environment may lack."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    model: str
    """A folder."""
    data: str
    """A parquet file: `input_ids` and `labels` of each example, -100 where nothing is learned."""
    folder: str
    """For what a contender writes; its own."""
    device: str
    """CPU or CUDA."""
    dtype: str
    packed: bool
    micro: int
    """Rows of a forward pass."""
    accumulation: int
    """Forward passes of a step."""
    steps: int
    max_length: int
    lora_rank: int
    seed: int
    ranks: int = 1

    @property
    def record(self) -> Path:
        return Path(self.folder, "record.jsonl")

    def write(self) -> Path:
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        path = Path(self.folder, "task.json")
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def read(cls) -> "Task":
        return cls(**json.loads(Path(sys.argv[1]).read_text()))


class Record:
    """One line for each optimizer step: when it ended, and its useful tokens."""

    def __init__(self, task: Task) -> None:
        self._file = task.record.open("w")

    def step(self, tokens: int) -> None:
        self._file.write(json.dumps({"at": time.time(), "tokens": tokens}) + "\n")
        self._file.flush()


def recorder(task: Task) -> Any:
    """A callback for any transformers Trainer. It counts the tokens of the rows that go into each batch."""
    import torch
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self._record, self._counts = Record(task), []

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loader = kwargs["train_dataloader"]
            loader = getattr(loader, "base_dataloader", loader)
            collate = loader.collate_fn

            def counted(features: list[dict[str, Any]]) -> Any:
                self._counts.append(sum(len(feature["input_ids"]) for feature in features))
                return collate(features)

            loader.collate_fn = counted

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if task.device == "CUDA":
                torch.cuda.synchronize()
            # The loader is a batch ahead: batches are counted in their order, not as they come.
            taken, self._counts = self._counts[: task.accumulation], self._counts[task.accumulation :]
            self._record.step(sum(taken))

    return Recorder()
