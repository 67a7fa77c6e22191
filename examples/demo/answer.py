"""`python answer.py BASE_MODEL ADAPTER QUESTION…` answers with plain transformers and peft, and nothing of ours."""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def main(base: Path, adapter: Path, questions: list[str]) -> None:
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    for question in questions:
        print(f"Q: {question}")
        with model.disable_adapter():
            print(f"   base model:   {answer(model, tokenizer, question)}")
        print(f"   with adapter: {answer(model, tokenizer, question)}", flush=True)


def answer(model: PeftModel, tokenizer: AutoTokenizer, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=48, do_sample=False, repetition_penalty=1.3)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
