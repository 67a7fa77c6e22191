"""PURE. What is known of all FineTuneJobs, for metrics alone: how each stands now, and sums that outlive it.

Times are seconds since the epoch. Sums begin with the ledger: what was before is not counted, as with any counter of a
process. Namespaces beyond a limit are counted together, as `other`; what is known of a namespace goes some time after
its last job.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from finetune_operator.sight import HOLDING, OTHER, Key, Moved, Sight

STARTUP = ("Pending", "Preparing", "Queued", "Starting", "Loading")
"""What lies between a manifest and its first step, in this order; a queue or a retry may lead back."""
WAITING = ("Queued", "Starting", "Retrying")
"""States in which a job wants GPUs that it has not."""
FORGET_AFTER = 900.0
"""How long a namespace without jobs is remembered: Prometheus has read its last figures by then."""


@dataclass
class Tally:
    """Sums of one namespace."""

    ended: Counter[str] = field(default_factory=Counter)
    """Jobs by their last state."""
    gpu_seconds: float = 0.0
    waits: int = 0
    wait_seconds: float = 0.0
    """In the state Queued."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Read from the object store, written to it, and published."""


@dataclass
class Entry:
    """One job."""

    sight: Sight
    word: str
    since: float
    """When it came into its state."""
    witnessed: bool
    """Whether that was seen, rather than read from its status or taken for now."""
    label: str
    """Its namespace, or `other`."""
    gpu_seconds: float
    """Of it, how much has been counted."""
    last_ended: int
    """Number of the newest attempt whose end has been counted."""
    step_time: float | None = None
    """When its step last rose."""


@dataclass
class Survey:
    """How all jobs stand at one time. Namespaces are labels: `other` for many."""

    states: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Jobs by state and reason."""
    namespaces: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Jobs by namespace and state."""
    oldest: dict[tuple[str, str], float] = field(default_factory=dict)
    """Of unfinished jobs by namespace and state, since when the one that has been longest in it is."""
    gpus: Counter[str] = field(default_factory=Counter)
    """That gangs hold, by namespace."""
    wanted: Counter[str] = field(default_factory=Counter)
    """That jobs wait for whose data is ready."""
    shown: list[Entry] = field(default_factory=list)
    """Running jobs with figures of their own."""
    hidden: int = 0
    """Running jobs without, as they are too many."""


