"""The models as CustomResourceDefinitions: structural schema, defaults, bounds, CEL, printer columns.

pydantic's JSON schema is rewritten to the subset of OpenAPI v3 that a structural schema may use
(https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema).
"""

import json
from typing import Any

import pydantic
from pydantic import BaseModel

from finetune_api import GROUP, VERSION
from finetune_api.job import JOB_NAME, FineTuneJob, FineTuneJobSpec
from finetune_api.profile import FineTuneProfile

Schema = dict[str, Any]


def crds() -> list[dict[str, Any]]:
    """Both CustomResourceDefinitions as plain objects."""
    return [job_crd(), profile_crd()]


def job_crd() -> dict[str, Any]:
    schema = structural(FineTuneJob)
    spec = schema["properties"]["spec"] = _as_written(schema["properties"]["spec"])
    spec.setdefault("x-kubernetes-validations", []).extend(immutability(spec, FineTuneJobSpec.mutable))
    schema["properties"]["metadata"] = {
        "type": "object",
        "properties": {"name": {"type": "string", "pattern": JOB_NAME, "maxLength": 50}},
    }
    return _crd(
        kind="FineTuneJob",
        short="ftj",
        scope="Namespaced",
        categories=["all", "finetune"],
        schema=schema,
        columns=[
            _column("State", "string", ".status.state"),
            _column("Progress", "integer", ".status.trainerStatus.progressPercentage", "Percent of the steps."),
            _column("ETA", "integer", ".status.trainerStatus.estimatedRemainingSeconds", "Remaining seconds."),
            _column("Attempts", "integer", ".status.attemptCount"),
            _column("Age", "date", ".metadata.creationTimestamp"),
            _column("Stage", "string", ".status.trainerStatus.stage", wide=True),
            _column("Loss", "string", ".status.trainerStatus.metrics[?(@.name=='loss')].value", wide=True),
            _column("Queue", "string", ".spec.queue.name", wide=True),
            _column("GPUs", "integer", ".status.gpus", wide=True),
            _column("Message", "string", ".status.message", wide=True),
        ],
    )


def profile_crd() -> dict[str, Any]:
    schema = structural(FineTuneProfile)
    schema["properties"]["metadata"] = {"type": "object"}
    return _crd(
        kind="FineTuneProfile",
        short="ftp",
        scope="Cluster",
        categories=["finetune"],
        schema=schema,
        columns=[
            _column("Accelerator", "string", ".spec.accelerator.product"),
            _column("Memory", "string", ".spec.accelerator.memory", "Of one GPU."),
            _column("Age", "date", ".metadata.creationTimestamp"),
            _column("Image", "string", ".spec.image", wide=True),
        ],
    )


def _column(name: str, kind: str, path: str, description: str = "", wide: bool = False) -> dict[str, Any]:
    column: dict[str, Any] = {"name": name, "type": kind, "jsonPath": path}
    if description:
        column["description"] = description
    if wide:
        column["priority"] = 1
    return column


def _crd(
    kind: str, short: str, scope: str, categories: list[str], schema: Schema, columns: list[dict[str, Any]]
) -> dict[str, Any]:
    plural = f"{kind.lower()}s"
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}", "labels": {"app.kubernetes.io/part-of": "finetune-operator"}},
        "spec": {
            "group": GROUP,
            "scope": scope,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short],
                "categories": categories,
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": columns,
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": {"status": {}},
                }
            ],
        },
    }


def structural(model: type[BaseModel]) -> Schema:
    """The structural schema of one root type: `apiVersion`, `kind` and `metadata` untyped but for their names."""
    with_refs = pydantic.TypeAdapter(model).json_schema(by_alias=True)
    schema = _rewrite(with_refs, with_refs.get("$defs", {}))
    for name in ("apiVersion", "kind"):
        schema["properties"][name] = {"type": "string"}
    schema["properties"]["status"] = _without_defaults(schema["properties"]["status"])
    schema["required"] = ["spec"]
    return schema


