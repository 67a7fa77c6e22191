"""What each rank runs of a stage that generates: requests in rounds, the same rows whatever the number of ranks.

    seeds, model -> a round of requests, shared by the ranks -> filters, in the requests' order -> ... -> rows.jsonl

All ranks see all answers and keep the same ones. How far a stage is lies in the scratch prefix, in
`stages/<name>-partial.json`, so one that is interrupted goes on where it was.
"""

import hashlib
import json
import math
import shutil
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import PreparedData
from finetune_api.stage import Generate
from finetune_trainer import distributed, heartbeat, log, model
from finetune_trainer.callbacks import Signals
from finetune_trainer.data.formats import BadRow
from finetune_trainer.data.templates import BadTemplate, ChatTemplate
from finetune_trainer.distributed import Ranks
from finetune_trainer.generate import shared
from finetune_trainer.methods.rollout import collate_answers, log_probs, sums_of_rows
from finetune_trainer.methods.sampling import Sampling, draws, sample
from finetune_trainer.prepare import ROWS
from finetune_trainer.report import Reporter
from finetune_trainer.results import RECORD, Record, StageEnd, publish_result, read_record, result_uri
from finetune_trainer.start import StageRun, Start
from finetune_trainer.storage import Store, join
from finetune_trainer.storage_errors import ObjectMissing
from finetune_trainer.synthesis.filters import Filters
from finetune_trainer.synthesis.requests import ASKED, PREAMBLE, Pair, Request, opening, parse, request
from finetune_trainer.synthesis.seeds import Seeds, read_seeds

BATCH = 16
"""Requests that a rank answers at once."""
PATIENCE = 20
"""Requests per wanted row, after which what there is must do."""
SAVE_SECONDS = 300.0
STREAM = 7
"""Of random numbers; others are used for what is learned."""


class Written(BaseModel):
    """How far a stage is."""

    model_config = ConfigDict(extra="forbid")
    requests: int = 0
    rows: list[dict[str, Any]] = []
    dropped: dict[str, int] = {}


class Answers(NamedTuple):
    texts: list[str]
    scores: list[float]
    """The mean log-probability per token of each."""


def generate(run: StageRun, signals: Signals, reporter: Reporter) -> None:
    """Collective. Raises FineTuneError."""
    options = run.stage.generate
    assert options
    reporter.stage(run.stage.name, *run.span())
    reporter.phase("Loading")
    ranks = distributed.start(run.config.devices, zero=False)
    store = Store(run.config.storage)
    seeds = load_seeds(run, store)
    writer = Writer(run, store, ranks, options, seeds)
    filters = Filters(options, [pair.instruction for pair in seeds.pool] + seeds.held_out)
    written = Written.model_validate(ranks.from_main(_partial(run, store) if ranks.is_main else {}))
    filters.resume([row["instruction"] for row in written.rows], written.dropped)
    # From here on a signal waits for the end of the round, so that no row is lost.
    signals.deferred, saved, started = True, time.monotonic(), time.monotonic()
    reporter.phase("Training")
    first = len(written.rows)
    while len(written.rows) < options.count and written.requests < PATIENCE * options.count:
        if ranks.any([signals.received])[0]:
            _save_partial(run, store, ranks, written)
            raise FineTuneError(Reason.PREEMPTED, f"the pod was asked to end with {len(written.rows)} rows written")
        heartbeat.begin()
        writer.round(written, filters)
        heartbeat.step(len(written.rows))
        done = len(written.rows) - first
        remaining = (time.monotonic() - started) / done * (options.count - len(written.rows)) if done else None
        kept = {"rowsKept": float(len(written.rows)), "requests": float(written.requests)}
        reporter.progress(len(written.rows), options.count, kept, remaining)
        if time.monotonic() - saved > SAVE_SECONDS:
            _save_partial(run, store, ranks, written)
            saved = time.monotonic()
    distributed.stop(ranks)
    if ranks.is_main:
        _publish(run, store, written, time.monotonic() - started)