class Ledger:
    """Tell it of every version of every job, in any order; and which jobs there are."""

    def __init__(self, born: float, namespaces: int = 200, jobs: int = 1000, jobs_of_namespace: int = 100) -> None:
        """`born`: now. `jobs`: of how many there are figures of their own, and of how many of one namespace."""
        self._born = born
        self._namespaces, self._jobs, self._jobs_of_namespace = namespaces, jobs, jobs_of_namespace
        self._entries: dict[Key, Entry] = {}
        self._count: Counter[str] = Counter()
        """Jobs by namespace."""
        self._labels: dict[str, str] = {}
        self._empty: dict[str, float] = {}
        """Namespaces without jobs, and since when."""
        self._pods: set[str] = set()
        """UIDs of those that are still there and whose bytes are counted."""
        self.tallies: dict[str, Tally] = defaultdict(Tally)
        """By namespace, or `other`."""
        self.failures: Counter[str] = Counter()
        """Jobs that failed, by reason."""
        self.attempts: Counter[tuple[str, str]] = Counter()
        """Attempts that ended, by outcome and reason."""

    def begin(self, now: float) -> None:
        """Counts from now on: what was before, another operator has counted."""
        self._born = now

    def keys(self) -> set[Key]:
        return set(self._entries)

    def note(self, sight: Sight, now: float) -> tuple[str, float] | None:
        """How a job stands. Returns the phase of its start that is over with this, where one is, and its seconds."""
        entry = self._entries.get(sight.key)
        if entry is None or entry.sight.uid != sight.uid:
            self.forget(sight.key, now)
            entry = self._entries[sight.key] = self._first(sight, now)
            self._advance(entry, entry.sight, sight, now)
            return None
        before = entry.sight
        # What is finished never runs again, and all of it has been counted.
        if before.finished or _older(sight, before):
            return None
        entry.sight = sight
        self._advance(entry, before, sight, now)
        return self._pass(entry, now)

    def forget(self, key: Key, now: float) -> None:
        """The job is gone."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self._accrue(entry, now)
        self._count[key[0]] -= 1
        if not self._count[key[0]]:
            del self._count[key[0]]
            self._empty[key[0]] = now

    def moved(self, pod: Moved) -> None:
        """A pod has ended; what is told again is counted once. Anybody may label a pod: it counts by its Job."""
        entry = self._entries.get(pod.key)
        if entry is None or pod.owner not in entry.sight.job_uids:
            return
        if pod.uid in self._pods or pod.ended < self._born:
            return
        self._pods.add(pod.uid)
        tally = self.tallies[entry.label]
        tally.bytes["read"] += pod.read
        tally.bytes["written"] += pod.written

    def forget_pod(self, uid: str) -> None:
        self._pods.discard(uid)

    def _first(self, sight: Sight, now: float) -> Entry:
        namespace = sight.key[0]
        self._count[namespace] += 1
        self._empty.pop(namespace, None)
        if namespace not in self._labels:
            own = sum(label != OTHER for label in self._labels.values())
            self._labels[namespace] = namespace if own < self._namespaces else OTHER
        label = self._labels[namespace]
        self.tallies[label]  # From 0 on: of a series that begins at 1, nobody sees that it rose.
        new = sight.created >= self._born
        return Entry(
            sight=sight,
            word=sight.word,
            since=sight.since or now,
            witnessed=new and sight.word == "Pending",
            label=label,
            gpu_seconds=0.0 if new else sight.gpu_seconds(now),
            last_ended=-1 if new else max((run.number for run in sight.runs if run.outcome), default=-1),
        )

    def _advance(self, entry: Entry, before: Sight, sight: Sight, now: float) -> None:
        self._accrue(entry, now)
        tally = self.tallies[entry.label]
        for run in sight.runs:
            if run.outcome and run.number > entry.last_ended:
                self.attempts[run.outcome, run.reason] += 1
                entry.last_ended = run.number
        first_seen_ended = before is sight and not self._since_born(sight.completed)
        if sight.finished and not first_seen_ended:
            tally.ended[sight.state] += 1
            tally.bytes["published"] += sight.published_bytes
            if sight.state == "Failed":
                self.failures[sight.reason] += 1
        if _steps(sight) != _steps(before) or entry.step_time is None:
            entry.step_time = now if sight.training else None
        if sight.finished:
            # Of what is over only its state is told.
            entry.sight = sight._replace(runs=(), training=None)

    def _since_born(self, time: float | None) -> bool:
        return time is not None and time >= self._born

    def _pass(self, entry: Entry, now: float) -> tuple[str, float] | None:
        word = entry.sight.word
        if word == entry.word:
            return None
        phase, seconds = entry.word, max(0.0, now - entry.since)
        told = entry.witnessed and phase in STARTUP and not entry.sight.finished
        if told and phase == "Queued":
            self.tallies[entry.label].waits += 1
            self.tallies[entry.label].wait_seconds += seconds
        entry.word, entry.since, entry.witnessed = word, now, True
        return (phase, seconds) if told else None

    def _accrue(self, entry: Entry, now: float) -> None:
        # An attempt that was forgotten, as there were too many, takes what was counted of it along.
        spent = entry.sight.gpu_seconds(now)
        self.tallies[entry.label].gpu_seconds += max(0.0, spent - entry.gpu_seconds)
        entry.gpu_seconds = spent

    def settle(self, now: float) -> None:
        """Counts what runs up to now, and drops namespaces that have been empty for long."""
        for entry in self._entries.values():
            if not entry.sight.finished:
                self._accrue(entry, now)
        for namespace in [name for name, since in self._empty.items() if now - since > FORGET_AFTER]:
            del self._empty[namespace]
            if self._labels.pop(namespace) != OTHER:
                del self.tallies[namespace]

    def survey(self) -> "Survey":
        """How all jobs stand. Of running ones, those that began first have figures of their own, so that these stay the
        same; queued ones, of which a tenant may have any number, take no place."""
        found, running = Survey(), []
        for entry in self._entries.values():
            sight, place = entry.sight, (entry.label, entry.sight.state)
            found.states[sight.state, sight.reason] += 1
            found.namespaces[place] += 1
            if sight.finished:
                continue
            found.oldest[place] = min(entry.since, found.oldest.get(place, entry.since))
            holds = sight.holds
            found.gpus[entry.label] += holds
            if sight.state in WAITING:
                found.wanted[entry.label] += max(0, sight.gpus - holds)
            if sight.state in HOLDING:
                running.append(entry)
        self._choose(sorted(running, key=_began), found)
        return found

    def _choose(self, running: list[Entry], found: "Survey") -> None:
        shown: Counter[str] = Counter()
        for entry in running:
            namespace = entry.sight.key[0]
            if len(found.shown) < self._jobs and shown[namespace] < self._jobs_of_namespace:
                shown[namespace] += 1
                found.shown.append(entry)
            else:
                found.hidden += 1


def _older(sight: Sight, known: Sight) -> bool:
    """Watches, lists and answers to writes overtake each other."""
    return sight.version is not None and known.version is not None and sight.version < known.version


def _steps(sight: Sight) -> tuple[int | None, int | None] | None:
    return (sight.training.attempt, sight.training.step) if sight.training else None


def _began(entry: Entry) -> tuple[float, Key]:
    return (entry.sight.runs[-1].started or 0.0) if entry.sight.runs else 0.0, entry.sight.key
