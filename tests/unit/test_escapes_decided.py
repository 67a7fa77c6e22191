"""The escape corpus before what decides in the operator: it would run none of them, whatever the API server let in."""

import pytest

from finetune_operator.accept import Refusal, Subject, check, select_profile
from support import escapes
from support.escapes import Escape
from support.world import Object, make_job, make_profile

OWN = "s3://{}/{{namespace}}/"
LIMITS: Object = {
    "allowedNamespaces": ["team-a"],
    "serviceAccounts": ["listed"],
    "limits": {"maxWorkers": 8, "maxActiveDeadlineSeconds": 86_400},
    "allowedUris": {"baseModel": ["s3://models/"], "datasets": ["s3://data/"], "output": [OWN.format("adapters")]},
}
PROFILES = [make_profile("own", **LIMITS), make_profile("other", default=False, allowedNamespaces=["team-b"])]
SERVERS_OWN = {"generated name that is too long", "two datasets of one name"}
"""Which the models leave to the API server: a name that is not made yet, and the keys of a list."""


def decided(escape: Escape) -> Refusal | None:
    manifest = escape.manifest()
    raw = make_job().build()
    raw["spec"], raw["metadata"] = manifest["spec"], raw["metadata"] | manifest["metadata"]
    subject = Subject.read(raw)
    if isinstance(subject.job, Refusal):
        return subject.job
    wanted = subject.job.spec.profile
    profile = select_profile(wanted, [p for p in PROFILES if wanted in (None, p["metadata"]["name"])])
    return profile if isinstance(profile, Refusal) else check(subject.job, profile)


def test_what_is_ones_own_is_allowed() -> None:
    assert decided(Escape("none", "Lookup", lambda manifest: None, "")) is None


@pytest.mark.parametrize("escape", escapes.of("Lookup"), ids=lambda escape: escape.name)
def test_what_takes_a_look_at_the_profile_is_refused(escape: Escape) -> None:
    refusal = decided(escape)
    assert refusal is not None
    assert escape.words in refusal.message


@pytest.mark.parametrize("escape", escapes.of("Schema", "Unknown"), ids=lambda escape: escape.name)
def test_what_the_schema_refuses_would_not_run_without_it(escape: Escape) -> None:
    assert decided(escape) is not None or escape.name in SERVERS_OWN


def test_a_spec_that_no_config_map_takes_is_refused_by_its_size() -> None:
    [heavy] = [escape for escape in escapes.of("Lookup") if escape.name == "a spec larger than a ConfigMap"]
    refusal = decided(heavy)
    assert refusal is not None
    assert "524,288 bytes are allowed" in refusal.message
