"""batch/v1 Jobs: defaults, the selector and labels that the server sets, validation and what is immutable."""

from __future__ import annotations

from typing import Any

from finetune_sandbox import podkind
from finetune_sandbox.errors import Cause, Obj, bad_request, not_supported, required, wrong
from finetune_sandbox.meta import check_labels

_NEW = ("batch.kubernetes.io/controller-uid", "batch.kubernetes.io/job-name")
_OLD = ("controller-uid", "job-name")
_IMMUTABLE = (
    "completionMode",
    "podFailurePolicy",
    "successPolicy",
    "backoffLimitPerIndex",
    "maxFailedIndexes",
    "managedBy",
)
_SUSPENDED = ("nodeSelector", "tolerations", "schedulingGates", "affinity")
_UNLIMITED = 2147483647


def default(job: Obj) -> None:
    spec = job.get("spec")
    if not isinstance(spec, dict):
        raise bad_request("spec: expected an object")
    template = spec.setdefault("template", {})
    template.setdefault("spec", {})
    if spec.get("completions") is None and spec.get("parallelism") is None:
        spec["completions"] = 1
    if spec.get("parallelism") is None:
        spec["parallelism"] = 1
    per_index = spec.get("backoffLimitPerIndex") is not None
    if spec.get("backoffLimit") is None:
        spec["backoffLimit"] = _UNLIMITED if per_index else 6
    if per_index and spec.get("maxFailedIndexes") is None:
        spec.pop("maxFailedIndexes", None)
    spec.setdefault("completionMode", "NonIndexed")
    spec.setdefault("suspend", False)
    spec.setdefault("manualSelector", False)
    policy = "Failed" if spec.get("podFailurePolicy") else "TerminatingOrFailed"
    spec.setdefault("podReplacementPolicy", policy)
    for rule in (spec.get("podFailurePolicy") or {}).get("rules") or ():
        for pattern in rule.get("onPodConditions") or ():
            pattern.setdefault("status", "True")
    template.setdefault("metadata", {}).pop("creationTimestamp", None)
    template["spec"].setdefault("restartPolicy", "")  # the default for pods is not valid here
    podkind.default_spec(template["spec"])


def prepare(job: Obj, old: Obj | None) -> None:
    spec, template = job["spec"], job["spec"]["template"]["metadata"]
    if old is not None or spec["manualSelector"]:
        return
    uid, name = job["metadata"]["uid"], job["metadata"].get("name", "")
    labels = template.setdefault("labels", {})
    for keys, value in (((_NEW[0], _OLD[0]), uid), ((_NEW[1], _OLD[1]), name)):
        for key in keys:
            labels.setdefault(key, value)
    spec.setdefault("selector", {}).setdefault("matchLabels", {}).setdefault(_NEW[0], uid)
    if not job["metadata"].get("labels"):
        job["metadata"]["labels"] = dict(labels)
    job["status"] = {}


def validate(job: Obj, old: Obj | None) -> list[Cause]:
    spec = job["spec"]
    found = _numbers(spec) + _mode(job) + _selector(job)
    template = spec["template"]
    policy = template["spec"]["restartPolicy"]
    if policy in ("", "Always"):
        found.append(required("spec.template.spec.restartPolicy", 'valid values: "OnFailure", "Never"'))
    elif policy not in ("OnFailure", "Never"):
        found.append(not_supported("spec.template.spec.restartPolicy", policy, ("OnFailure", "Never")))
    found += check_labels(template["metadata"].get("labels") or {}, "spec.template.labels")
    found += podkind.check_spec(template["spec"], "spec.template.spec")
    found += _failure_policy(spec)
    return found + (_immutable(spec, old) if old is not None else [])


def _numbers(spec: Obj) -> list[Cause]:
    found: list[Cause] = []
    for field in ("parallelism", "completions", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished",
                  "backoffLimitPerIndex", "maxFailedIndexes"):  # fmt: skip
        value = spec.get(field)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise bad_request(f"spec.{field}: expected an integer, found {type(value).__name__}")
        if value < 0:
            found.append(wrong(f"spec.{field}", value, "must be greater than or equal to 0"))
    if not isinstance(spec["suspend"], bool):
        raise bad_request(f"spec.suspend: expected a boolean, found {type(spec['suspend']).__name__}")
    return found


def _mode(job: Obj) -> list[Cause]:
    spec, name = job["spec"], job["metadata"].get("name", "")
    if spec["completionMode"] not in ("NonIndexed", "Indexed"):
        return [not_supported("spec.completionMode", spec["completionMode"], ("Indexed", "NonIndexed"))]
    found: list[Cause] = []
    if spec["podReplacementPolicy"] not in ("Failed", "TerminatingOrFailed"):
        allowed = ("Failed", "TerminatingOrFailed")
        found.append(not_supported("spec.podReplacementPolicy", spec["podReplacementPolicy"], allowed))
    if spec["completionMode"] == "Indexed":
        if spec.get("completions") is None:
            return [*found, required("spec.completions", "when completion mode is Indexed")]
        longest = f"{name}-{max(spec['completions'] - 1, 0)}"
        if len(longest) > 63:
            why = "will not able to create pod with invalid DNS label: must be no more than 63 characters"
            found.append(wrong("metadata.name", name, f"{why}: {longest}"))
    elif spec.get("backoffLimitPerIndex") is not None:
        found.append(
            wrong("spec.backoffLimitPerIndex", spec["backoffLimitPerIndex"], "requires indexed completion mode")
        )
    if spec.get("maxFailedIndexes") is not None and spec.get("backoffLimitPerIndex") is None:
        found.append(required("spec.backoffLimitPerIndex", "when maxFailedIndexes is specified"))
    return found