def load_seeds(run: StageRun, store: Store) -> Seeds:
    """Raises DataInvalid where they are not what was prepared."""
    entry = PreparedData.model_validate_json(run.work.index.read_bytes()).seeds
    assert entry
    data = store.get_bytes(join(run.config.scratch_uri, f"data/{run.stage.name}/{entry.key}"), entry.size)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise FineTuneError(Reason.DATA_INVALID, f"data/{run.stage.name}/{entry.key} is not what `prepare` wrote")
    return read_seeds(data)


class Writer:
    """The model, and what is asked of it."""

    def __init__(self, run: StageRun, store: Store, ranks: Ranks, options: Generate, seeds: Seeds) -> None:
        self._ranks, self._options, self._seeds = ranks, options, seeds
        self._seed, self._name = run.config.spec.training.seed, run.stage.name
        start = Start(run.work.teacher, None) if options.teacher else run.make_ready(store, ranks)
        self._source = options.teacher.uri if options.teacher else run.origin
        self._model = load(run, start, ranks.device)
        self._tokenizer = model.load_tokenizer(start.model)
        self._chat = chat_template_of(self._tokenizer, self._source)
        self._room = int(self._model.config.max_position_embeddings) - options.max_new_tokens
        self._sampling = Sampling(options.temperature, options.max_new_tokens, self._ends(), True, lockstep=False)

    def round(self, written: Written, filters: Filters) -> None:
        """Adds what passes the filters, in the order of the requests. Collective."""
        ranks, first = self._ranks, written.requests
        count = BATCH * ranks.world_size
        asked = [
            request(self._seeds.pool, number, self._options.shots, self._seed) for number in range(first, first + count)
        ]
        mine = asked[ranks.rank * BATCH : (ranks.rank + 1) * BATCH]
        answers = self._answer(mine, first, count)
        for one, text, score in zip(asked, answers.texts, answers.scores, strict=True):
            if len(written.rows) >= self._options.count:
                break
            pair = parse(one, text)
            if filters.keep(pair, score) and pair:
                written.rows.append(self._row(one, pair, score))
            written.requests = one.number + 1
        written.dropped = dict(filters.dropped)

    def _answer(self, mine: list[Request], first: int, count: int) -> Answers:
        """To all requests of the round; this rank writes those to `mine`."""
        prompts = [self._prompt(one) for one in mine]
        places = np.array([one.number for one in mine], dtype=np.int64)
        device, how = self._ranks.device, self._sampling
        numbers = draws((self._seed, STREAM), places, how.max_new_tokens)
        found = sample(self._model, prompts, numbers, how, device)
        batch = {name: tensor.to(device) for name, tensor in collate_answers(prompts, found).items()}
        with torch.no_grad():
            likely = sums_of_rows(log_probs(self._model, batch, 1.0), batch["labels"])
        own = {int(place) - first: tokens.tolist() for place, tokens in zip(places, found, strict=True)}
        scores = [0.0] * count
        for place, tokens, value in zip(places, found, likely.tolist(), strict=True):
            scores[int(place) - first] = value / max(1, len(tokens))
        texts = [self._tokenizer.decode(tokens, skip_special_tokens=True) for tokens in shared(own, count, self._ranks)]
        return Answers(texts, self._ranks.sum(scores))

    def _prompt(self, asked: Request) -> np.ndarray[Any, Any]:
        """Tokens; where they are more than the model has positions for, the first examples are cut off."""
        if self._chat:
            question = {"role": "user", "content": ASKED.format(shots=len(asked.seeds)) + asked.text}
            try:
                text = self._chat.render([question], ask=True).text
            except BadRow as error:
                raise FineTuneError(Reason.MODEL_INVALID, f"{self._source}: {error}") from error
        else:
            text = PREAMBLE + asked.text
        ids = self._tokenizer.encode(text + opening(asked), add_special_tokens=not self._chat)
        return np.array(ids[-max(1, self._room) :], dtype=np.int64)

    def _row(self, asked: Request, pair: Pair, score: float) -> dict[str, Any]:
        source = {"stage": self._name, "model": self._source, "request": asked.number, "seeds": asked.seeds}
        return {"instruction": pair.instruction, "output": pair.answer, "source": source, "score": round(score, 4)}

    def _ends(self) -> tuple[int, ...]:
        known = set(self._tokenizer.all_special_ids)
        eos = self._model.config.get_text_config().eos_token_id
        return tuple(sorted(known | set(eos if isinstance(eos, list) else [] if eos is None else [eos])))


