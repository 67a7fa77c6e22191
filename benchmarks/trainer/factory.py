"""LLaMA-Factory's SFT with its defaults, run by its own Python; precision, batch and length are those of everybody."""

import os
from pathlib import Path

from task import Task, recorder


def main() -> None:
    task = Task.read()
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    from datasets import Dataset
    from llamafactory.train.tuner import run_exp

    tokenized = Path(task.folder, "tokenized")
    if not tokenized.exists():
        rows = Dataset.from_parquet(task.data, keep_in_memory=True)
        rows.map(lambda row: {"attention_mask": [1] * len(row["input_ids"])}).save_to_disk(str(tokenized))
    run_exp(
        {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": task.model,
            "finetuning_type": "lora",
            "lora_rank": task.lora_rank,
            "lora_target": "all",
            "template": "empty",
            "dataset": "prepared",
            "tokenized_path": str(tokenized),
            "cutoff_len": task.max_length,
            "packing": task.packed,
            "neat_packing": task.packed,
            "output_dir": task.folder,
            "max_steps": task.steps,
            "per_device_train_batch_size": task.micro,
            "gradient_accumulation_steps": task.accumulation,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "cosine",
            "use_cpu": task.device == "CPU",
            "bf16": task.dtype == "BFloat16",
            "seed": task.seed,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "overwrite_output_dir": True,
        },
        callbacks=[recorder(task)],
    )


if __name__ == "__main__":
    main()
