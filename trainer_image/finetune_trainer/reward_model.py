"""A reward model that judges: frozen, whole on every rank, and not a part of what is trained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers.integrations import deepspeed

from finetune_api.stages import reward_stage
from finetune_trainer.distributed import Ranks
from finetune_trainer.expressions import expressions_of
from finetune_trainer.methods.scoring import Scoring
from finetune_trainer.model import attention_of, dtype_of, load_model, reading
from finetune_trainer.rewards import Rewards
from finetune_trainer.start import StageRun, Start, make_result_ready, result_of
from finetune_trainer.storage import Store


class RewardModel:
    def __init__(self, start: Start, dtype: torch.dtype, attention: str, device: torch.device) -> None:
        """Raises ModelInvalid."""
        with without_partitioning():
            model = load_model(start.model, dtype, attention, device, task="SEQ_CLS")
            if start.adapter:
                with reading("the reward model cannot be loaded", start.adapter):
                    model = PeftModel.from_pretrained(model, start.adapter, local_files_only=True)
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self._scoring = Scoring(model.config)

    def score(self, rows: Sequence[Sequence[int] | np.ndarray[Any, Any]]) -> torch.Tensor:
        """(rows,) in float64: what each row of tokens is worth. Not collective."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.as_tensor(np.asarray(row, dtype=np.int64))
        device = next(self.model.parameters()).device
        with torch.no_grad():
            found = self._scoring(self.model, {"input_ids": ids.to(device), "lengths": lengths.to(device)})
        return found[:, 0].double()


@contextmanager
def without_partitioning() -> Iterator[None]:
    """Under ZeRO-3 transformers would partition every model that it loads, also one that no engine gathers again."""
    known = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = known


def load_rewards(run: StageRun, store: Store, ranks: Ranks) -> Rewards:
    """Of the stage that is trained. Collective: one rank of each pod fetches an earlier stage's reward model."""
    spec, devices, judged_by = run.stage.spec, run.config.devices, reward_stage(run.stages, run.number)
    if judged_by is not None and ranks.local_rank == 0:
        make_result_ready(store, run.job, run.work, run.stages, judged_by)
    ranks.barrier()
    judge, dtype = judge_of(run), dtype_of(spec, devices)
    model = RewardModel(judge, dtype, attention_of(dtype, devices), ranks.device) if judge else None
    with reading("the tokenizer cannot be loaded", run.start.model):
        tokenizer = Tokenizer.from_file(str(run.start.model / "tokenizer.json"))
    return Rewards(tokenizer, expressions_of(spec.method), model)


def judge_of(run: StageRun) -> Start | None:
    """The reward model that the stage names, else that of the Reward stage before it."""
    rollout, work = run.stage.spec.method.rollout, run.work
    if rollout and rollout.reward_model:
        is_adapter = (work.reward_model / "adapter_config.json").exists()
        return Start(work.model, work.reward_model) if is_adapter else Start(work.reward_model, None)
    stage = reward_stage(run.stages, run.number)
    return None if stage is None else result_of(work, run.stages, stage)
