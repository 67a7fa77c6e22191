"""The figures of a stage before and after its training: of validation, test and retention data, never of training rows.

What the method itself measures, exact over all ranks; the scores of answers that the model writes; and, of retention
data, the loss alone where the model was not asked to answer.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from finetune_api.evaluation import EvaluationMetric
from finetune_api.failures import FineTuneError
from finetune_api.figures import ANSWERS, HeldOut, name_of
from finetune_api.run import RunConfig
from finetune_trainer import log
from finetune_trainer.batches import Examples
from finetune_trainer.distributed import Ranks
from finetune_trainer.evaluation.answers import SCORES
from finetune_trainer.evaluation.groups import Groups
from finetune_trainer.evaluation.loss import evaluate, figures_of
from finetune_trainer.evaluation.questions import Question, last_tokens, questions_of
from finetune_trainer.evaluation.samples import SAMPLE_TOKENS, SAMPLES, Answered, Sample
from finetune_trainer.feed import Data, sequences
from finetune_trainer.gathered import gathered
from finetune_trainer.generate import Answering, answers_to
from finetune_trainer.model import attention_of, dtype_of
from finetune_trainer.reward_model import RewardModel
from finetune_trainer.shards import Classes, datasets_of
from finetune_trainer.start import Start
from finetune_trainer.storage import Store, join
from finetune_trainer.workdir import WorkDir

SPLITS: tuple[HeldOut, ...] = ("validation", "test", "retention")
HEADROOM = 4
"""Tokens of one batch of answers, in training micro-batches: writing keeps no activations."""


class Evaluator:
    """`model`: the folder of the model that the stage starts from, where its tokenizer is."""

    def __init__(self, config: RunConfig, work: WorkDir, model: Path, data: Data, ranks: Ranks, store: Store) -> None:
        self._config, self._data, self._ranks, self._store = config, data, ranks, store
        self._work, self._model = work, model
        self._kept = join(config.scratch_uri, f"evaluation/{work.stage or 'job'}.json")
        self._before: Answered | None = None
        self._stop: set[int] = set()
        self.samples: list[Sample] = []
        """After `after`; on rank 0."""

    def before(self, trainer: Any) -> dict[str, float]:
        """Figures of the model as it was, by name. Collective; raises Diverged."""
        answered = self._answer(trainer)
        if self._ranks.is_main and answered.answers:
            self._store.put_bytes(self._kept, answered.model_dump_json().encode())
        self._before = answered
        return self._figures(trainer, answered, before=True)

    def after(self, trainer: Any) -> dict[str, float]:
        """Figures of the model as it is. Collective; raises Diverged."""
        answered = self._answer(trainer)
        if self._before is None:
            self._before = Answered.model_validate(self._ranks.from_main(self._read_before()))
        self.samples = self._samples(answered)
        return self._figures(trainer, answered, before=False)

    def _figures(self, trainer: Any, answered: Answered, before: bool) -> dict[str, float]:
        found: dict[str, float] = {}
        for split in SPLITS:
            own = self._measured(trainer, split) | self._scored(split, answered)
            if not before:
                own |= self._won(split, answered, trainer.batches.micro_batch)
            found |= {name_of(name, split, before): value for name, value in own.items()}
        # Rank 0's, so that all ranks hold the same to the last bit.
        found = self._ranks.from_main(found)
        if self._ranks.is_main and found:
            shown: dict[str, Any] = {name: round(value, 4) for name, value in found.items()}
            log.event("evaluated", when="before" if before else "after", examples=self._data.held_out, **shown)
        return found

    def _measured(self, trainer: Any, split: HeldOut) -> dict[str, float]:
        held = self._data.held.get(split)
        if held is None:
            return {}
        size = trainer.batches.micro_batch
        if split != "retention":
            found: dict[str, float] = trainer.measure(held.data, self._ranks, size, held.groups)
            return found
        if not self._answers or not isinstance(held.data, Examples):
            return {}
        return held.groups.told(evaluate(trainer.model_wrapped, held.data, held.groups, self._ranks, size), figures_of)

    # Answers

    @property
    def _answers(self) -> bool:
        """Whether the model answers: one with a new head does not."""
        return self._config.spec.method.type != "Reward" and not isinstance(self._data.train, Classes)

    @property
    def _metrics(self) -> list[EvaluationMetric]:
        return [metric for metric in self._config.spec.evaluation.metrics if metric in ANSWERS]

    @property
    def _judges(self) -> bool:
        return "WinRate" in self._metrics

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        # As `prepare` encodes.
        return Tokenizer.from_file(str(self._model / "tokenizer.json"))

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    @cached_property
    def _questions(self) -> dict[HeldOut, list[Question]]:
        """What is answered: of every split where answers are scored, else a few for people to read."""
        if not self._answers:
            return {}
        scored, most = bool(self._metrics), SAMPLES
        splits = [split for split in SPLITS if split in self._data.held and (scored or split != "retention")]
        if scored:
            most = self._config.spec.evaluation.generation.max_examples
        else:
            splits = splits[:1]
        limit = self._positions
        found = {
            split: [q for q in questions_of(self._data.held[split].data, most, self._decode) if len(q.prompt) < limit]
            for split in splits
        }
        # A few: not so many of each dataset.
        return {split: asked if self._metrics else asked[:SAMPLES] for split, asked in found.items() if asked}

    @property
    def _positions(self) -> int:
        return self._data.prepared.model.max_positions - self._config.spec.tuning.virtual_tokens

    def _answer(self, trainer: Any) -> Answered:
        found: dict[HeldOut, list[list[int]]] = {}
        if self._questions:
            with gathered(trainer.model_wrapped, self._ranks.device) as lockstep, trainer.accelerator.autocast():
                for split, asked in self._questions.items():
                    how = self._how(trainer, split, lockstep)
                    found[split] = answers_to(trainer.model, [q.prompt for q in asked], how, self._ranks)
        return Answered(answers=found)

    def _text(self, answer: Sequence[int]) -> str:
        return self._decode([token for token in answer if token not in self._stop]).strip()

    def _how(self, trainer: Any, split: HeldOut, lockstep: bool) -> Answering:
        tokenizer, data = self._tokenizer, self._data
        longest = self._config.spec.evaluation.generation.max_new_tokens
        special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        stop = last_tokens(data.held[split].data) & special
        for told in (trainer.model.config.get_text_config(), trainer.model.generation_config):
            stop |= set(told.eos_token_id if isinstance(told.eos_token_id, list) else [told.eos_token_id])
        stop -= {None}
        self._stop |= stop
        return Answering(
            max_new_tokens=longest if self._metrics else min(SAMPLE_TOKENS, longest),
            positions=self._positions,
            stop=tuple(sorted(stop)),
            # It is masked: any token will do.
            padding=min(stop, default=0),
            budget=HEADROOM * trainer.batches.micro_batch * max(1, data.prepared.max_tokens),
            lockstep=lockstep,
        )

    def _scored(self, split: HeldOut, answered: Answered) -> dict[str, float]:
        """The scores of the answers, by name, over everything and of each group. Rank 0 knows them."""
        if not self._ranks.is_main or not self._metrics or split not in answered.answers:
            return {}
        asked, answers, groups = self._questions[split], answered.answers[split], self._data.held[split].groups
        found: dict[str, float] = {}
        for suffix, chosen in _parts(asked, groups):
            said, wanted = [self._text(answers[i]) for i in chosen], [[asked[i].reference] for i in chosen]
            for metric in (metric for metric in self._metrics if metric in SCORES):
                found |= {f"{name}{suffix}": value for name, value in SCORES[metric](said, wanted).items()}
        return found

    def _won(self, split: HeldOut, answered: Answered, batch: int) -> dict[str, float]:
        """The share of questions whose answer is better now than before; one as good as before is half of one."""
        now, before = answered.answers.get(split), self._before.answers.get(split) if self._before else None
        if not self._judges or not now or before is None or len(before) != len(now):
            return {}
        asked, wins = self._questions[split], np.zeros(len(now))
        for start in range(self._ranks.rank * batch, len(asked), self._ranks.world_size * batch):
            places = range(start, min(start + batch, len(asked)))
            new, old = (
                self._judge.score([np.concatenate([asked[i].prompt, np.array(said[i], np.int64)]) for i in places])
                for said in (now, before)
            )
            wins[start : start + batch] = ((new > old).double() + (new == old).double() / 2).cpu().numpy()
        wins = np.array(self._ranks.sum(wins.tolist()))
        parts = _parts(asked, self._data.held[split].groups)
        return {f"winRate{suffix}": float(wins[chosen].mean()) for suffix, chosen in parts}

    @cached_property
    def _judge(self) -> RewardModel:
        place, work = self._work.judge, self._work
        start = Start(work.model, place) if (place / "adapter_config.json").exists() else Start(place, None)
        dtype = dtype_of(self._config.spec, self._config.devices)
        return RewardModel(start, dtype, attention_of(dtype, self._config.devices), self._ranks.device)

    def _samples(self, answered: Answered) -> list[Sample]:
        """Of the validation data, else of the test data: some of every dataset."""
        if not self._ranks.is_main:
            return []
        split: HeldOut | None = next((s for s in SPLITS if answered.answers.get(s)), None)
        if split is None:
            return []
        before = self._before.answers.get(split) if self._before else None
        asked, dataset = self._questions[split], sequences(self._data.held[split].data).dataset
        names = datasets_of(self._data.prepared, [d.name for d in self._config.spec.datasets], split)
        return [
            Sample(
                split=split,
                dataset=names[int(dataset[asked[i].place])],
                prompt=self._decode(asked[i].prompt.tolist()),
                reference=asked[i].reference,
                before=self._text(before[i]) if before and len(before) == len(asked) else None,
                after=self._text(answered.answers[split][i]),
            )
            for i in _spread([int(dataset[q.place]) for q in asked], SAMPLES)
        ]

    def _read_before(self) -> dict[str, Any]:
        """What an earlier attempt has kept: an `Answered`. By rank 0."""
        if not self._ranks.is_main or not self._questions:
            return {}
        try:
            kept = self._store.get_bytes(self._kept, 256 * 2**20)
            return Answered.model_validate_json(kept).model_dump(mode="json")
        except (FineTuneError, ValueError) as error:
            log.event("answers before training are not known", level="warning", why=str(error))
            return {}


def _parts(asked: Sequence[Question], groups: Groups) -> list[tuple[str, list[int]]]:
    """Places of questions by group; a group of which nothing is asked is left out."""
    at = {question.place: i for i, question in enumerate(asked)}
    parts = [(suffix, [at[i] for i in members.tolist() if i in at]) for suffix, members in groups.members()]
    return [(suffix, chosen) for suffix, chosen in parts if chosen]


def _spread(datasets: Sequence[int], count: int) -> list[int]:
    """Places of `count` questions, in turn from each dataset."""
    seen: dict[int, int] = {}
    turns = []
    for place, dataset in enumerate(datasets):
        seen[dataset] = seen.get(dataset, -1) + 1
        turns.append((seen[dataset], place))
    return sorted(place for _, place in sorted(turns)[:count])
