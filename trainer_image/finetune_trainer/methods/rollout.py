"""What PPO, GRPO and RLOO share: the model answers prompts, the answers are scored, and it learns from them.

One batch of answers serves several optimizer steps (`Plan.repeats`). Which prompts, and the random numbers that each
answer is sampled with, depend on (data, seed, step, place in the batch) alone. A run that is resumed between two steps
on the same answers writes them anew, with the model as it is then.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from transformers import TrainingArguments

from finetune_api.failures import FineTuneError, Reason
from finetune_api.method import GRPO, PPO, Method
from finetune_trainer.batches import IGNORED, Batch, Ints
from finetune_trainer.distributed import Ranks
from finetune_trainer.evaluation.groups import Groups
from finetune_trainer.evaluation.loss import batches_of
from finetune_trainer.gathered import gathered
from finetune_trainer.logits import learned_logits
from finetune_trainer.methods.base import MethodTrainer
from finetune_trainer.methods.reference import reference_of
from finetune_trainer.methods.sampling import Sampling, Tokens, draws, sample
from finetune_trainer.prompting import PromptBatches
from finetune_trainer.rewards import Rewards
from finetune_trainer.shards import Prompts

LEARNED, HELD_OUT = 5, 6
"""Streams of random numbers."""


class Answered(NamedTuple):
    """A micro-batch of answers."""

    batch: Batch
    """`input_ids` and `labels`, (rows, length): the answers' tokens are labelled."""
    places: torch.Tensor
    """(rows,) in the global batch."""
    scores: torch.Tensor
    """(rows,), float64"""


class Rollout(NamedTuple):
    number: int
    batches: list[Batch]
    items: torch.Tensor
    """Answer tokens and answers of the global batch."""


class RolloutTrainer(MethodTrainer):
    batches: PromptBatches

    def __init__(
        self, model: Any, args: TrainingArguments, batches: PromptBatches, method: Method, rewards: Rewards
    ) -> None:
        super().__init__(model, args, batches)
        self.method, self.rewards = method, rewards
        self.reference = reference_of(model, keeps=False)
        assert method.rollout
        self.sampling = sampling_of(model, method.rollout, rewards.ends(model))
        self._rollout: Rollout | None = None
        self._figures: dict[str, float] = {}
        self._drift: list[float] = []

    def learnable(self, answered: list[Answered]) -> list[Batch]:
        """The micro-batches with what their loss needs. Without gradients, in evaluation mode; collective."""
        raise NotImplementedError

    def loss(self, model: Any, batch: Batch, tokens: int, rows: int) -> torch.Tensor:
        """Of a micro-batch, its share in that of a global batch with so many answer tokens and answers."""
        raise NotImplementedError

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | None]:
        parts, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not parts:
            return parts, items
        step = int(parts[0]["step"])
        number = step // self.batches.plan.repeats
        if self._rollout is None or self._rollout.number != number:
            self._rollout = self._roll_out(number, step, [part["places"] for part in parts])
        return [dict(batch) for batch in self._rollout.batches], self._rollout.items

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        assert num_items_in_batch is not None
        tokens, rows = (max(1, count) for count in num_items_in_batch.tolist())
        # DDP and ZeRO average gradients over the ranks; the denominators are the whole batch's already.
        return self.loss(model, inputs, tokens, rows) * self.batches.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._figures
        super().log(logs, start_time)

    def _roll_out(self, number: int, step: int, places: list[torch.Tensor]) -> Rollout:
        """Collective."""
        self._drift = []
        with self._evaluating():
            with gathered(self.model_wrapped, self.args.device) as lockstep:
                answered = [
                    self._answer(
                        self.batches.prompts, self.batches.prompts_at(step, p.numpy()), p, (number, LEARNED), lockstep
                    )
                    for p in places
                ]
            batches = self.learnable(answered)
        tokens = sum(int(answer_tokens(part.batch["labels"]).sum()) for part in answered)
        score = sum(float(part.scores.sum()) for part in answered)
        size = self.batches.size
        all_tokens, all_scores, drift = global_sum([tokens, score, sum(self._drift)])
        self._figures = {"reward": all_scores / size, "answer_tokens": all_tokens / size}
        if self._drift:
            self._figures["kl"] = drift / size
        return Rollout(number, batches, torch.tensor([int(all_tokens), size]))

    def _answer(
        self, data: Prompts, ids: Ints, places: torch.Tensor, stream: tuple[int, ...], lockstep: bool
    ) -> Answered:
        """Answers to the prompts `ids`, sampled with the random numbers of `places` and scored."""
        device = self.args.device
        prompts = [tokens_of(data, int(i)) for i in ids]
        numbers = draws((self.args.seed, *stream), places.numpy(), self.sampling.max_new_tokens)
        answers = sample(self.model_wrapped, prompts, numbers, self.sampling._replace(lockstep=lockstep), device)
        references = [data.references[int(i)] for i in ids]
        scores = self.rewards.score(prompts, answers, references, device)
        if not torch.isfinite(scores).all():
            raise FineTuneError(Reason.DIVERGED, "the reward model's score of an answer is not a number")
        return Answered({k: v.to(device) for k, v in collate_answers(prompts, answers).items()}, places, scores)

    def reference_log_probs(self, batch: Batch) -> torch.Tensor:
        """(tokens,) what the model as it was before says of the answers."""
        with self.as_reference() as reference:
            return log_probs(reference, batch, self.sampling.temperature)

    @property
    def has_reference(self) -> bool:
        return self.reference is not None

    def note_drift(self, part: Answered, drift: torch.Tensor) -> None:
        """`drift`: (tokens,) log-probability less the reference's; for the figures."""
        self._drift.append(float(drift.sum()))

    def everywhere(self, answered: list[Answered], values: list[torch.Tensor]) -> torch.Tensor:
        """(answers of the global batch,) the values (rows,) of all ranks, each at its place. Collective."""
        found = torch.zeros(self.batches.size, dtype=torch.float64, device=self.args.device)
        for part, value in zip(answered, values, strict=True):
            found[part.places] = value.to(found)
        dist.all_reduce(found)
        return found

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            yield
        self.model.train(was_training)

    def measure(self, data: Prompts, ranks: Ranks, batch_size: int, groups: Groups) -> dict[str, float]:
        """One answer to each prompt, with the same random numbers each time."""
        sums = np.zeros((groups.leaves, 4))
        with self._evaluating(), gathered(self.model_wrapped, self.args.device) as lockstep:
            for ids, counts in batches_of(data.examples, ranks.rank, ranks.world_size, batch_size):
                part = self._answer(data, ids, torch.from_numpy(ids), (HELD_OUT,), lockstep)
                labels, drift = part.batch["labels"], torch.zeros(len(ids))
                if self.has_reference:
                    now = log_probs(self.model_wrapped, part.batch, self.sampling.temperature)
                    drift = sums_of_rows(now - self.reference_log_probs(part.batch), labels).cpu()
                values = [torch.ones(len(ids)), part.scores.cpu(), answer_tokens(labels).cpu(), drift]
                if counts:
                    np.add.at(sums, groups.leaf[ids], torch.stack([v.double() for v in values], dim=1).numpy())
        total = np.array(ranks.sum(sums.flatten().tolist())).reshape(sums.shape)

        def figures(found: list[float]) -> dict[str, float]:
            count, score, tokens, drift = found
            known = {"meanReward": score, "answerTokens": tokens} | ({"kl": drift} if self.has_reference else {})
            return {name: value / max(1.0, count) for name, value in known.items()}

        return groups.told(total, figures)


