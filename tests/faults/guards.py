"""What keeps the operator from doing things twice, or to another's objects: each as it stands in the source, and as it
is without it. The suite must turn red where one is gone (test_guards.py)."""

from typing import NamedTuple


class Guard(NamedTuple):
    name: str
    file: str
    """Relative to the repository."""
    text: str
    """Once in the file."""
    without: str
    tests: tuple[str, ...]
    """Arguments of pytest; at least one test of them must fail."""


OPERATOR = "operator/finetune_operator"
CRASHES = "tests/faults/test_api_crashes.py::test_a_crash_around_any_write"
IDENTITY = "tests/faults/test_api_identity.py"
OUTAGES = "tests/faults/test_api_outages.py"
GANG = "tests/unit/test_plan_gang.py"

GUARDS = (
    Guard(
        "names of children are fixed",
        f"{OPERATOR}/manifests.py",
        'return f"{job}-{PREPARE if attempt is None else attempt}"',
        'return f"{job}-{PREPARE if attempt is None else attempt}" + __import__("secrets").token_hex(2)',
        ("tests/unit/test_plan_replay.py",),
    ),
    Guard(
        "what an earlier try created counts as created",
        f"{OPERATOR}/reconcile.py",
        'if error.reason != "AlreadyExists":',
        "if True:",
        (f"{CRASHES}[create]", "--case", "write 1: killed after the commit"),
    ),
    Guard(
        "but only where its owner has our UID",
        f"{OPERATOR}/reconcile.py",
        "if controller_uid(found) != subject.uid:",
        "if False:",
        (f"{IDENTITY}::test_a_strangers_object_has_a_childs_name",),
    ),
    Guard(
        "Jobs of an earlier FineTuneJob of the same name are not observed",
        f"{OPERATOR}/observe.py",
        "if controller_uid(raw) == uid]",
        "if True]",
        ("tests/unit/test_plan_stale.py::test_what_an_earlier_job_of_the_name_prepared_is_not_used",),
    ),
    Guard(
        "deletions carry the UID",
        f"{OPERATOR}/cluster.py",
        'preconditions = {"uid": uid} | ({"resourceVersion": resource_version} if resource_version else {})',
        "preconditions: Object = {}",
        (
            f"{IDENTITY}::test_what_took_the_place_of_a_gang_is_not_deleted",
            f"{IDENTITY}::test_what_took_the_place_of_an_expired_job_is_not_deleted",
        ),
    ),
    Guard(
        "status writes carry the version that was read",
        f"{OPERATOR}/cluster.py",
        'version = {"resourceVersion": resource_version} if resource_version else {}',
        "version: Object = {}",
        (f"{IDENTITY}::test_the_end_of_a_job_is_not_written_to_its_namesake",),
    ),
    Guard(
        "what is deleted is recorded as ended before",
        f"{OPERATOR}/reconcile.py",
        "    raw = await _write(cluster, subject, raw, status, with_uids(decided.status, created))",
        "    for kind, name, uid, version in decided.delete:\n"
        "        if uid:\n"
        "            await cluster.delete(kind, subject.namespace, name, uid, version)\n"
        "    raw = await _write(cluster, subject, raw, status, with_uids(decided.status, created))",
        (f"{CRASHES}[suspend]", "--case", "killed before the send"),
    ),
    Guard(
        "what cannot be read is not absent",
        f"{OPERATOR}/cluster.py",
        'if error.status == 404 and error.reason == "NotFound":',
        "if error.status >= 400:",
        ("tests/unit/test_cluster.py::test_not_found_is_only_what_the_server_calls_so",),
    ),
    Guard(
        "the next attempt waits for the pods of the one before",
        f"{OPERATOR}/starting.py",
        "    if lingering := _lingering(situation, attempt):",
        "    if lingering := []:",
        ("tests/unit/test_plan_retry.py::test_the_next_attempt_waits_for_the_pods_of_the_one_before",),
    ),
    Guard(
        "a Job that is not found is looked for in another way too",
        f"{OPERATOR}/reconcile.py",
        "if _lacks_a_gang(subject, jobs):",
        "if False:",
        ("tests/unit/test_plan_stale.py::test_a_gang_that_is_not_found_is_looked_for_in_another_way_too",),
    ),
    Guard(
        "what was deleted with its job is not created again",
        f"{OPERATOR}/reconcile.py",
        "and not await _exists(cluster, subject):",
        "and False:",
        ("tests/unit/test_plan_stale.py::test_the_children_of_a_job_that_is_deleted_meanwhile_do_not_come_back",),
    ),
    Guard(
        "what a Job's pods say is waited for",
        f"{OPERATOR}/reconcile.py",
        "if child := observed.unexplained(recorded, now):",
        "if False:",
        ("tests/faults/test_api_verbs.py::test_stale_answers", "--case", "retry, list pods"),
    ),
    Guard(
        "a finished job never runs again",
        f"{OPERATOR}/plan.py",
        "    if status.finished(subject.status):\n        return _after_the_end",
        "    if False:\n        return _after_the_end",
        (f"{GANG}::test_a_finished_job_never_runs_again", "tests/unit/test_plan_replay.py"),
    ),
    Guard(
        "who does not hold the lease does nothing",
        f"{OPERATOR}/leader.py",
        'if holder not in ("", self.identity) and asked < self._seen[1] + self._duration(lease):',
        "if False:",
        ("tests/unit/test_leader.py", "tests/faults/test_leadership.py"),
    ),
    Guard(
        "every job is looked at from time to time",
        f"{OPERATOR}/controller.py",
        'tasks.create_task(self._resync_forever(), name="resync")',
        "pass",
        (f"{OUTAGES}::test_deaf_watches_are_made_up_for[drop]",),
    ),
    Guard(
        "an API server that is away is waited for",
        f"{OPERATOR}/reflector.py",
        "BACKOFFS = (1, 1, 2, 3, 5, 8, 13, *(20,) * 60)",
        "BACKOFFS = (1, 1, 2, 3, 5, 8, 13)",
        (f"{OUTAGES}::test_ten_minutes_without_an_api_server_end_no_process_and_deaf_watches_are_noticed_in_two",),
    ),
    Guard(
        "a request that is refused for now is made again",
        f"{OPERATOR}/connection.py",
        "RETRIED = (429, 502, 503, 504)",
        "RETRIED = ()",
        ("tests/unit/test_cluster.py::test_it_waits_as_long_as_it_is_told_to",),
    ),
    Guard(
        "no name leads a request to another resource",
        f"{OPERATOR}/paths.py",
        'or "/" in name or "%" in name',
        "",
        ("tests/unit/test_odd_names.py::test_no_name_leads_a_request_elsewhere",),
    ),
    Guard(
        "a list is read in parts of bounded size",
        f"{OPERATOR}/cluster.py",
        "most = PAGE_BYTES if limit > 1 else LARGEST",
        "most = 1 << 40",
        ("tests/unit/test_cluster.py::test_no_part_of_a_list_is_larger_than_allowed",),
    ),
)