def _rewrite(node: Schema, defs: dict[str, Schema]) -> Schema:
    """One node in OpenAPI v3 form, references inlined."""
    if "$ref" in node:
        return _rewrite(
            {**defs[node["$ref"].rsplit("/", 1)[1]], **{k: v for k, v in node.items() if k != "$ref"}}, defs
        )
    if "anyOf" in node:
        (only,) = (option for option in node["anyOf"] if option.get("type") != "null")
        return _rewrite(only | _less(node, "anyOf"), defs)
    out: Schema = {}
    for key, value in node.items():
        match key:
            case "title" | "$defs" | "const":
                continue
            case "properties":
                out[key] = {name: _rewrite(child, defs) for name, child in value.items()}
            case "items":
                out[key] = _rewrite(value, defs)
            case "additionalProperties":
                if isinstance(value, dict):
                    out[key] = _rewrite(value, defs)
            case "exclusiveMinimum" | "exclusiveMaximum":
                out |= {key[9].lower() + key[10:]: value, key: True}
            case "description":
                out[key] = " ".join(value.split())
            case _:
                out[key] = value
    if "const" in node:
        out["enum"] = [node["const"]]
    if out.get("x-kubernetes-preserve-unknown-fields"):
        out.pop("additionalProperties", None)
    return _default(out)


def _less(node: Schema, key: str) -> Schema:
    return {name: value for name, value in node.items() if name != key}


def _default(schema: Schema) -> Schema:
    """An object's default is `{}`: its own members' defaults fill it. Absence needs no default."""
    if "default" not in schema:
        return schema
    if schema["default"] in (None, [], {}):
        del schema["default"]
    elif schema.get("type") == "object" and "properties" in schema:
        schema["default"] = {}
    return schema


def _without_defaults(schema: Schema) -> Schema:
    """A status is what was observed: nothing in it is assumed."""
    out = {key: value for key, value in schema.items() if key not in ("default", "required")}
    if "properties" in out:
        out["properties"] = {name: _without_defaults(child) for name, child in out["properties"].items()}
    if isinstance(out.get("items"), dict):
        out["items"] = _without_defaults(out["items"])
        if keys := out.get("x-kubernetes-list-map-keys"):
            out["items"]["required"] = list(keys)
    return out


def _as_written(schema: Schema, name: str = "") -> Schema:
    """Without defaults: what the server fills in could not be told from what a user said, so that no default of a
    profile would hold. The descriptions tell them. A union's `type` is filled in, since rules are made of it."""
    out = dict(schema)
    if name != "type" and (value := out.pop("default", None)) not in (None, {}):
        said = value if isinstance(value, str) else json.dumps(value)
        out["description"] = f"{out.get('description', '')} Default: {said}.".lstrip()
    if "properties" in out:
        out["properties"] = {key: _as_written(child, key) for key, child in out["properties"].items()}
    if isinstance(out.get("items"), dict):
        out["items"] = _as_written(out["items"])
    return out


def immutability(spec: Schema, mutable: dict[str, tuple[str, ...]]) -> list[dict[str, Any]]:
    """Transition rules that refuse every change but those of the mutable members, each beside the field it protects."""
    rules = []
    for name, child in spec["properties"].items():
        if name not in mutable:
            rules.append(_frozen((name,), name in spec.get("required", ()) or "default" in child))
            continue
        for member in child["properties"]:
            if member not in mutable[name]:
                rules.append(_frozen((name, member), always=False))
    return rules


def _frozen(path: tuple[str, ...], always: bool) -> dict[str, Any]:
    dotted = ".".join(path)
    if always:
        rule = f"self.{dotted} == oldSelf.{dotted}"
    else:
        new, old = (
            " && ".join(f"has({root}.{'.'.join(path[: i + 1])})" for i in range(len(path)))
            for root in ("self", "oldSelf")
        )
        rule = f"({new}) == ({old}) && (!({new}) || self.{dotted} == oldSelf.{dotted})"
    return {
        "rule": rule,
        "message": f"{dotted} cannot be changed: delete the job and create it anew",
        "fieldPath": f".{dotted}",
    }


def _present(root: str, path: tuple[str, ...]) -> str:
    """CEL that says that every step of a path is there."""
    return " && ".join(f"has({root}.{'.'.join(path[: i + 1])})" for i in range(len(path)))
