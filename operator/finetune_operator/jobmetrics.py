"""What Prometheus is told of jobs. Only a job whose gang runs has series of its own, and only so many jobs have.

The labels are `job_namespace` and `job_name`: `namespace` and `job` are those of what Prometheus scrapes, and win.
"""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from finetune_api.budget import Account
from finetune_api.failures import Reason, outcome_of
from finetune_operator.containment import Containment
from finetune_operator.ledger import STARTUP, Entry, Ledger, Survey
from finetune_operator.sight import FINISHED, OTHER, STATES, Key, Object, moved, read

PREFIX = "finetune_operator_"
_SECONDS = (1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 10800.0, 43200.0, 86400.0)
ACCOUNTS = 200
DIRECTIONS = ("read", "written", "published")
_OF_JOB: dict[str, tuple[str, Callable[[Entry], float | None]]] = {
    "job_state_timestamp_seconds": ("When the job came into its state.", lambda e: e.since),
    "job_gpus": ("GPUs that its gang holds.", lambda e: e.sight.holds),
    "job_attempts": ("Times that its gang was started.", lambda e: e.sight.runs[-1].number + 1 if e.sight.runs else 0),
    "job_progress_ratio": (
        "Of its training that is done, 0 to 1.",
        lambda e: e.sight.training and e.sight.training.progress,
    ),
    "job_remaining_seconds": (
        "Until it ends, at its own pace.",
        lambda e: e.sight.training and e.sight.training.remaining_seconds,
    ),
    "job_step": ("Steps that are done.", lambda e: e.sight.training and e.sight.training.step),
    "job_steps": ("Steps that its stage has.", lambda e: e.sight.training and e.sight.training.total_steps),
    "job_step_timestamp_seconds": ("When its step last rose.", lambda e: e.step_time),
    "job_report_timestamp_seconds": (
        "When its trainer last reported.",
        lambda e: e.sight.training and e.sight.training.reported,
    ),
    "job_checkpoint_timestamp_seconds": ("When its newest checkpoint was made.", lambda e: e.sight.checkpoint),
    "job_loss": ("Training loss of its last logged step.", lambda e: _figure(e, "loss")),
    "job_tokens_per_second": ("Tokens that the gang learns from.", lambda e: _figure(e, "tokens_per_second")),
}


def _figure(entry: Entry, name: str) -> float | None:
    """Only these names become metrics: what a trainer calls its figures is its own choice, and without bound."""
    return entry.sight.training.metrics.get(name) if entry.sight.training else None


