"""dataPolicy over rows: which ones are left out, which end the job, which are only told of."""

from finetune_api.failures import FineTuneError, Reason
from finetune_api.job import DataPolicy
from finetune_api.run import Split
from finetune_trainer import log
from finetune_trainer.data.report import DatasetReport
from finetune_trainer.data.sources import Source


class Repeats:
    """Duplicates within training data, and training data that is held out too."""

    def __init__(self, policy: DataPolicy) -> None:
        self._policy = policy
        self._seen: set[bytes] = set()
        self._held_out: set[bytes] = set()

    def passes(self, source: Source, report: DatasetReport, where: str, split: Split, digest: bytes) -> bool:
        """Whether the row stays. Raises DataLeakage or DataInvalid where the policy is Fail."""
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


def refuse(policy: DataPolicy, source: Source, report: DatasetReport, where: str, why: str) -> None:
    """A row that cannot be used: it never is; Fail ends the job, Warn says so in the log."""
    if policy.invalid == "Fail":
        raise FineTuneError(Reason.DATA_INVALID, f"{source.field}: {where}: {why}")
    report.drop("invalid", where, why)
    if policy.invalid == "Warn":
        log.event("row left out", level="warning", where=where, why=why)
