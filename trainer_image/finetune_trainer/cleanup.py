"""What of a job's scratch prefix goes once its output is published, and what stays."""

from finetune_api.failures import FineTuneError
from finetune_api.run import RunConfig
from finetune_api.stages import effective
from finetune_trainer import log
from finetune_trainer.data.report import DATA_REPORT
from finetune_trainer.results import result_uri
from finetune_trainer.storage import Store, join


def clean_up(store: Store, config: RunConfig) -> None:
    """Removes checkpoints, tokenised data and earlier stages' models, unless spec.checkpoint.whenComplete is Retain.

    What people may still read stays: data reports, rows that a stage wrote, and the registers that keep a pod which
    comes back late from publishing. `config` is the job's. What cannot be removed costs no job its success.
    """
    if config.spec.checkpoint.when_complete == "Retain":
        return
    models = [result_uri(config, stage.name) for stage in effective(config.spec) if stage.name and not stage.generate]
    try:
        for prefix in (*(join(config.scratch_uri, name) for name in ("checkpoints/", "evaluation/")), *models):
            store.delete_prefix(prefix, config.scratch_uri)
        store.delete_prefix(join(config.scratch_uri, "data/"), config.scratch_uri, keep=DATA_REPORT)
    except FineTuneError as error:
        log.event("scratch is still there", level="warning", uri=config.scratch_uri, why=str(error))
