"""What ours is compared with: transformers' Trainer with its own checkpoints, run by torchrun, which restarts it.

    torchrun --nproc-per-node 2 --max-restarts 3 plain.py <model> <output> <steps> <steps between checkpoints>

The model, the adapter, the batches' size and the number of steps are those of the job beside it. Every step is a line.
"""

import os
import sys
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


class Tell(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        print(f"step {state.global_step} {time.time()} {os.getpid()} {os.environ['RANK']}", flush=True)


def main(model: str, output: str, steps: int, every: int) -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (64, 24)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    base = AutoModelForCausalLM.from_pretrained(model)
    tuned = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    arguments = TrainingArguments(
        output_dir=output,
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=8,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        ddp_backend="gloo",
    )
    trainer = Trainer(model=tuned, args=arguments, train_dataset=rows, callbacks=[Tell()])
    found = get_last_checkpoint(output) if os.path.isdir(output) else None
    trainer.train(resume_from_checkpoint=found)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
