"""The floor: a training loop as one writes it by hand, over the same rows as ours where they are packed."""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from task import Record, Task
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup
from workload import examples_of, plan_of

from finetune_trainer.batches import Batch, Examples, collate

DTYPES = {"Float32": torch.float32, "BFloat16": torch.bfloat16}


def main() -> None:
    task = Task.read()
    device = torch.device("cuda" if task.device == "CUDA" else "cpu")
    torch.manual_seed(task.seed)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=DTYPES[task.dtype], attn_implementation="sdpa")
    model = get_peft_model(
        model.to(device),
        LoraConfig(r=task.lora_rank, lora_alpha=2 * task.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.config.use_cache = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=task.device == "CUDA" or None)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * task.steps), task.steps)
    record, examples = Record(task), examples_of(Path(task.data))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=task.dtype == "BFloat16")
    model.train()
    for batches, tokens in steps(task, examples):
        learned = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            with autocast:
                logits = model(**inputs).logits
                loss = torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
                )
            (loss / learned).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        record.step(tokens)


def steps(task: Task, examples: Examples) -> "list[tuple[list[Batch], int]]":
    """The micro-batches of each step, and their useful tokens."""
    if task.packed or "--planned" in sys.argv:
        plan = plan_of(task, examples)
        return [
            (
                [
                    collate(examples, [plan.rows.examples(int(row)) for row in ids], task.packed)
                    for ids in plan.micro_steps(step, 0, 1, task.micro)
                ],
                int(plan.rows.lengths[plan.step(step)].sum()),
            )
            for step in range(task.steps)
        ]
    order = np.random.default_rng(task.seed).permutation(len(examples))
    chosen = order[: task.steps * task.micro * task.accumulation].reshape(task.steps, task.accumulation, task.micro)
    return [([padded(examples, ids) for ids in micros], int(examples.lengths[micros].sum())) for micros in chosen]


def padded(examples: Examples, ids: np.ndarray) -> Batch:
    """Rows as they come, padded to the longest, with an attention mask."""
    rows = [slice(examples.offsets[i], examples.offsets[i + 1]) for i in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = [torch.from_numpy(examples.input_ids[row].astype(np.int64)) for row in rows]
    labels = [torch.from_numpy(examples.labels[row].astype(np.int64)) for row in rows]
    return {
        "input_ids": pad(inputs, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(row) for row in inputs], batch_first=True),
    }


if __name__ == "__main__":
    main()
