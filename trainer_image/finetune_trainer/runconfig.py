"""The one file that tells a pod everything: $FINETUNE_RUN_CONFIG."""

import os
from pathlib import Path

from pydantic import ValidationError

from finetune_api.failures import FineTuneError, Reason
from finetune_api.model import problems_of
from finetune_api.run import RunConfig
from finetune_api.stages import EffectiveStage


def read_config() -> RunConfig:
    """Raises InvalidSpec, with the field named."""
    path = Path(os.environ["FINETUNE_RUN_CONFIG"])
    try:
        return RunConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(str(problem) for problem in problems_of(error)[:5])
        raise FineTuneError(Reason.INVALID_SPEC, f"{path.name}: {problems}") from error
    except OSError as error:
        raise FineTuneError(Reason.INVALID_SPEC, f"{path} cannot be read: {error.strerror}") from error


def stage_config(config: RunConfig, stage: EffectiveStage) -> RunConfig:
    """What a pod would be told of a job that is this stage alone."""
    if not stage.name:
        return config
    sizing = config.stage_sizings[stage.number] if config.stage_sizings else None
    return config.model_copy(update={"spec": stage.spec, "sizing": sizing, "stage_sizings": []})