def _selector(job: Obj) -> list[Cause]:
    spec, uid, name = job["spec"], job["metadata"]["uid"], job["metadata"].get("name", "")
    labels = spec["template"]["metadata"].get("labels") or {}
    if spec["manualSelector"]:
        return [] if spec.get("selector") else [required("spec.selector")]
    found = [
        wrong(f"spec.template.metadata.labels[{key}]", labels.get(key, ""), f"must be '{want}'")
        for keys, want in (((_NEW[0], _OLD[0]), uid), ((_NEW[1], _OLD[1]), name))
        for key in keys
        if labels.get(key) != want
    ]
    if spec.get("selector") != {"matchLabels": {_NEW[0]: uid}}:
        found.append(wrong("spec.selector", spec.get("selector"), "`selector` not auto-generated"))
    return found


def _failure_policy(spec: Obj) -> list[Cause]:
    policy = spec.get("podFailurePolicy")
    if not policy:
        return []
    found: list[Cause] = []
    if spec["template"]["spec"].get("restartPolicy") != "Never":
        restart = spec["template"]["spec"].get("restartPolicy")
        found.append(wrong("spec.template.spec.restartPolicy", restart, "only \"Never\" is supported when "
                           "podFailurePolicy is specified"))  # fmt: skip
    if spec["podReplacementPolicy"] != "Failed":
        found.append(not_supported("spec.podReplacementPolicy", spec["podReplacementPolicy"], ("Failed",)))
    names = {c.get("name") for c in podkind.containers(spec["template"]["spec"])}
    for i, rule in enumerate(policy.get("rules") or ()):
        found += _failure_rule(rule, f"spec.podFailurePolicy.rules[{i}]", names, spec)
    return found


def _failure_rule(rule: Obj, path: str, names: set[Any], spec: Obj) -> list[Cause]:
    action, found = rule.get("action", ""), []
    if action not in ("FailJob", "FailIndex", "Ignore", "Count"):
        found.append(not_supported(f"{path}.action", action, ("Count", "FailIndex", "FailJob", "Ignore")))
    if action == "FailIndex" and spec.get("backoffLimitPerIndex") is None:
        found.append(wrong(f"{path}.action", action, "requires the backoffLimitPerIndex to be set"))
    codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions") or ()
    if (codes is not None) == bool(conditions):
        found.append(wrong(path, "", "specifying one of OnExitCodes and OnPodConditions is required, and both together "
                           "is not supported"))  # fmt: skip
    if codes is not None:
        values, operator, where = codes.get("values") or [], codes.get("operator", ""), f"{path}.onExitCodes"
        if operator not in ("In", "NotIn"):
            found.append(not_supported(f"{where}.operator", operator, ("In", "NotIn")))
        if not values:
            found.append(wrong(f"{where}.values", values, "at least one value is required"))
        elif values != sorted(set(values)):
            found.append(wrong(f"{where}.values", values, "must be ordered and without duplicates"))
        if operator == "In" and 0 in values:
            found.append(wrong(f"{where}.values[{values.index(0)}]", 0, "must not be 0 for the In operator"))
        if codes.get("containerName") is not None and codes["containerName"] not in names:
            why = "must be one of the container or initContainer names in the pod template"
            found.append(wrong(f"{where}.containerName", codes["containerName"], why))
    for i, condition in enumerate(conditions):
        if not condition.get("type"):
            found.append(required(f"{path}.onPodConditions[{i}].type"))
        if condition.get("status") not in ("True", "False", "Unknown"):
            allowed = ("False", "True", "Unknown")
            found.append(not_supported(f"{path}.onPodConditions[{i}].status", condition.get("status"), allowed))
    return found


def _immutable(spec: Obj, old: Obj) -> list[Cause]:
    was = old["spec"]
    found = [wrong(f"spec.{f}", spec.get(f), "field is immutable") for f in _IMMUTABLE if spec.get(f) != was.get(f)]
    if spec.get("selector") != was.get("selector"):
        found.append(wrong("spec.selector", spec.get("selector"), "field is immutable"))
    elastic = spec["completionMode"] == "Indexed" and spec.get("completions") == spec.get("parallelism")
    elastic = elastic and was.get("completions") == was.get("parallelism")
    if spec.get("completions") != was.get("completions") and not elastic:
        found.append(wrong("spec.completions", spec.get("completions"), "field is immutable"))
    parked = was.get("suspend") and not (old.get("status") or {}).get("startTime")
    if _template(spec, parked) != _template(was, parked):
        found.append(Cause("spec.template", "Invalid value: core.PodTemplateSpec: field is immutable"))
    return found


def _template(spec: Obj, parked: Any) -> Obj:
    """The part of the template that may not change; a suspended job that never ran may still be directed elsewhere."""
    template: Obj = spec["template"]
    if not parked:
        return template
    pod = {k: v for k, v in template["spec"].items() if k not in _SUSPENDED}
    return {"spec": pod}
