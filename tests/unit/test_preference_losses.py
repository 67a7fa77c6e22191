"""The losses of preferences: by hand, and against TRL's own trainers on the same model and batch."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune_api.method import Method
from finetune_trainer.batches import IGNORED, Examples
from finetune_trainer.methods import PREFERENCE
from finetune_trainer.methods.kto import KTOTrainer, tally_of_verdicts
from finetune_trainer.methods.losses import (
    dpo_losses,
    kl_estimate,
    kto_losses,
    odds_ratio_losses,
    reward_losses,
    sequence_log_probs,
)
from finetune_trainer.methods.preference import PreferenceTrainer, figures_of, tally_of_pairs, total_loss
from finetune_trainer.methods.scoring import padded, unused_at_end
from finetune_trainer.preferences import collate_pairs, collate_unpaired, others_of, rows_of_pairs, swap_answers
from finetune_trainer.shards import Pairs, Unpaired
from support.gang import VOCABULARY, make_tiny_model

ROWS = 5


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def examples(rows: list[tuple[list[int], list[int]]]) -> Examples:
    """Token ids and labels of each row."""
    flat = [np.concatenate([row[part] for row in rows]).astype(np.int32) for part in (0, 1)]
    return Examples(flat[0], flat[1], np.cumsum([0, *(len(ids) for ids, _ in rows)]), np.zeros(len(rows), np.int64))


def answered(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
    return prompt + answer, [IGNORED] * len(prompt) + answer


def test_log_probabilities_are_of_the_labelled_tokens() -> None:
    logits, labels = torch.randn(2, 4, 6), torch.tensor([[IGNORED, 3, 1, IGNORED], [IGNORED] * 4])
    sums, counts = sequence_log_probs(logits, labels)
    known = logits.log_softmax(-1)
    assert sums.tolist() == pytest.approx([float(known[0, 0, 3] + known[0, 1, 1]), 0.0], abs=1e-6)
    assert counts.tolist() == [2, 0]
    # Virtual tokens come before the row's own.
    longer = torch.cat([torch.randn(2, 3, 6), logits], dim=1)
    assert torch.equal(sequence_log_probs(longer, labels)[0], sums)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("Sigmoid", -math.log(sigmoid(0.5 * 3))), ("Hinge", 0.0), ("IPO", (2 / 4 + 1 / 2 - 1) ** 2)],
)
def test_dpo(kind: Any, expected: float) -> None:
    counts = torch.tensor([4]), torch.tensor([2])
    loss = dpo_losses(torch.tensor([2.0]), torch.tensor([-1.0]), counts, 0.5, kind)
    assert loss.tolist() == pytest.approx([expected], abs=1e-6)


def test_kto_weighs_good_and_bad_answers_about_its_reference_point() -> None:
    ratios, desirable = torch.tensor([1.0, 1.0]), torch.tensor([True, False])
    losses = kto_losses(ratios, desirable, torch.tensor(0.5), 0.2, 2.0, 3.0)
    assert losses.tolist() == pytest.approx([2 * (1 - sigmoid(0.1)), 3 * (1 - sigmoid(-0.1))])
    assert float(kl_estimate(torch.tensor(-3.0), 2)) == 0
    assert float(kl_estimate(torch.tensor(3.0), 2)) == 1.5


def test_odds_and_rewards() -> None:
    def odds(x: float) -> float:
        return math.exp(x) / (1 - math.exp(x))

    loss = odds_ratio_losses(torch.tensor([-0.1, -2.0]), torch.tensor([-1.0, -0.5]), 0.3)
    ratios = [odds(-0.1) / odds(-1.0), odds(-2.0) / odds(-0.5)]
    assert loss.tolist() == pytest.approx([-0.3 * math.log(sigmoid(math.log(ratio))) for ratio in ratios], rel=1e-5)
    assert reward_losses(torch.tensor([2.0]), torch.tensor([0.5]), 0.01).tolist() == pytest.approx(
        [-math.log(sigmoid(1.5)) + 0.01 * 2.5**2]
    )


@pytest.mark.parametrize("certain", [0.0, -1e-9, -80.0])
def test_an_answer_that_is_certain_or_impossible_has_a_gradient(certain: float) -> None:
    chosen = torch.tensor([certain], requires_grad=True)
    loss = odds_ratio_losses(chosen, torch.tensor([-1.0]), 0.1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert chosen.grad is not None
    assert math.isfinite(loss.item())
    assert math.isfinite(float(chosen.grad))


def test_a_tie_is_half_right() -> None:
    pairs = tally_of_pairs(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 3.0]))
    assert figures_of(pairs.tolist()) == pytest.approx(
        {"rewardMargin": 1 / 3 - 1, "preferenceAccuracy": 0.5, "chosenReward": 1 / 3, "rejectedReward": 1.0}
    )
    verdicts = tally_of_verdicts(torch.tensor([1.0, 0.5, 2.0]), torch.tensor(0.5), torch.tensor([True, False, False]))
    assert figures_of(verdicts.tolist()) == pytest.approx(
        {"rewardMargin": -0.25, "preferenceAccuracy": 0.5, "chosenReward": 1.0, "rejectedReward": 1.25}
    )
    assert figures_of([0.0] * 6)["rewardMargin"] == 0


def test_pairs_are_one_batch_and_as_long_as_both() -> None:
    pairs = Pairs(
        examples([answered([7, 8], [9]), answered([7], [8, 9] * 5)]),
        examples([answered([7, 8], [5, 6]), answered([7], [3])]),
    )
    batch = collate_pairs(pairs, np.array([1, 0]))
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 16)
    assert batch["input_ids"][2:, :4].tolist() == [[7, 3, 0, 0], [7, 8, 5, 6]]
    assert batch["labels"][2:, :4].tolist() == [[IGNORED, 3, IGNORED, IGNORED], [IGNORED, IGNORED, 5, 6]]
    assert batch["lengths"].tolist() == [11, 3, 2, 4]
    rows = rows_of_pairs(pairs)
    assert rows.lengths.tolist() == [7, 13]
    assert rows.trained.tolist() == [3, 11]


def test_a_prompt_gets_the_answer_of_its_neighbour() -> None:
    data = examples([answered([7, 8], [9]), answered([6], [1, 2, 3]), answered([5, 5, 5], [4])])
    other = others_of(np.array([2, 0, 1]))
    assert other == {2: 1, 0: 2, 1: 0}
    mixed = swap_answers(data, np.array([0, 2]), np.array([2, 1]), 5)
    assert mixed.offsets.tolist() == [0, 3, 8]
    assert mixed.input_ids.tolist() == [7, 8, 4, 5, 5, 5, 1, 2]
    assert mixed.labels.tolist() == [IGNORED, IGNORED, 4, IGNORED, IGNORED, IGNORED, 1, 2]


def test_rows_are_padded_with_what_ends_none() -> None:
    batch = {"input_ids": torch.tensor([[3, 0, 9], [4, 1, 9]]), "lengths": torch.tensor([2, 2])}
    assert unused_at_end(batch) == 2
    assert padded(batch, 2).tolist() == [[3, 0, 2], [4, 1, 2]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


class Reference:
    """One of TRL's trainers on one batch, and ours on the same model: a LoRA that has learned something already.

    Not `lora`: a whole model, which is TRL's reference still.
    """

    def __init__(self, method: str, options: dict[str, Any], tiny: Path, directory: Path, lora: bool = True) -> None:
        from datasets import Dataset
        from peft import LoraConfig
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import (
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
            PreTrainedTokenizerFast,
        )

        names = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
        words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="</s>"
        )
        trainer, config = self.classes(method)
        torch.manual_seed(1)
        scores = method == "Reward"
        base = (
            AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
            if scores
            else AutoModelForCausalLM.from_pretrained(tiny)
        )
        adapter = LoraConfig(
            init_lora_weights=False, target_modules="all-linear", task_type="SEQ_CLS" if scores else "CAUSAL_LM"
        )
        chosen = {
            "output_dir": str(directory),
            "use_cpu": True,
            "report_to": "none",
            "bf16": False,
            "per_device_train_batch_size": ROWS,
            "max_length": 64,
        }
        self.trl = trainer(
            model=base,
            args=config(**(chosen | options)),
            train_dataset=Dataset.from_list(self.rows()),
            processing_class=tokenizer,
            peft_config=adapter if lora else None,
        )
        self.trl.model.train()
        self.features = [self.trl.train_dataset[i] for i in range(len(self.trl.train_dataset))]
        self.batch = self.trl.data_collator(self.features)

    @staticmethod
    def classes(method: str) -> Any:
        import trl
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        if method == "ORPO":
            return ORPOTrainer, ORPOConfig
        return getattr(trl, f"{method}Trainer"), getattr(trl, f"{method}Config")

    @staticmethod
    def rows() -> list[dict[str, str]]:
        rng = np.random.default_rng(3)

        def text(low: int, high: int) -> str:
            return " ".join(f"w{i}" for i in rng.integers(3, VOCABULARY, size=rng.integers(low, high)))

        return [{"prompt": text(2, 6), "chosen": " " + text(1, 9), "rejected": " " + text(1, 9)} for _ in range(ROWS)]

    def ours(self, method: dict[str, Any], batches: Any = None) -> PreferenceTrainer:
        kind = Method.model_validate(method)
        return PREFERENCE[kind.type](self.trl.model, self.trl.args, batches, kind)

    def agree(self, ours: PreferenceTrainer, batch: dict[str, torch.Tensor], items: list[int], theirs: Any) -> None:
        """The same loss, the same gradient."""
        loss = total_loss(ours.scored(self.trl.model, batch).sums, items)
        assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
        named = [p for p in self.trl.model.parameters() if p.requires_grad]
        for mine, other in zip(torch.autograd.grad(loss, named), torch.autograd.grad(theirs, named), strict=True):
            assert torch.allclose(mine, other, rtol=1e-3, atol=1e-6)


def pairs_of(features: list[dict[str, Any]]) -> Pairs:
    def side(name: str) -> Examples:
        return examples([answered(row["prompt_ids"], row[name]) for row in features])

    return Pairs(side("chosen_ids"), side("rejected_ids"))


@pytest.mark.parametrize("loss", ["Sigmoid", "Hinge", "IPO"])
def test_dpo_has_the_loss_of_trl(loss: str, tiny: Path, tmp_path: Path) -> None:
    reference = Reference("DPO", {"beta": 0.3, "loss_type": loss.lower()}, tiny, tmp_path)
    theirs = reference.trl.compute_loss(reference.trl.model, reference.batch)
    ours = reference.ours({"type": "DPO", "dpo": {"beta": 0.3, "loss": loss}})
    batch = collate_pairs(pairs_of(reference.features), np.arange(ROWS))
    if loss != "IPO":  # whose rewards TRL reports as sums
        found = figures_of(ours.scored(reference.trl.model, batch).tally.tolist())
        known = reference.trl._metrics["train"]
        assert found["rewardMargin"] == pytest.approx(known["rewards/margins"][0], rel=1e-4)
        assert found["chosenReward"] == pytest.approx(known["rewards/chosen"][0], rel=1e-4)
        assert found["preferenceAccuracy"] == pytest.approx(known["rewards/accuracies"][0])
    reference.agree(ours, batch, [ROWS], theirs)


def test_kto_has_the_loss_and_the_reference_point_of_trl(tiny: Path, tmp_path: Path) -> None:
    options = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7, "per_device_train_batch_size": 2 * ROWS}
    reference = Reference("KTO", options, tiny, tmp_path)
    theirs = reference.trl.compute_loss(reference.trl.model, reference.batch)
    ours = reference.ours({"type": "KTO", "kto": {"beta": 0.3, "desirableWeight": 1.2, "undesirableWeight": 0.7}})
    assert isinstance(ours, KTOTrainer)
    rows = [answered(row["prompt_ids"], row["completion_ids"]) for row in reference.features]
    data = Unpaired(examples(rows), np.array([row["label"] for row in reference.features]))
    ids = np.arange(2 * ROWS)
    batch = collate_unpaired(data, ids, np.array([others_of(ids)[i] for i in range(2 * ROWS)]), 64)
    ours.kl = kl_estimate(ours._drift([batch], torch.device("cpu")), 2 * ROWS)
    known = reference.trl._metrics["train"]
    assert float(ours.kl) == pytest.approx(known["kl"][0], rel=1e-4)
    assert float(ours.kl) > 0
    found = figures_of(ours.scored(reference.trl.model, batch).tally.tolist())
    assert found["rewardMargin"] == pytest.approx(known["rewards/margins"][0], rel=1e-4)
    reference.agree(ours, batch, [2 * ROWS], theirs)


def test_orpo_has_the_loss_of_trl(tiny: Path, tmp_path: Path) -> None:
    reference = Reference("ORPO", {"beta": 0.4}, tiny, tmp_path)
    theirs, known = reference.trl.get_batch_loss_metrics(reference.trl.model, reference.batch)
    ours = reference.ours({"type": "ORPO", "orpo": {"beta": 0.4}})
    pairs = Pairs(
        *(
            examples([(row[f"{side}_input_ids"], row[f"{side}_labels"]) for row in reference.features])
            for side in ("chosen", "rejected")
        )
    )
    batch = collate_pairs(pairs, np.arange(ROWS))
    found = figures_of(ours.scored(reference.trl.model, batch).tally.tolist())
    assert found["rewardMargin"] == pytest.approx(known["rewards/margins"], rel=1e-4)
    reference.agree(ours, batch, [ROWS, int((pairs.chosen.lengths - 1).sum())], theirs)


def test_reward_has_the_loss_of_trl(tiny: Path, tmp_path: Path) -> None:
    reference = Reference("Reward", {"center_rewards_coefficient": 0.02}, tiny, tmp_path)
    theirs = reference.trl.compute_loss(reference.trl.model, dict(reference.batch))
    ours = reference.ours({"type": "Reward", "reward": {"centerRewardsCoefficient": 0.02}})
    chosen, rejected = (
        examples([(row[name], row[name]) for row in reference.features]) for name in ("chosen_ids", "rejected_ids")
    )
    batch = collate_pairs(Pairs(chosen, rejected), np.arange(ROWS))
    found = figures_of(ours.scored(reference.trl.model, batch).tally.tolist())
    known = reference.trl._metrics["train"]
    assert found["rewardMargin"] == pytest.approx(known["margin"][0], rel=1e-4)
    assert found["preferenceAccuracy"] == pytest.approx(known["accuracy"][0])
    reference.agree(ours, batch, [ROWS], theirs)
