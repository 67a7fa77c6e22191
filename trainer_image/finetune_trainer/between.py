"""The data of a stage that learns from what an earlier stage wrote: prepared in the gang, once that is there."""

from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import PreparedData
from finetune_trainer import log
from finetune_trainer.pull import fetch_part
from finetune_trainer.start import StageRun
from finetune_trainer.storage import Store, join

if TYPE_CHECKING:
    from finetune_trainer.distributed import Ranks


def prepare_between(run: StageRun, store: Store, ranks: "Ranks") -> None:
    """Collective: rank 0 does what the job's `prepare` does for all other stages, then every pod fetches the shards.

    Nothing where the stage's data were prepared before. Raises as `prepare` does.
    """
    if not run.stage.reads:
        return
    sha256 = ranks.from_main(_prepare(run, store) if ranks.is_main else None)
    if ranks.local_rank == 0:
        uri = join(run.job.scratch_uri, f"data/{run.stage.name}/index.json")
        fetch_part(store, uri, sha256, run.work)
    ranks.barrier()


def _prepare(run: StageRun, store: Store) -> str:
    # Only rank 0 of such a stage has any use for what reads data.
    from finetune_trainer.data.basemodel import inspect
    from finetune_trainer.prepare import prepare_stage

    model = inspect(store, run.job.spec)
    if model.sha256 != run.index.base_model_sha256:
        raise FineTuneError(Reason.MODEL_INVALID, "spec.baseModel.uri: its files changed since the job began")
    prepared = prepare_stage(store, run.job, run.stage, model, Path(run.root) / "prepare")
    log.event("stage prepared", stage=run.stage.name, examples=_rows(prepared.data))
    return prepared.sha256


def _rows(index: PreparedData) -> int:
    return sum(shard.rows for shard in index.shards if shard.split == "train")
