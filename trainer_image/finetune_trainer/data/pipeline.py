"""Rows in, shards out: format, data policy, split, tokens. One pass; memory is bounded by a batch and a shard."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from finetune_api.failures import FineTuneError, Reason
from finetune_api.formats import Kind, formats_of, kind_of
from finetune_api.job import FineTuneJobSpec
from finetune_api.method import GRPO, PPO
from finetune_api.run import Shard, Split
from finetune_trainer import log
from finetune_trainer.confined import during, fault, lane, mark, unmark
from finetune_trainer.data.augment import SCAN, Passages, Shots
from finetune_trainer.data.basemodel import BaseModel
from finetune_trainer.data.classes import Classes
from finetune_trainer.data.formats import Ambiguous, BadRow, detect, is_text
from finetune_trainer.data.guard import Guard, Guarded, plain, unmarked
from finetune_trainer.data.near import sketch
from finetune_trainer.data.policy import AcrossStages, Candidate, Repeats, refuse
from finetune_trainer.data.readers import Row, place
from finetune_trainer.data.records import Digests, Record, compared_by, digests_of, slice_of, to_records
from finetune_trainer.data.report import SAMPLE, DatasetReport
from finetune_trainer.data.shards import Encoded, OutlineWriter, ShardWriter, Upload
from finetune_trainer.data.sources import Source, rows
from finetune_trainer.data.split import split_of
from finetune_trainer.data.templates import BadTemplate, Costly, RowTemplate
from finetune_trainer.data.tokenise import Loss, Text, Tokens, lay_out, lay_out_prompt
from finetune_trainer.storage import Store

BATCH, CHARACTERS = 512, 2**20
"""Rows that are encoded together; fewer where they are long: the offsets of a token take 100 bytes."""
PEEK = 50
"""Rows from which the format is found out."""


class Placed(NamedTuple):
    """A record on its way to a shard."""

    where: str
    split: Split
    record: Record
    texts: list[Text]
    """One; of a pair the chosen and the rejected."""
    slice: str | None = None


class Reading(NamedTuple):
    """How the rows of one data set are read."""

    source: Source
    report: DatasetReport
    form: str
    template: RowTemplate | None
    passages: Passages


class Pipeline:
    """Prepares one data set after the other. Held-out sets come first: what they hold is looked for in the others."""

    def __init__(
        self,
        store: Store,
        spec: FineTuneJobSpec,
        model: BaseModel,
        folder: Path,
        upload: Upload,
        stages: AcrossStages | None = None,
        kept: Callable[[Split, Record], None] = lambda split, record: None,
    ) -> None:
        """`stages`: what the job's other stages are known to train on and to hold out; `kept` hears of every record
        that becomes an example."""
        self._kept = kept
        self._stages = stages
        self._store, self._spec, self._model = store, spec, model
        self._folder, self._upload = folder, upload
        self._policy, self._seed = spec.data_policy, spec.training.seed
        self._loss: Loss = spec.method.sft.loss if spec.method.sft else "Completion"
        self.kind: Kind = kind_of(spec.method.type, spec.datasets)
        self._formats = formats_of(spec.method.type, self.kind)
        self._limit = min(spec.training.max_length, model.shape.max_positions - _answer_tokens(spec))
        if self._limit < 1:
            raise FineTuneError(
                Reason.INVALID_SPEC,
                f"spec.method: found maxNewTokens {_answer_tokens(spec):,}; the model has "
                f"{model.shape.max_positions:,} positions for the prompt and the answer",
            )
        self._repeats = Repeats(self._policy, folder)
        self.outline = OutlineWriter(folder / "outline.parquet")
        self._classes = Classes()
        self._guard = Guard(model.encoder.special_tokens, model.encoder.eos)
        self._numbers: dict[Split, int] = {}
        self._progress = log.Progress("prepare", None, "rows")
        self.shards: list[Shard] = []
        self.reports: list[DatasetReport] = []

    def run(self, source: Source) -> None:
        """Raises DataInvalid, DataLeakage or InvalidSpec, with field, file and line."""
        try:
            self._run(source)
        except FineTuneError:
            raise
        except Exception as error:
            raise fault(Reason.DATA_INVALID, source.field, error) from error
        finally:
            unmark()

    def _run(self, source: Source) -> None:
        report = DatasetReport(source.dataset.name, files=[f.uri for f in source.files], ignored=source.ignored)
        self.reports.append(report)
        writers: dict[Split, ShardWriter] = {}
        for batch, tokens in self._encoded(source.field, _batches(self._placed(source, report))):
            for item, found in zip(batch, tokens, strict=True):
                fitted = self._fit(source, report, item, found)
                if fitted is None:
                    continue
                if fitted.label is not None:
                    self._classes.see(fitted.label, item.split, f"{source.field}: {item.where}")
                if item.split not in writers:
                    writers[item.split] = self._writer(item.split, source)
                writers[item.split].add(fitted)
                report.keep(item.split, fitted)
                self._kept(item.split, item.record)
        for writer in writers.values():
            writer.flush()
            self.shards += writer.shards
        counts = {split: lengths.rows for split, lengths in report.splits.items()}
        log.event("dataset prepared", dataset=report.name, read=report.read, kept=counts, dropped=report.dropped)

    def classes(self) -> list[str]:
        """Of all data; call it when all are run. Raises DataInvalid."""
        return self._classes.names() if self.kind == "Classes" else []

    def close(self) -> None:
        self._repeats.close()
        self.outline.close()
        self._progress.close()

    def _encoded(
        self, field: str, batches: Iterator[list[Placed]]
    ) -> Iterator[tuple[list[Placed], list[list[Tokens]]]]:
        """Each batch with the tokens of its texts. While one is encoded, the rows of the next are read and laid out."""

        def encode(batch: list[Placed]) -> list[list[Tokens]]:
            size = sum(len(text.text) for item in batch for text in item.texts)
            what = f"{field}: {batch[0].where} to {batch[-1].where}: the model's tokenizer.json cannot encode it"
            with lane("encode"), during(
                Reason.DATA_INVALID, what, seconds=30 + 30 * size / 2**20, memory=2 * 2**30 + 1024 * size
            ):  # fmt: skip
                encoded = iter(self._model.encoder.encode([text for item in batch for text in item.texts]))
                return [list(itertools.islice(encoded, len(item.texts))) for item in batch]

        with ThreadPoolExecutor(1, "encode") as pool:
            waiting: tuple[list[Placed], Future[list[list[Tokens]]]] | None = None
            for batch in batches:
                encoding = pool.submit(encode, batch)
                if waiting:
                    yield waiting[0], waiting[1].result()
                waiting = (batch, encoding)
            if waiting:
                yield waiting[0], waiting[1].result()

    def _writer(self, split: Split, source: Source) -> ShardWriter:
        outline = self.outline if split == "train" else None
        name, number = source.dataset.name, self._next_number
        sliced = split != "train" and bool(source.dataset.columns and source.dataset.columns.slice)
        return ShardWriter(split, name, self._kind_of(source), self._folder, self._upload, number, outline, sliced)

    def _kind_of(self, source: Source) -> Kind:
        """What could be done before is measured by the loss of answers, whatever is learned."""
        return "Tokens" if source.split == "retention" else self.kind

    def _formats_of(self, source: Source) -> tuple[str, ...]:
        return formats_of("SFT", "Tokens") if source.split == "retention" else self._formats

    def _next_number(self, split: Split) -> int:
        self._numbers[split] = self._numbers.get(split, -1) + 1
        return self._numbers[split]

    def _placed(self, source: Source, report: DatasetReport) -> Iterator[Placed]:
        """The rows that the data policy lets pass, laid out."""
        template = _template(source)
        found = self._rows(source)
        peeked = list(itertools.islice(found, PEEK))
        form = self._format(source, peeked)
        report.format, report.rendered_by = form, self._rendered_by(form, template)
        if form == "Messages" and template:
            raise FineTuneError(
                Reason.INVALID_SPEC,
                f"{source.field}.template: Messages are rendered by the model's chat template; remove it",
            )
        reading = Reading(source, report, form, template, Passages(source.dataset, self._seed, template is not None))
        shots = self._shots(reading)
        for where, row in itertools.chain(peeked, found):
            report.read += 1
            self._progress.add(1)
            mark(Reason.DATA_INVALID, f"{source.field}: {where}, or what follows it")
            try:
                placed = self._place(reading, shots, where, row)
            except Costly as error:
                raise FineTuneError(Reason.DATA_INVALID, f"{source.field}: {where}: {error}") from error
            except BadRow as error:
                refuse(self._policy, source, report, where, plain(str(error)))
                continue
            except FineTuneError:
                raise
            except Exception as error:
                raise fault(Reason.DATA_INVALID, f"{source.field}: {where}", error) from error
            if placed and not report.sample:
                report.sample = placed[0].texts[0].text[:SAMPLE]
            yield from placed

    def _place(self, reading: Reading, shots: Shots, where: str, row: Row) -> list[Placed]:
        """One row, laid out; nothing where the policy leaves it out. Raises BadRow."""
        source, report, form, passages = reading.source, reading.report, reading.form, reading.passages
        guarded = self._guarded(row, form)
        records = self._records(reading, guarded.row)
        digests = digests_of(records)
        split = source.split or self._split(digests.learned)
        candidate = self._candidate(reading, where, split, digests, guarded.row, records)
        if not self._repeats.passes(report, candidate):
            return []
        if self._stages and not self._stages.passes(report, candidate):
            return []
        if split == "train" and (changed := passages.altered(guarded.row, form, digests.whole)):
            records = self._records(reading, changed)
        records = [record._replace(example=shots.before(record.example, digests.whole)) for record in records]
        group = slice_of(row.value, source.dataset.columns)
        kind = self._kind_of(source)
        placed = [Placed(where, split, record, self._lay_out(record, kind), group) for record in records]
        if not all(map(is_text, itertools.chain.from_iterable(map(_texts, placed)))):
            raise BadRow("the text has half of a surrogate pair, which is no character")
        if guarded.found:
            report.warn("specialTokens", where, f"{guarded.found} is encoded as plain text")
        return placed

    def _guarded(self, row: Row, form: str) -> Guarded:
        if row.problem:
            raise BadRow(row.problem)
        return self._guard.row(row.value) if form != "Text" else Guarded(row.value, "")

    def _records(self, reading: Reading, row: Mapping[str, Any]) -> list[Record]:
        return to_records(
            reading.passages.placed(row, reading.form),
            reading.form,
            self._kind_of(reading.source),
            reading.source.dataset.columns,
            reading.template.render if reading.template else None,
            self._model.has_chat_template,
        )

    def _candidate(
        self,
        reading: Reading,
        where: str,
        split: Split,
        digests: Digests,
        row: Mapping[str, Any],
        records: list[Record],
    ) -> Candidate:
        """The row as the policy sees it: its passages, which many rows may share, have no part in what is compared."""
        if self._policy.similarity >= 1:
            return Candidate(reading.source, where, split, digests.whole, None, digests.learned)
        passages, template = reading.passages.column, reading.template
        if passages and not template:
            bare = {name: value for name, value in row.items() if name != passages}
            columns = reading.source.dataset.columns
            kind = self._kind_of(reading.source)
            records = to_records(bare, reading.form, kind, columns, None, self._model.has_chat_template)
        rendered = template.columns - {passages} if template else None
        known = sketch(*compared_by(records, row, rendered))
        return Candidate(reading.source, where, split, digests.whole, known, digests.learned)

    def _shots(self, reading: Reading) -> Shots:
        """Examples of the training split for few-shot prompts; none of what is held out, nor like it."""
        shots = Shots(reading.source.dataset.shots, self._seed)
        if not shots.count:
            return shots
        for where, row in itertools.islice(self._rows(reading.source), SCAN):
            try:
                guarded = self._guarded(row, reading.form)
                records = self._records(reading, guarded.row)
                digests = digests_of(records)
            except Costly as error:
                raise FineTuneError(Reason.DATA_INVALID, f"{reading.source.field}: {where}: {error}") from error
            except BadRow:
                # It is told of when its turn comes.
                continue
            split = self._split(digests.learned)
            known = self._candidate(reading, where, split, digests, guarded.row, records)
            if known.split == "train" and not self._repeats.is_held_out(known):
                shots.offer(digests.whole, records[0].example)
        return shots

    def _lay_out(self, record: Record, kind: Kind) -> list[Text]:
        """Raises BadRow."""
        chat = self._model.chat
        if kind in ("Classes", "Prompts"):
            return [unmarked(lay_out_prompt(record.example, chat))]
        return [unmarked(lay_out(e, self._loss, chat)) for e in (record.example, record.rejected) if e is not None]

    def _rows(self, source: Source) -> Iterator[tuple[str, Row]]:
        for pinned in source.files:
            mark(Reason.DATA_INVALID, f"{source.field}: {pinned.uri}: its first rows cannot be read")
            try:
                for row in rows(self._store, pinned, self._folder):
                    yield place(pinned.uri, row.number), row
            except FineTuneError as error:
                raise FineTuneError(error.reason, f"{source.field}: {error}") from error
            except Exception as error:
                raise fault(Reason.DATA_INVALID, f"{source.field}: {pinned.uri} cannot be read", error) from error

    def _format(self, source: Source, peeked: Iterable[tuple[str, Row]]) -> str:
        form, formats = source.dataset.format, self._formats_of(source)
        if form in formats:
            return form
        if form != "Auto":
            what = "retention" if source.split == "retention" else f"method {self._spec.method.type}"
            raise FineTuneError(
                Reason.INVALID_SPEC,
                f"{source.field}.format: found {form}; {what} needs {' or '.join(formats)}",
            )
        if len(formats) == 1 and source.dataset.columns:
            return formats[0]
        good: list[Mapping[str, Any]] = [row.value for _, row in peeked if not row.problem]
        if not good:
            where, problem = next(((w, row.problem) for w, row in peeked), (source.dataset.uri, "there are no rows"))
            raise FineTuneError(Reason.DATA_INVALID, f"{source.field}: {where}: {problem}")
        try:
            return detect(good, source.dataset.columns, formats, self._kind_of(source) == "Unpaired")
        except Ambiguous as error:
            raise FineTuneError(Reason.DATA_INVALID, f"{source.field}.format: {error}") from error

    def _rendered_by(self, form: str, template: RowTemplate | None) -> str:
        if template:
            return "template"
        if form in ("Text", "Labelled"):
            return "plain"
        if form in ("PromptCompletion", "Preference", "PromptOnly") and not self._model.has_chat_template:
            # Where such rows hold messages, they are laid out by the default template none the less.
            return "plain"
        return "model" if self._model.has_chat_template else "default"

    def _split(self, digest: bytes) -> Split:
        validation = self._spec.validation.fraction if self._spec.validation else None
        test = self._spec.test.fraction if self._spec.test else None
        return split_of(digest, validation or 0.0, test or 0.0)

    def _fit(self, source: Source, report: DatasetReport, item: Placed, found: list[Tokens]) -> Encoded | None:
        """A record in tokens, no longer than allowed; None where it is left out."""
        length = max(len(tokens.input_ids) for tokens in found)
        if length > self._limit:
            why = f"{length:,} tokens; at most {self._limit:,} are allowed"
            match self._policy.too_long:
                case "Fail":
                    raise FineTuneError(
                        Reason.DATA_INVALID, f"{source.field}: {item.where}: {why} (dataPolicy.tooLong is Fail)"
                    )
                case "Truncate":
                    report.warn("truncated", item.where, why)
                    found = [self._cut(tokens) for tokens in found]
                case "Warn" if length <= self._model.shape.max_positions - _answer_tokens(self._spec):
                    report.warn("tooLong", item.where, why)
                case _:
                    report.drop("tooLong", item.where, why)
                    return None
        if self._kind_of(source) not in ("Classes", "Prompts") and not all(tokens.trained for tokens in found):
            report.drop("noTrainableTokens", item.where)
            return None
        record = item.record
        rejected = found[1] if len(found) > 1 else None
        label, reference = (text and plain(text) for text in (record.label, record.reference))
        return Encoded(found[0], rejected, record.desirable, label, reference, item.slice)

    def _cut(self, tokens: Tokens) -> Tokens:
        """A prompt keeps its end, which is what is answered; all else keeps its beginning."""
        kept = slice(-self._limit, None) if self.kind == "Prompts" else slice(self._limit)
        return Tokens(tokens.input_ids[kept], tokens.labels[kept])


def _batches(placed: Iterator[Placed]) -> Iterator[list[Placed]]:
    batch: list[Placed] = []
    characters = 0
    for item in placed:
        batch.append(item)
        characters += sum(len(text.text) for text in item.texts)
        if len(batch) == BATCH or characters >= CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _texts(item: Placed) -> Iterator[str]:
    """All of a row that goes into a shard."""
    yield from (text.text for text in item.texts)
    yield from (text for text in (item.record.label, item.record.reference, item.slice) if text)


def _answer_tokens(spec: FineTuneJobSpec) -> int:
    """Positions that an answer takes, where the method lets the model write one."""
    match spec.method.type:
        case "PPO":
            return (spec.method.ppo or PPO()).max_new_tokens
        case "GRPO":
            return (spec.method.grpo or GRPO()).max_new_tokens
        case _:
            return 0


def _template(source: Source) -> RowTemplate | None:
    if source.dataset.template is None:
        return None
    try:
        return RowTemplate(source.dataset.template, source.dataset.columns)
    except BadTemplate as error:
        raise FineTuneError(Reason.INVALID_SPEC, f"{source.field}.template: {error}") from error