def chat_template_of(tokenizer: Any, source: str) -> ChatTemplate | None:
    """The model's own, bounded as in `prepare`; None where it has none. Raises ModelInvalid."""
    if not tokenizer.chat_template:
        return None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    try:
        return ChatTemplate(tokenizer.get_chat_template(), special)
    except (BadTemplate, ValueError) as error:
        raise FineTuneError(Reason.MODEL_INVALID, f"{source}: the chat template cannot be used: {error}") from error


def load(run: StageRun, start: Start, device: torch.device) -> Any:
    """Whole on every rank, for writing alone. Raises ModelInvalid."""
    spec, devices = run.config.spec, run.config.devices
    dtype = model.dtype_of(spec, devices)
    found = model.load_model(start.model, dtype, model.attention_of(dtype, devices), device)
    if start.adapter:
        with model.reading("the adapter cannot be loaded", start.adapter):
            found = PeftModel.from_pretrained(found, start.adapter, local_files_only=True)
    found.get_input_embeddings().register_forward_pre_hook(lambda *_: heartbeat.beat())
    return found.to(device).eval().requires_grad_(False)


def _partial_uri(run: StageRun) -> str:
    return result_uri(run.job, run.stage.name).rstrip("/") + "-partial.json"


def _partial(run: StageRun, store: Store) -> dict[str, Any]:
    try:
        data = store.get_bytes(_partial_uri(run), 2**30)
    except ObjectMissing:
        return {}
    log.event("rows found", uri=_partial_uri(run))
    found: dict[str, Any] = json.loads(data)
    return found


def _save_partial(run: StageRun, store: Store, ranks: Ranks, written: Written) -> None:
    if ranks.is_main:
        store.put_bytes(_partial_uri(run), written.model_dump_json().encode())
        log.event("rows saved", rows=len(written.rows), requests=written.requests)


def _publish(run: StageRun, store: Store, written: Written, seconds: float) -> None:
    """Rank 0."""
    causes = ", ".join(f"{count:,} {cause}" for cause, count in sorted(written.dropped.items()))
    if not written.rows:
        raise FineTuneError(
            Reason.DATA_INVALID,
            f"spec.stages[{run.number}].generate: none of {written.requests:,} answers passed the filters ({causes})",
        )
    output = run.work.output
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in written.rows)
    (output / ROWS).write_text("".join(lines), encoding="utf-8")
    metrics = {"rowsKept": float(len(written.rows)), "requests": float(written.requests)}
    metrics |= {f"rowsDropped.{cause}": float(count) for cause, count in written.dropped.items()}
    metrics["meanScore"] = math.fsum(row["score"] for row in written.rows) / len(written.rows)
    end = StageEnd(name=run.stage.name, origin=run.origin, metrics=metrics, seconds=seconds)
    before = read_record(store, run.job, run.stages, run.number)
    (output / RECORD).write_text(Record(stages=[*before.stages, end]).model_dump_json())
    publish_result(store, run.job, run.work, run.stage, output, len(written.rows))
    store.delete(_partial_uri(run))
    log.event("rows written", stage=run.stage.name, rows=len(written.rows), requests=written.requests, dropped=causes)
