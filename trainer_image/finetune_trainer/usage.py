"""How what is published is loaded: Python that runs once the words between angle brackets are replaced."""

from finetune_trainer.facts import Facts

HERE = "<this folder>"


def base_of(facts: Facts) -> str:
    """What stands for the base model."""
    return f"<a copy of {facts.run.base_model_uri}>"


def snippet(facts: Facts) -> str:
    """Loads the model and asks it something."""
    task = "SequenceClassification" if facts.scores else "CausalLM"
    adapter = facts.kind == "Adapter"
    named = adapter and bool(facts.evidence.classes)
    options = ", config=config" if named else ", num_labels=1" if adapter and facts.scores else ""
    kinds = [*(["AutoConfig"] if named else []), f"AutoModelFor{task}", "AutoTokenizer"]
    lines = [
        *(["from peft import PeftModel"] if adapter else []),
        f"from transformers import {', '.join(kinds)}",
        "",
        *([f'config = AutoConfig.from_pretrained("{HERE}")'] if named else []),
        f'model = AutoModelFor{task}.from_pretrained("{base_of(facts) if adapter else HERE}"{options})',
        *([f'model = PeftModel.from_pretrained(model, "{HERE}")'] if adapter else []),
        f'tokenizer = AutoTokenizer.from_pretrained("{HERE}")',
        "",
        *_asked(facts),
    ]
    return "\n".join(lines)


def _asked(facts: Facts) -> list[str]:
    if facts.evidence.classes:
        return [
            'ids = tokenizer("A text.", return_tensors="pt").input_ids',
            "print(model.config.id2label[int(model(input_ids=ids).logits.argmax())])",
        ]
    if facts.scores:
        return [
            'ids = tokenizer("A question and its answer.", return_tensors="pt").input_ids',
            "print(float(model(input_ids=ids).logits))",
        ]
    if _is_chat(facts):
        question = '[{"role": "user", "content": "A question."}]'
        ids = f'tokenizer.apply_chat_template({question}, add_generation_prompt=True, return_tensors="pt").input_ids'
    else:
        ids = 'tokenizer("A question.", return_tensors="pt").input_ids'
    return [
        f"ids = {ids}",
        "answer = model.generate(input_ids=ids, max_new_tokens=64)[0, ids.shape[1] :]",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]


def _is_chat(facts: Facts) -> bool:
    """Whether it learned from the model's own chat template."""
    report = facts.data.get(facts.stages[-1].name, {})
    return any(dataset.get("renderedBy") == "model" for dataset in report.get("datasets", []))
