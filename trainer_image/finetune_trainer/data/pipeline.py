"""Rows in, shards out: format, data policy, split, tokens. One pass; memory is bounded by a batch and a shard."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from finetune_api.failures import FineTuneError, Reason
from finetune_api.job import FineTuneJobSpec
from finetune_api.run import Shard, Split
from finetune_trainer import log
from finetune_trainer.data.basemodel import BaseModel
from finetune_trainer.data.formats import FORMATS, Ambiguous, BadRow, content_hash, detect, to_example
from finetune_trainer.data.readers import Row, place
from finetune_trainer.data.report import SAMPLE, DatasetReport
from finetune_trainer.data.shards import ShardWriter, Upload
from finetune_trainer.data.sources import Source, rows
from finetune_trainer.data.split import split_of
from finetune_trainer.data.templates import BadTemplate, RowTemplate
from finetune_trainer.data.tokenise import Loss, Text, Tokens, lay_out
from finetune_trainer.storage import Store

BATCH = 512
"""Texts that are encoded together."""
PEEK = 50
"""Rows from which the format is found out."""


class Placed(NamedTuple):
    """A row on its way to a shard."""

    where: str
    split: Split
    text: Text


class Pipeline:
    """Prepares one data set after the other. Held-out sets come first: what they hold is looked for in the others."""

    def __init__(self, store: Store, spec: FineTuneJobSpec, model: BaseModel, folder: Path, upload: Upload) -> None:
        self._store, self._spec, self._model = store, spec, model
        self._folder, self._upload = folder, upload
        self._policy = spec.data_policy
        self._loss: Loss = spec.method.sft.loss if spec.method.sft else "Completion"
        self._limit = min(spec.training.max_length, model.shape.max_positions)
        self._seen: set[bytes] = set()
        self._held_out: set[bytes] = set()
        self._numbers: dict[Split, int] = {}
        self._progress = log.Progress("prepare", None, "rows")
        self.shards: list[Shard] = []
        self.reports: list[DatasetReport] = []

    def run(self, source: Source) -> None:
        """Raises DataInvalid, DataLeakage or InvalidSpec, with field, file and line."""
        report = DatasetReport(source.dataset.name, files=[f.uri for f in source.files], ignored=source.ignored)
        self.reports.append(report)
        writers: dict[Split, ShardWriter] = {}
        placed = self._placed(source, report)
        while batch := list(itertools.islice(placed, BATCH)):
            for item, tokens in zip(batch, self._model.encoder.encode([p.text for p in batch]), strict=True):
                fitted = self._fit(source, report, item, tokens)
                if fitted is None:
                    continue
                if item.split not in writers:
                    writers[item.split] = ShardWriter(
                        item.split, source.dataset.name, self._folder, self._upload, self._next_number
                    )
                writers[item.split].add(fitted)
                report.keep(item.split, fitted)
        for writer in writers.values():
            writer.flush()
            self.shards += writer.shards
        counts = {split: lengths.rows for split, lengths in report.splits.items()}
        log.event("dataset prepared", dataset=report.name, read=report.read, kept=counts, dropped=report.dropped)

    def close(self) -> None:
        self._progress.close()

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
        for where, row in itertools.chain(peeked, found):
            report.read += 1
            self._progress.add(1)
            try:
                if row.problem:
                    raise BadRow(row.problem)
                example = to_example(
                    row.value,
                    form,
                    source.dataset.columns,
                    template.render if template else None,
                    self._model.has_chat_template,
                )
                digest = content_hash(example)
                split = source.split or self._split(digest)
                if not self._passes(source, report, where, split, digest):
                    continue
                text = lay_out(example, self._loss, self._model.chat)
            except BadRow as error:
                self._refuse(source, report, where, str(error))
                continue
            if not report.sample:
                report.sample = text.text[:SAMPLE]
            yield Placed(where, split, text)

    def _rows(self, source: Source) -> Iterator[tuple[str, Row]]:
        for pinned in source.files:
            try:
                for row in rows(self._store, pinned, self._folder):
                    yield place(pinned.uri, row.number), row
            except FineTuneError as error:
                raise FineTuneError(error.reason, f"{source.field}: {error}") from error

    def _format(self, source: Source, peeked: Iterable[tuple[str, Row]]) -> str:
        form = source.dataset.format
        if form in FORMATS:
            return form
        if form != "Auto":
            raise FineTuneError(
                Reason.INVALID_SPEC, f"{source.field}.format: found {form}; supported are Auto, {', '.join(FORMATS)}"
            )
        good: list[Mapping[str, Any]] = [row.value for _, row in peeked if not row.problem]
        if not good:
            where, problem = next(((w, row.problem) for w, row in peeked), (source.dataset.uri, "there are no rows"))
            raise FineTuneError(Reason.DATA_INVALID, f"{source.field}: {where}: {problem}")
        try:
            return detect(good, source.dataset.columns)
        except Ambiguous as error:
            raise FineTuneError(Reason.DATA_INVALID, f"{source.field}.format: {error}") from error

    def _rendered_by(self, form: str, template: RowTemplate | None) -> str:
        if template:
            return "template"
        if form == "Text" or (form == "PromptCompletion" and not self._model.has_chat_template):
            return "plain"
        return "model" if self._model.has_chat_template else "default"

    def _split(self, digest: bytes) -> Split:
        validation = self._spec.validation.fraction if self._spec.validation else None
        test = self._spec.test.fraction if self._spec.test else None
        return split_of(digest, validation or 0.0, test or 0.0)

    def _passes(self, source: Source, report: DatasetReport, where: str, split: Split, digest: bytes) -> bool:
        """Duplicates within training data, and training data that is held out too."""
        if split != "train":
            self._held_out.add(digest)
            return True
        if digest in self._held_out:
            if self._policy.leakage == "Fail":
                raise FineTuneError(
                    Reason.DATA_LEAKAGE,
                    f"{source.field}: {where} is in the validation or test data too (dataPolicy.leakage is Fail; Drop "
                    "leaves such rows out of training)",
                )
            if self._policy.leakage == "Drop":
                report.drop("leakage", where)
                return False
            report.warn("leakage", where)
        if digest in self._seen:
            if self._policy.duplicates == "Fail":
                raise FineTuneError(
                    Reason.DATA_INVALID,
                    f"{source.field}: {where} has the content of an earlier row (dataPolicy.duplicates is Fail)",
                )
            if self._policy.duplicates == "Drop":
                report.drop("duplicate", where)
                return False
            report.warn("duplicate", where)
        self._seen.add(digest)
        return True

    def _refuse(self, source: Source, report: DatasetReport, where: str, why: str) -> None:
        """A row that cannot be used: it never is; Fail ends the job, Warn says so in the log."""
        if self._policy.invalid == "Fail":
            raise FineTuneError(Reason.DATA_INVALID, f"{source.field}: {where}: {why}")
        report.drop("invalid", where, why)
        if self._policy.invalid == "Warn":
            log.event("row left out", level="warning", where=where, why=why)

    def _fit(self, source: Source, report: DatasetReport, item: Placed, tokens: Tokens) -> Tokens | None:
        length = len(tokens.input_ids)
        if length > self._limit:
            why = f"{length:,} tokens; at most {self._limit:,} are allowed"
            match self._policy.too_long:
                case "Fail":
                    raise FineTuneError(
                        Reason.DATA_INVALID, f"{source.field}: {item.where}: {why} (dataPolicy.tooLong is Fail)"
                    )
                case "Truncate":
                    report.warn("truncated", item.where, why)
                    tokens = Tokens(tokens.input_ids[: self._limit], tokens.labels[: self._limit])
                case "Warn" if length <= self._model.shape.max_positions:
                    report.warn("tooLong", item.where, why)
                case _:
                    report.drop("tooLong", item.where, why)
                    return None
        if not tokens.trained:
            report.drop("noTrainableTokens", item.where)
            return None
        return tokens


def _template(source: Source) -> RowTemplate | None:
    if source.dataset.template is None:
        return None
    try:
        return RowTemplate(source.dataset.template)
    except BadTemplate as error:
        raise FineTuneError(Reason.INVALID_SPEC, f"{source.field}.template: {error}") from error
