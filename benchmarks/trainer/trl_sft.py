"""TRL's SFTTrainer as its documentation shows it; precision, batch and length are those of everybody here."""

from task import Task, recorder
from transformers import AutoTokenizer


def main() -> None:
    task = Task.read()
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_parquet(task.data, keep_in_memory=True)
    rows = rows.map(lambda row: {"completion_mask": [int(label != -100) for label in row["labels"]]})
    trainer = SFTTrainer(
        model=task.model,
        args=SFTConfig(
            output_dir=task.folder,
            max_steps=task.steps,
            per_device_train_batch_size=task.micro,
            gradient_accumulation_steps=task.accumulation,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            max_length=task.max_length,
            packing=task.packed,
            completion_only_loss=True,
            use_cpu=task.device == "CPU",
            bf16=task.dtype == "BFloat16",
            seed=task.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows.remove_columns("labels"),
        processing_class=AutoTokenizer.from_pretrained(task.model),
        peft_config=LoraConfig(
            r=task.lora_rank, lora_alpha=2 * task.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[recorder(task)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
