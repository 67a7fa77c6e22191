"""What a profile allows: the same sentences from `finetune lint --profile` and from the operator."""

from collections.abc import Iterator

from pydantic import ValidationError

from finetune_api.defaults import locked, with_defaults
from finetune_api.job import FineTuneJob
from finetune_api.model import Path, Problem, problems_of
from finetune_api.profile import FineTuneProfile
from finetune_api.support import unsupported
from finetune_api.uris import NAMESPACE, Use, allowed, uses


def judge(job: FineTuneJob, profile: FineTuneProfile) -> list[Problem]:
    """Everything that is wrong with a well-formed job under this profile, the profile's defaults filled in."""
    try:
        whole = with_defaults(job, profile.spec.defaults)
    except ValidationError as error:
        return against_defaults(error, profile.metadata.name)
    return unsupported(whole.spec) + not_allowed(whole, profile)


def against_defaults(error: ValidationError, profile: str) -> list[Problem]:
    """What `with_defaults` found."""
    found = problems_of(error, ("spec",))
    return [Problem(p.path, f"{p.message}; this is with the defaults of profile {profile!r}") for p in found]


def not_allowed(job: FineTuneJob, profile: FineTuneProfile) -> list[Problem]:
    """What the platform's profile refuses this job, each as a problem. The job has the profile's defaults."""
    return [*_not_allowed(job, profile), *locked(job, profile)]


def _not_allowed(job: FineTuneJob, profile: FineTuneProfile) -> Iterator[Problem]:
    spec, rules, limits = job.spec, profile.spec, profile.spec.limits

    def refuse(path: Path, found: object, allowed: str) -> Problem:
        return Problem(path, f"found {found!r}; profile {profile.metadata.name!r} allows {allowed}")

    namespace, workers = job.metadata.namespace, spec.distribution.workers
    if rules.allowed_namespaces and namespace not in rules.allowed_namespaces:
        yield refuse(("metadata", "namespace"), namespace, _names(rules.allowed_namespaces))
    if limits.max_workers and workers > limits.max_workers:
        yield refuse(("spec", "distribution", "workers"), workers, f"at most {limits.max_workers}")
    gpus = workers * spec.distribution.gpus_per_worker
    if limits.max_gpus and gpus > limits.max_gpus:
        yield refuse(("spec", "distribution"), gpus, f"at most {limits.max_gpus} as workers x gpusPerWorker")
    at_a_time = rules.concurrency
    most = min((n for n in (at_a_time.gpus, at_a_time.gpus_per_namespace) if n), default=None)
    if most and gpus > most and not (spec.queue and spec.queue.name):
        yield refuse(("spec", "distribution"), gpus, f"at most {most} at a time as workers x gpusPerWorker")
    if spec.base_model.dtype == "Float16" and rules.accelerator is None:
        path, name = ("spec", "baseModel", "dtype"), profile.metadata.name
        text = f"found Float16; profile {name!r} has no accelerators, and CPUs train in Float32 or BFloat16 (or Auto)"
        yield Problem(path, text)
    longest, deadline = limits.max_active_deadline_seconds, spec.run_policy.active_deadline_seconds
    if longest and deadline and deadline > longest:
        yield refuse(("spec", "runPolicy", "activeDeadlineSeconds"), deadline, f"at most {longest}")
    account = spec.credentials.service_account_name if spec.credentials else None
    if account and account not in rules.service_accounts:
        yield refuse(("spec", "credentials", "serviceAccountName"), account, _names(rules.service_accounts))
    for use in uses(spec):
        prefixes = _prefixes(use, job, profile)
        if prefixes and not allowed(use, prefixes):
            yield refuse(use.path, use.uri, _names(prefixes))


def _prefixes(use: Use, job: FineTuneJob, profile: FineTuneProfile) -> list[str]:
    """Where what is named may be, for this job; empty: anywhere."""
    rules = profile.spec.allowed_uris
    match use.purpose:
        case "BaseModel":
            found = rules.base_model
        case "Model":
            found = [*rules.base_model, *rules.output] if rules.base_model else []
        case "Dataset":
            found = rules.datasets
        case "Output":
            found = rules.output
    return [prefix.replace(NAMESPACE, job.metadata.namespace) for prefix in found]


def _names(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "none"
