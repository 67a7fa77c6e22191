"""DPO: raise the chosen answer above the rejected one, relative to the model as it was before."""

from typing import Any

from finetune_api.method import DPO
from finetune_trainer.batches import Batch
from finetune_trainer.methods.losses import dpo_losses
from finetune_trainer.methods.preference import PairTrainer, Scored, tally_of_pairs


class DPOTrainer(PairTrainer):
    def scored(self, model: Any, batch: Batch) -> Scored:
        dpo = self.method.dpo or DPO()
        ratios, counts = self.log_ratios(model, batch["input_ids"], batch["labels"])
        (chosen, rejected), (first, second) = ratios.chunk(2), counts.chunk(2)
        losses = dpo_losses(chosen, rejected, (first, second), dpo.beta, dpo.loss)
        return Scored((losses.sum(),), tally_of_pairs(dpo.beta * chosen, dpo.beta * rejected))