def sampling_of(model: Any, method: PPO | GRPO, ends: tuple[int, ...]) -> Sampling:
    virtual = hasattr(model, "peft_config") and model.active_peft_config.is_prompt_learning
    return Sampling(method.temperature, method.max_new_tokens, ends, cached=not virtual, lockstep=False)


def tokens_of(data: Prompts, number: int) -> Tokens:
    offsets = data.examples.offsets
    return data.examples.input_ids[int(offsets[number]) : int(offsets[number + 1])]


def collate_answers(prompts: Sequence[Tokens], answers: Sequence[Tokens], multiple: int = 8) -> Batch:
    """`input_ids` and `labels` (rows, length), padded on the right; the answers' tokens are labelled."""
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    width = -(-longest // multiple) * multiple
    ids = np.zeros((len(prompts), width), dtype=np.int64)
    labels = np.full((len(prompts), width), IGNORED, dtype=np.int64)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, : len(prompt)], ids[row, len(prompt) : end] = prompt, answer
        labels[row, len(prompt) : end] = answer
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def log_probs(model: Any, batch: Batch, temperature: float) -> torch.Tensor:
    """(tokens,) of the answers' tokens, one answer after the other, as they are sampled."""
    logits, targets = learned_logits(model, {"input_ids": batch["input_ids"]}, batch["labels"])
    return -torch.nn.functional.cross_entropy(logits / temperature, targets, reduction="none")


def rows_of_tokens(labels: torch.Tensor) -> torch.Tensor:
    """(tokens,) the row of each labelled token."""
    return torch.nonzero(labels[:, 1:] != IGNORED)[:, 0]


def sums_of_rows(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(rows,) from (tokens,)."""
    return values.new_zeros(len(labels)).index_add(0, rows_of_tokens(labels), values)


def answer_tokens(labels: torch.Tensor) -> torch.Tensor:
    """(rows,)"""
    return (labels[:, 1:] != IGNORED).sum(1)


def global_sum(values: Sequence[float]) -> list[float]:
    """Over all ranks. Collective."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]
