"""The manifests of examples/ as jobs that take seconds: what they do stays, models, data and sizes become tiny."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from support.matrix import BUCKET, RATES, SMALL, Cell, Spec, datasets_of
from support.teaching import write_rows
from support.writing import PAIRS, known_rows

FOLDER = Path(__file__).parents[2] / "examples"
LIMITS = {"maxNewTokens": 8, "generations": 4, "maxExamples": 8, "globalBatchSize": 16, "maxLength": 224, "count": 4}
"""The most that a field may be, wherever it stands."""
ROWS = 100
WRITER = f"{BUCKET}/models/writer/"
"""Where a model must lie that writes rows, `support.writing.make_writer`."""


def jobs() -> dict[str, Spec]:
    """Each FineTuneJob by its file's name."""
    found = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))}
    return {name: manifest for name, manifest in found.items() if manifest["kind"] == "FineTuneJob"}


def shrunk(
    name: str, manifest: Spec, put: Callable[[Path, str], None], directory: Path, adapter: str, reward_model: str
) -> Spec:
    """`put(file, uri)` uploads its data; `adapter`, `reward_model`: URIs of what earlier jobs published."""
    spec: Spec = _small(manifest["spec"])
    writes = [stage["generate"] for stage in spec.get("stages", ()) if "generate" in stage]
    for generate in writes:
        # Nobody but a model that has learned the manner writes rows that can be read.
        generate |= {"teacher": {"uri": WRITER}, "shots": 1, "maxNewTokens": 40, "temperature": 1.0}
        spec["dataPolicy"] = spec.get("dataPolicy", {}) | {"similarity": 1}
    for number, dataset in enumerate(datasets_of(spec)):
        if dataset["uri"].startswith("stage://"):
            continue
        unpaired = dataset.get("format") == "Preference" and _method(spec).get("type") == "KTO"
        dataset["uri"] = f"{BUCKET}/examples/{name}-{number}.jsonl"
        # Rows of its own, so that nothing that is held out is trained on.
        file = directory / f"{name}-{number}.jsonl"
        if writes:
            file.write_text("".join(json.dumps(row) + "\n" for row in known_rows(PAIRS[number::4])))
        else:
            write_rows(file, dataset, ROWS, first=number * ROWS, unpaired=unpaired)
        put(file, dataset["uri"])
    spec["baseModel"] |= {"uri": f"{BUCKET}/models/matrix/"}
    if "adapterUri" in spec["baseModel"]:
        spec["baseModel"]["adapterUri"] = adapter
    for holder in [
        spec["method"],
        spec.get("evaluation") or {},
        *(s.get("method") or {} for s in spec.get("stages", ())),
    ]:
        for part in (holder, *(p for p in holder.values() if isinstance(p, dict))):
            if "rewardModel" in part:
                part["rewardModel"] = {"uri": reward_model}
    for unused in ("profile", "queue", "checkpoint"):
        spec.pop(unused, None)
    spec |= {
        "distribution": spec.get("distribution", {}) | {"gpusPerWorker": 1},
        "output": spec["output"] | {"uri": f"{BUCKET}/out/"},
        "credentials": {"secretRef": {"name": "s3-creds"}},
        "runPolicy": {"maxAttempts": 1},
    }
    return manifest | {"metadata": {"name": f"example-{name}", "namespace": "default"}, "spec": spec}


def _method(spec: Spec) -> Spec:
    return spec.get("method") or {"type": "SFT"}


def _small(spec: Spec) -> Spec:
    spec = {"method": {"type": "SFT"}, "tuning": {"type": "LoRA"}, "training": {}, **_limited(spec)}
    for part in (spec, *spec.get("stages", ())):
        if "tuning" in part:
            _small_tuning(part["tuning"])
        if "training" in part:
            rate = RATES.get((part.get("tuning") or spec["tuning"])["type"], 0.02)
            part["training"].pop("epochs", None)
            part["training"] |= {"maxSteps": 8, "learningRate": rate}
    for split in ("validation", "test"):
        if "fraction" in (spec.get(split) or {}):
            spec[split]["fraction"] = 0.15
    evaluation = spec.get("evaluation") or {}
    if "everySteps" in evaluation:
        evaluation["everySteps"] = 4
    if "retention" in evaluation:
        evaluation["retention"]["maxRegression"] = 100
    # What a model of two layers reaches says nothing of the example.
    for gate in evaluation.get("gates", ()):
        gate["value"] = -1e6 if gate["operator"] == "AtLeast" else 1e6
    return spec


def _small_tuning(tuning: Spec) -> None:
    if "lora" in tuning:
        tuning["lora"] |= SMALL
    for name, most in (
        ("promptTuning", {"tokens": 8}),
        ("prefixTuning", {"tokens": 8}),
        ("freeze", {"trainableLayers": 1}),
    ):
        if name in tuning:
            tuning[name] |= most


def _limited(value: Any) -> Any:
    match value:
        case dict():
            limited = {name: _limited(member) for name, member in value.items()}
            return limited | {name: min(most, limited[name]) for name, most in LIMITS.items() if name in limited}
        case list():
            return [_limited(member) for member in value]
    return value


def cell_of(manifest: Spec) -> Cell:
    """The cell of the matrix that an example stands for."""
    spec = manifest["spec"]
    stages = spec.get("stages") or []
    tuning, distribution = spec.get("tuning") or {"type": "LoRA"}, spec.get("distribution") or {}
    lora = tuning.get("lora") or {}
    known = {"RankStabilized": "rsLoRA", "PiSSA": "PiSSA"}
    options = [known[lora[option]] for option in ("initialization", "scaling") if lora.get(option) in known]
    named = options[0] if options and tuning["type"] == "LoRA" else tuning["type"]
    method = " → ".join(_name(stage, spec) for stage in stages if "generate" not in stage) or _name(spec, spec)
    return Cell(
        method,
        named,
        distribution.get("workers", 1),
        distribution.get("strategy", "Auto"),
        bool(spec["output"].get("merged")),
        spec["baseModel"].get("dtype", "Float32"),
    )


def _name(part: Spec, spec: Spec) -> str:
    method = part.get("method") or spec.get("method") or {"type": "SFT"}
    if (method.get("sft") or {}).get("packing"):
        return "SFT, packed"
    if method["type"] == "SFT" and any(d.get("format") == "Labelled" for d in part.get("datasets") or ()):
        return "SFT, classes"
    if (method.get("grpo") or {}).get("advantage") == "LeaveOneOut":
        return "RLOO"
    return str(method["type"])
