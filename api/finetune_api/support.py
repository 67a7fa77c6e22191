"""What is modelled and not yet built: refused with a sentence, by `finetune lint` and by the operator alike."""

import json
import re
from collections.abc import Iterator

from finetune_api import (
    combinations,
    dataset_rules,
    defaults,
    evaluation_rules,
    place_rules,
    placement_rules,
    rollout_rules,
    stage_rules,
)
from finetune_api.dataset import Holdout
from finetune_api.evaluation import Retention
from finetune_api.job import FineTuneJobSpec
from finetune_api.model import Path, Problem
from finetune_api.profile import FineTuneProfileSpec
from finetune_api.stages import STAGE_URI, EffectiveStage, effective

MAX_BYTES = 512 * 1024
"""Of a spec: half of what a ConfigMap takes, which holds it indented and beside other things."""


def unsupported(spec: FineTuneJobSpec) -> list[Problem]:
    """Fields of a valid spec that this version does not act on, each as a problem."""
    return list(dict.fromkeys(_unsupported(spec)))


def _refuse(path: Path, found: object, allowed: str) -> Problem:
    return Problem(path, f"found {found!r}; this version supports {allowed}")


def _unsupported(spec: FineTuneJobSpec) -> Iterator[Problem]:
    def refuse(*path: str | int, found: object, allowed: str) -> Problem:
        return _refuse(("spec", *path), found, allowed)

    if (size := len(json.dumps(spec.to_json()))) > MAX_BYTES:
        text = (
            f"found {size:,} bytes of JSON; every pod is told the whole spec, of which {MAX_BYTES:,} bytes are allowed"
        )
        yield Problem(("spec",), text)
    for stage in effective(spec):
        yield from _unsupported_stage(stage)
        yield from dataset_rules.problems(stage)
        yield from combinations.problems(stage)
        yield from placement_rules.problems(stage)
    if not spec.base_model.uri.startswith("s3://"):
        yield refuse("baseModel", "uri", found=spec.base_model.uri, allowed="s3:// only")
    yield from place_rules.problems(spec)
    yield from stage_rules.problems(effective(spec))
    yield from rollout_rules.problems(effective(spec))
    yield from evaluation_rules.problems(spec, effective(spec))
    if spec.tracking and spec.tracking != type(spec.tracking)():
        yield refuse("tracking", found="tracking", allowed="metrics in the status and in metrics.jsonl")


def _unsupported_stage(stage: EffectiveStage) -> Iterator[Problem]:
    spec = stage.spec
    if stage.generate and stage.generate.teacher and not stage.generate.teacher.uri.startswith("s3://"):
        teacher = stage.generate.teacher.uri
        yield _refuse(("spec", "stages", stage.number, "generate", "teacher", "uri"), teacher, "s3:// only")
    held_out: tuple[tuple[Path, Holdout | Retention | None], ...] = (
        (("spec", "validation"), spec.validation),
        (("spec", "test"), spec.test),
        (("spec", "evaluation", "retention"), spec.evaluation.retention),
    )
    for path, holdout in held_out:
        for index, dataset in enumerate((holdout and holdout.datasets) or ()):
            # What an earlier stage writes may be trained on, not held out.
            if dataset.uri.startswith(STAGE_URI):
                yield _refuse((*path, "datasets", index, "uri"), dataset.uri, "s3:// only")


RESERVED = re.compile(
    r"(FINETUNE|KUBEFLOW_TRAINER)_.*|HOME|TMPDIR|HF_HOME|AWS_(ACCESS_KEY_ID|SECRET_ACCESS_KEY|SESSION_TOKEN|REGION)"
    r"|AWS_ENDPOINT_URL(_S3)?"
)
"""Variables that say whose job a pod is of, and where it may go: they are the operator's own, or storage's."""


def unsupported_profile(spec: FineTuneProfileSpec) -> list[Problem]:
    """The same for a profile: a limit that is not enforced must not be believed."""
    found = list(defaults.problems(spec))
    for index, entry in enumerate(spec.environment):
        if RESERVED.fullmatch(entry.name):
            text = f"found {entry.name!r}; the operator sets it itself, from storage or from the job"
            found.append(Problem(("spec", "environment", index, "name"), text))
    return found
