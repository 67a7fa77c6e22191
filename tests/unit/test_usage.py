"""What the model card says of loading what was published is run as it stands, and is the model that was trained."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_utils import set_seed

from finetune_api.formats import kind_of
from finetune_api.tuning import Tuning
from finetune_trainer import save, tuning
from finetune_trainer.card import model_card
from finetune_trainer.facts import Facts
from finetune_trainer.methods import task_of
from finetune_trainer.model import load_model, trained_parameters
from finetune_trainer.usage import HERE, base_of
from support.telling import make_data_report, make_facts
from support.tiny import CHATML, make_tiny_model

NAMES = ["ham", "spam"]
LABELLED = {"datasets": [{"name": "pairs", "uri": "s3://bucket/data/pairs.jsonl", "format": "Labelled"}]}
CASES: dict[str, dict[str, Any]] = {
    "adapter": {},
    "adapter of a chat model": {"data": {"": make_data_report(renderedBy="model")}},
    "prompt": {"tuning": {"type": "PromptTuning", "promptTuning": {"tokens": 3}}},
    "merged": {"output": {"uri": "s3://bucket/out/", "merged": True}},
    "whole model": {"tuning": {"type": "Full"}},
    "reward model": {"method": {"type": "Reward"}},
    "whole reward model": {"method": {"type": "Reward"}, "tuning": {"type": "Freeze"}},
    "classifier": LABELLED | {"classes": NAMES},
    "merged classifier": LABELLED | {"classes": NAMES, "output": {"uri": "s3://bucket/out/", "merged": True}},
    "whole classifier": LABELLED | {"classes": NAMES, "tuning": {"type": "Full"}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"), chat_template=CHATML)


def publish(facts: Facts, base: Path, directory: Path) -> Any:
    """Saves a model whose trained weights are not those that it began with, as a gang does; returns it."""
    wanted, classes = facts.spec.tuning, facts.evidence.classes
    task = task_of(facts.spec.method, kind_of(facts.spec.method.type, facts.spec.datasets))
    set_seed(0)
    model = load_model(base, torch.float32, "sdpa", None, task=task, classes=classes)
    model = tuning.tune(model, wanted, facts.run.base_model_uri, 0, False, masters=True, task=task)
    for parameter in trained_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    parameters = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
    if wanted.is_adapter:
        save.save_adapter(model, parameters, {}, directory)
        if classes:
            save.save_classes(base, classes, directory)
        if facts.spec.output.merged:
            save.save_merged(base, wanted, torch.float32, task, classes, directory, directory / "merged")
            save.copy_tokenizer(base, directory / "merged")
    else:
        save.save_model(base, torch.float32, task, classes, parameters, directory)
    save.copy_tokenizer(base, directory)
    return model.eval()


def run(card: str, facts: Facts, base: Path, folder: Path) -> dict[str, Any]:
    """The names that the card's Python leaves behind."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for words, path in ((HERE, folder), (base_of(facts), base)):
        code = code.replace(words, str(path))
    assert "<" not in code
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found[:, -5:] if found.dim() == 3 else found


@pytest.mark.parametrize("name", CASES)
def test_what_the_card_says_runs_and_is_what_was_trained(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = dict(CASES[name])
    whole = not Tuning.model_validate(case.get("tuning", {})).is_adapter
    facts = make_facts(kind="Model" if whole else "Adapter", **case)
    trained = publish(facts, base, tmp_path)
    capsys.readouterr()
    found = run(model_card(facts), facts, base, tmp_path)
    said = capsys.readouterr().out.strip("\n")
    assert torch.allclose(logits(found["model"]), logits(trained), atol=1e-5)
    if facts.evidence.classes:
        assert said in NAMES
    elif facts.scores:
        assert re.fullmatch(r"-?\d+\.\d+(e-\d+)?", said)
    else:
        assert found["answer"].shape[0] > 0
    if facts.spec.output.merged:
        merged = facts._replace(kind="Model")
        assert "`merged` is a whole model" in model_card(facts)
        found = run(model_card(merged), merged, base, tmp_path / "merged")
        assert torch.allclose(logits(found["model"]), logits(trained), atol=1e-4)