class JobMetrics(Collector):
    """Tell it of jobs; Prometheus is told when it scrapes. Belongs to the event loop, as `Metrics`."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float], ledger: Ledger | None = None) -> None:
        """`clock`: seconds since the epoch."""
        self._clock = clock
        self.accounts: Callable[[], Iterable[tuple[str, str, Account]]] = tuple
        """Profile, namespace and its account, of each that has spent something of a budget."""
        self.contained = Containment()
        self._ledger = Ledger(clock()) if ledger is None else ledger
        self._startup = Histogram(
            PREFIX + "startup_seconds",
            "How long a job was in each phase of its start.",
            ["phase"],
            registry=registry,
            buckets=_SECONDS,
        )
        for phase in STARTUP:
            self._startup.labels(phase)
        registry.register(self)

    def begin(self) -> None:
        """This operator acts from now on."""
        self._ledger.begin(self._clock())

    def note(self, raw: Object) -> None:
        """A FineTuneJob as the API server has it, or had."""
        sight = read(raw)
        if sight and (passed := self._ledger.note(sight, self._clock())):
            self._startup.labels(passed[0]).observe(passed[1])

    def forget(self, key: Key) -> None:
        """The job is gone, and with it its series."""
        self._ledger.forget(key, self._clock())

    def note_pod(self, raw: Object) -> None:
        """A pod of a FineTuneJob."""
        if found := moved(raw):
            self._ledger.moved(found)

    def forget_pod(self, uid: str) -> None:
        self._ledger.forget_pod(uid)

    def known(self) -> set[Key]:
        return self._ledger.keys()

    def collect(self) -> Iterable[Metric]:
        self._ledger.settle(self._clock())
        survey = self._ledger.survey()
        yield from self._counts(survey)
        yield from self._sums()
        yield from _figures(survey)
        with self.contained.about("metrics", "", "budgets"):
            yield from _budgets(self.accounts())

    def _counts(self, survey: Survey) -> Iterable[Metric]:
        jobs = GaugeMetricFamily(PREFIX + "jobs", "FineTuneJobs by state and reason.", labels=["state", "reason"])
        for place in sorted({(state, "") for state in STATES} | survey.states.keys()):
            jobs.add_metric(place, survey.states[place])
        yield jobs
        named = GaugeMetricFamily(
            PREFIX + "namespace_jobs", "FineTuneJobs by namespace and state.", labels=["job_namespace", "state"]
        )
        for place, count in sorted(survey.namespaces.items()):
            named.add_metric(place, count)
        yield named
        oldest = GaugeMetricFamily(
            PREFIX + "oldest_timestamp_seconds",
            "Since when the job that has been longest in its state is in it.",
            labels=["job_namespace", "state"],
        )
        for place, since in sorted(survey.oldest.items()):
            oldest.add_metric(place, since)
        yield oldest
        for name, text, counts in (
            ("gpus", "GPUs that gangs hold.", survey.gpus),
            ("gpus_wanted", "GPUs that jobs wait for whose data is ready.", survey.wanted),
        ):
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["job_namespace"])
            for namespace in sorted(self._ledger.tallies):
                gauge.add_metric([namespace], counts[namespace])
            yield gauge

    def _sums(self) -> Iterable[Metric]:
        tallies = sorted(self._ledger.tallies.items())
        hours = CounterMetricFamily(PREFIX + "gpu_hours", "GPU-hours that gangs ran.", labels=["job_namespace"])
        ended = CounterMetricFamily(
            PREFIX + "jobs_ended", "FineTuneJobs that ended, by how.", labels=["job_namespace", "state"]
        )
        waits = SummaryMetricFamily(
            PREFIX + "queue_wait_seconds", "Time in the state Queued.", labels=["job_namespace"]
        )
        traffic = CounterMetricFamily(
            PREFIX + "storage_bytes", "Bytes moved from and to the object store.", labels=["job_namespace", "direction"]
        )
        for namespace, tally in tallies:
            hours.add_metric([namespace], tally.gpu_seconds / 3600)
            waits.add_metric([namespace], tally.waits, tally.wait_seconds)
            for state in FINISHED:
                ended.add_metric([namespace, state], tally.ended[state])
            for direction in DIRECTIONS:
                traffic.add_metric([namespace, direction], tally.bytes[direction])
        yield from (hours, ended, waits, traffic)
        failures = CounterMetricFamily(PREFIX + "jobs_failed", "FineTuneJobs that failed, by why.", labels=["reason"])
        for reason in Reason:
            failures.add_metric([reason.value], self._ledger.failures[reason])
        failures.add_metric([OTHER], self._ledger.failures[""])
        yield failures
        attempts = CounterMetricFamily(PREFIX + "attempts_ended", "Attempts that ended.", labels=["outcome", "reason"])
        usual = {("Succeeded", "")} | {(outcome_of(reason), reason.value) for reason in Reason}
        for ending in sorted(usual | self._ledger.attempts.keys()):
            attempts.add_metric(ending, self._ledger.attempts[ending])
        yield attempts


def _budgets(accounts: Iterable[tuple[str, str, Account]]) -> Iterable[Metric]:
    """Of so many accounts as are shown, those of which most is spent."""
    most = sorted(accounts, key=lambda told: (-told[2].spent / told[2].allowed, told[:2]))[:ACCOUNTS]
    columns: tuple[tuple[str, str, Callable[[Account], float]], ...] = (
        ("budget_gpu_hours", "GPU-hours of a namespace in this period.", lambda account: account.allowed),
        ("budget_spent_gpu_hours", "Of them, those that are spent.", lambda account: account.spent),
        ("budget_expected_gpu_hours", "What running jobs will spend still.", lambda account: account.expected),
    )
    for name, text, hours in columns:
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=["job_namespace", "profile"])
        for profile, namespace, account in most:
            gauge.add_metric([namespace, profile], hours(account))
        yield gauge


def _figures(survey: Survey) -> Iterable[Metric]:
    hidden = PREFIX + "jobs_without_series"
    yield GaugeMetricFamily(hidden, "Running jobs that are too many to have series of their own.", survey.hidden)
    info = GaugeMetricFamily(
        PREFIX + "job_info",
        "1 for each running job with series of its own.",
        labels=["job_namespace", "job_name", "profile", "state"],
    )
    for entry in survey.shown:
        info.add_metric([*entry.sight.key, entry.sight.profile, entry.sight.state], 1)
    yield info
    for name, (text, figure) in _OF_JOB.items():
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=["job_namespace", "job_name"])
        for entry in survey.shown:
            if (value := figure(entry)) is not None:
                gauge.add_metric(entry.sight.key, value)
        yield gauge
