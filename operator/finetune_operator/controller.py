"""The running controller, without kopf: a queue of keys, the workers, the servers beside it, and how it feels."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Container, Mapping
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from finetune_operator import stalling
from finetune_operator.admission import AdmissionOptions, AdmissionServer
from finetune_operator.budgets import Budgets
from finetune_operator.cluster import ApiError, KubeCluster, load_configuration
from finetune_operator.containment import Containment, named, place_of
from finetune_operator.leader import Election, Lost, Terms
from finetune_operator.manifests import ATTEMPT_LABEL, JOB_LABEL, PREPARE, Context
from finetune_operator.metrics import Metrics
from finetune_operator.nettesting import NetworkTests
from finetune_operator.news import ChildNews, JobNews, job_facts, job_fingerprint, pod_facts, prepares
from finetune_operator.observe import Census
from finetune_operator.probes import ProbeServer
from finetune_operator.profiles import Profiles
from finetune_operator.progress import ProgressOptions, ProgressServer
from finetune_operator.reconcile import Key, NotYet, glance, reconcile, stall, utc_now
from finetune_operator.reflector import Reflector
from finetune_operator.scrape import CONNECTION_SECONDS, MAX_CONNECTIONS, Access, MetricsServer
from finetune_operator.serving import Listening
from finetune_operator.settings import Settings, operator_version
from finetune_operator.signing import Sign, signer
from finetune_operator.tls import TlsError
from finetune_operator.turns import Line
from finetune_operator.workqueue import WorkQueue

logger = logging.getLogger("finetune_operator.controller")
Object = Mapping[str, Any]


class Controller:
    """`start` it, tell it of watch events, `stop` it."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self._contained = self.metrics.jobs.contained = Containment(self.metrics.internal_error)
        self.over = asyncio.Event()
        """The process is to end: it was told to stop, or a part of the controller ended that never should."""
        self.failure: str | None = None
        """Why it ended by itself."""
        self._clock = clock
        self._queue: WorkQueue[Key] = WorkQueue(
            self._work,
            on_failure=self._failure,
            group=namespace_of,
            # Some workers are left for everybody else, however much one namespace has to do.
            most=settings.workers - settings.workers // 8,
        )
        self._jobs = JobNews()
        self._children = ChildNews()
        self._line = Line()
        self._prepare_pods: dict[Key, str] = {}
        """Pods that prepared the data of jobs whose next reconcile has not used that yet."""
        self._added: dict[Key, float] = {}
        """Keys on the queue, and since when."""
        self._sign: Sign | None = None
        self._stack = AsyncExitStack()
        self._heard: float | None = None
        self._listed = False
        self._acting = settings.lease is None
        """False while another operator leads: what is heard is remembered, and nothing is done about it."""

    async def start(self) -> None:
        """Raises ApiError where the API server does not answer or does not know our kinds, TlsError, BadKey or OSError
        where a file cannot be used."""
        try:
            await self._start()
        except Exception as error:
            self.failure = f"cannot start: {error}"
            await self.stop()
            raise

    async def _start(self) -> None:
        self.metrics.queue_depth.set_function(lambda: len(self._queue))
        if self.settings.signing_key:
            self._sign = await asyncio.to_thread(signer, self.settings.signing_key)
        if self.settings.liveness_port is not None:
            probes = ProbeServer(self.problem, self.settings.liveness_host, self.settings.liveness_port, self.metrics)
            await probes.start()
            self._stack.push_async_callback(probes.stop)
        configuration = await load_configuration()
        self._cluster = KubeCluster(configuration, timeout=self.settings.api_timeout_seconds, on_call=self._on_call)
        self._stack.push_async_callback(self._cluster.close)
        self._profiles = Profiles(self._cluster)
        self._budgets = Budgets(self._cluster, self._contained)
        self.metrics.jobs.accounts = lambda: self._budgets.accounts(utc_now())
        await self._start_servers()
        await self._start_metrics()
        if self.settings.lease is None:
            self.metrics.leader.set(1)
            await self._resync()
            work = self._act()
        else:
            work = self._lead(self._election(self.settings.lease))
        task = asyncio.create_task(work, name="controller")
        task.add_done_callback(self._ended)
        self._stack.push_async_callback(_cancel, task)

    async def _act(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._queue.run(self.settings.workers), name="queue")
            tasks.create_task(self._resync_forever(), name="resync")
            # After the first look at all jobs: what happened since is in what a watch begins with.
            for kind, told in (("Job", self.on_child), ("Pod", self.on_pod)):
                for namespace in self.settings.namespaces or (None,):
                    watch = Reflector(self._cluster, kind, namespace, told)
                    tasks.create_task(watch.run(), name=f"watch of {kind}")
            if self.settings.lease:
                tests = NetworkTests(self._cluster, self.settings.lease.split("/")[0], self._contained)
                tasks.create_task(tests.run(), name="network tests")

    def _election(self, lease: str) -> Election:
        namespace, name = lease.split("/")
        seconds = self.settings.lease_seconds
        identity = self.settings.identity or f"{socket.gethostname()}-{os.getpid()}"
        return Election(self._cluster, namespace, name, identity, Terms(seconds, seconds * 2 / 3, seconds / 7.5))

    async def _lead(self, election: Election) -> None:
        """Waits for the lease and acts while it is held. Its end is the end of the process."""
        await election.win()
        self.metrics.leader.set(1)
        self.metrics.jobs.begin()
        # From here on what is heard is put on the queue; what was heard before is looked at once.
        self._acting = True
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(election.keep(), name="lease")
                await self._resync()
                tasks.create_task(self._act(), name="work")
        except* Lost as group:
            self.failure = str(group.exceptions[0])
            raise
        finally:
            await election.give_up()

    async def stop(self) -> None:
        # kopf waits some seconds for its own task that waits for this flag, even where a signal ended it.
        self.over.set()
        await self._stack.aclose()

    def on_job(self, kind: str | None, raw: Object) -> None:
        """A watch event of a FineTuneJob; `kind` is DELETED, or anything else."""
        key = named(raw)
        self.metrics.watched("FineTuneJob")
        if key[0] in self.settings.excluded_namespaces:
            return
        if kind == "DELETED":
            if self._acting:
                self._budgets.gone(raw, utc_now())
            with self._contained.about("metrics", *key):
                self.metrics.jobs.forget(key)
            self._jobs.forget(key)
            self._children.forget(key)
            self._prepare_pods.pop(key, None)
            self._add(key)
            return
        self._measure(raw)
        with self._contained.about("watch", *key) as heard:
            if self._jobs.heard(key, job_fingerprint(raw)):
                self._add(key)
        if heard.error:
            self._add(key)

    def on_child(self, kind: str | None, raw: Object) -> None:
        """A watch event of a Job."""
        self.metrics.watched("Job")
        with self._contained.about("watch", *named(raw)):
            key, gone = child_of(raw), kind == "DELETED"
            if key and key in self._jobs and self._children.heard(raw, job_facts(raw, gone=gone), gone=gone):
                self._add(key)

    def on_pod(self, kind: str | None, raw: Object) -> None:
        """A watch event of a pod; `kind` is None for those that were there before the watch."""
        self.metrics.watched("Pod")
        with self._contained.about("watch", *named(raw)):
            if (key := child_of(raw)) is None or key not in self._jobs:
                return
            if kind == "DELETED":
                self.metrics.jobs.forget_pod(raw["metadata"]["uid"])
            else:
                self._measure_pod(raw)
            if kind and prepares(raw) and raw.get("status", {}).get("phase") == "Succeeded":
                self._prepare_pods[key] = raw["metadata"]["name"]
            gone = kind == "DELETED"
            if self._children.heard(raw, pod_facts(raw, gone=gone), gone=gone):
                self._add(key)

    def problem(self) -> str | None:
        """Why the probe should fail; None while all is well."""
        if self._heard is None or (self._acting and not self._listed):
            return "the first LIST is not done"
        silence = self._clock() - self._heard
        if silence > self.settings.stale_seconds:
            return f"the API server has not answered for {silence:.0f} s"
        return None

    def _add(self, key: Key) -> None:
        # What is excluded is told of by children too: nothing is done about them.
        if not self._acting or key[0] in self.settings.excluded_namespaces:
            return
        self.metrics.queue_adds.inc()
        self._added.setdefault(key, self._clock())
        self._queue.add(key)

    def _call_next(self) -> None:
        """Whose turn it is now is looked at now."""
        for profile in self._line.profiles():
            with self._contained.about("turns", "", f"FineTuneProfile {profile}"):
                for key in self._line.ready(profile):
                    self._add(key)

    def _measure(self, raw: Object) -> None:
        """Of several operators, only the one that acts counts jobs: else they would be counted several times."""
        if self._acting:
            with self._contained.about("metrics", *named(raw)):
                self.metrics.jobs.note(raw)

    def _measure_pod(self, raw: Object) -> None:
        if self._acting:
            with self._contained.about("metrics", *named(raw)):
                self.metrics.jobs.note_pod(raw)

    async def _work(self, key: Key) -> float | None:
        start = self._clock()
        if (added := self._added.pop(key, None)) is not None:
            self.metrics.waited(start - added)
        version: int | None = None
        self._jobs.begin(key)
        try:
            pod = self._prepare_pods.get(key)
            result = await reconcile(
                self._cluster, key, self._context, profiles=self._profiles, prepare_pod=pod, line=self._line
            )
            version = job_fingerprint(result.job) if result.job else None
        except Exception as error:
            self.metrics.reconciled(self._clock() - start, error)
            if not isinstance(error, ApiError | NotYet):
                version = await self._stall(key, error)
            raise
        finally:
            if self._jobs.done(key, version):
                self._add(key)
        self.metrics.reconciled(self._clock() - start)
        self._call_next()
        if result.job:
            self._measure(result.job)
        else:
            self.metrics.jobs.forget(key)
        if result.state != "Preparing":
            self._prepare_pods.pop(key, None)
        return result.after

    async def _stall(self, key: Key, error: Exception) -> int | None:
        """Says in the job's status, and in an Event, that the operator fails on it. The version that this wrote."""
        first = self._contained.tell("reconcile", *key, error)
        told = stalling.note(error, place_of(error))
        try:
            return await stall(self._cluster, key, told, utc_now(), first=first)
        except Exception as other:
            # The status may be one that the API server takes no change of; or it is away, and the next try says it.
            extra = {"namespace": key[0], "job": key[1]}
            logger.warning("InternalError is not in the job's status: %s", other or place_of(other), extra=extra)
            return None

    def _failure(self, key: Key, error: Exception) -> None:
        self.metrics.queue_retries.inc()
        extra = {"namespace": key[0], "job": key[1]}
        if isinstance(error, NotYet):
            logger.info("not yet: %s", error, extra=extra)
            return
        # The stack of a mistake of ours was told when it was met first.
        logger.warning("tried again later: %s", str(error)[:500] or type(error).__name__, extra=extra)

    async def _resync_forever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.resync_seconds)
            for step in (self._resync, self._read_authority):
                try:
                    await step()
                except (ApiError, TlsError, OSError) as error:
                    logger.warning("resync failed: %s", error)

    async def _resync(self) -> None:
        """Looks at every job, and puts those on the queue for which there is something to do: three LISTs, instead of
        some requests for each job, tell of nearly all of them that there is nothing."""
        census, namespaces = Census(), self.settings.namespaces
        missing = self.metrics.jobs.known()
        await self._budgets.begin()
        # What carries our labels, but is of no FineTuneJob, is not kept: anybody can make any number of those. What is
        # of one that was created since is missing in the census, and the reconcile of that one looks for it.
        names: Container[Key | None] = self._jobs if self._listed else await self._cluster.list_names(namespaces)
        unclear: set[Key] = set()
        async for raw in self._cluster.list_all("Job", namespaces):
            with self._contained.about("resync", *named(raw)) as read:
                if (key := child_of(raw)) and key in names:
                    census.add_job(raw)
                    self._children.heard(raw, job_facts(raw))
            if read.error:
                unclear.add(parent_of(raw))
        async for raw in self._cluster.list_all("Pod", namespaces):
            with self._contained.about("resync", *named(raw)) as read:
                if (key := child_of(raw)) and key in names:
                    census.add_pod(raw)
                    self._children.heard(raw, pod_facts(raw))
                    self._measure_pod(raw)
            if read.error:
                unclear.add(parent_of(raw))
        async for raw in self._cluster.list_all("FineTuneJob", namespaces):
            key = named(raw)
            if key[0] in self.settings.excluded_namespaces:
                continue
            missing.discard(key)
            self._budgets.look(raw, utc_now())
            with self._contained.about("resync", *key) as look:
                await self._look_at(raw, census)
            if look.error or key in unclear:
                # What was left out of the census is no proof that there is nothing to do.
                self._add(key)
            await asyncio.sleep(0)  # A page of jobs may be a second's work: watches and reports go on meanwhile.
        for key in missing:
            with self._contained.about("metrics", *key):
                self.metrics.jobs.forget(key)
            self._jobs.forget(key)
            self._children.forget(key)
        self.metrics.looked_at_all()
        self._call_next()
        # At the first look statuses may tell of what was long ago: then nothing is counted.
        first, self._listed = not self._listed, True
        if not first and (over := await self._budgets.settle(utc_now())):
            self._profiles.forget()
            for key in over:
                self._add(key)

    async def _look_at(self, raw: dict[str, Any], census: Census) -> None:
        key = named(raw)
        # Known by now: the watch begins with the same objects.
        self._jobs.heard(key, job_fingerprint(raw))
        self._measure(raw)
        if at_rest(raw) and not census.runs(raw["metadata"]["uid"]):
            return
        try:
            done = await glance(raw, census, self._context, self._profiles, self._line)
        except ValidationError:
            done = None  # The reconcile says what is wrong with it.
        if done is None:
            if self._listed:
                self.metrics.resync_found.inc()
            self._add(key)
            return
        if done.after is not None:
            self._queue.add_after(key, done.after)

    async def _start_servers(self) -> None:
        settings = self.settings
        options = ProgressOptions(
            tls_folder=settings.tls_folder,
            hosts=self._hosts(),
            host=settings.progress_host,
            port=settings.progress_port,
        )
        server = ProgressServer(self._cluster, options, self.metrics)
        await server.start()
        self._stack.push_async_callback(server.stop)
        if settings.admission_port is not None:
            reviews = AdmissionOptions(
                options.tls_folder,
                options.hosts,
                settings.admission_host,
                settings.admission_port,
                paths_file=settings.admission_paths,
                client_ca=settings.admission_client_ca,
                client_names=settings.admission_client_names,
            )
            webhook = AdmissionServer(self._cluster, self._profiles, reviews, self.metrics)
            await webhook.start()
            self._stack.push_async_callback(webhook.stop)
        self._progress_url = (settings.progress_url or f"https://127.0.0.1:{server.port}").rstrip("/")
        await self._read_authority()

    def _hosts(self) -> tuple[str, ...]:
        """The names that the certificate is for, where it is made here."""
        host = urlsplit(self.settings.progress_url or "").hostname
        names = [*([host] if host else []), *self.settings.progress_hosts, "localhost", "127.0.0.1"]
        return tuple(dict.fromkeys(names))

    async def _start_metrics(self) -> None:
        settings = self.settings
        if settings.metrics_port is not None:
            access = listening = None
            host, port = settings.metrics_host, settings.metrics_port
            if settings.metrics_authentication:
                access = Access(self._cluster)
                listening = Listening(
                    settings.tls_folder, self._hosts(), host, port, MAX_CONNECTIONS, CONNECTION_SECONDS
                )
            server = MetricsServer(self.metrics, host, port, access=access, listening=listening)
            await self._stack.enter_async_context(server)

    async def _read_authority(self) -> None:
        """The folder's owner may renew it."""
        path = self.settings.tls_folder / "ca.crt"
        try:
            ca = await asyncio.to_thread(path.read_text)
        except UnicodeDecodeError as error:
            raise TlsError(f"{path} must be PEM; found what is no text: {error.reason}") from error
        self._context = Context(self._progress_url, ca, operator_version(), self._sign)

    def _on_call(self, verb: str, resource: str, code: int | str, seconds: float) -> None:
        self.metrics.api_call(verb, resource, code, seconds)
        if isinstance(code, int) and code < 500:
            self._heard = self._clock()
            self.metrics.answer()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            logger.error("%s ended, and with it the operator", task.get_name(), exc_info=task.exception())
            self.failure = self.failure or f"{task.get_name()} ended"
            self.over.set()


def namespace_of(key: Key) -> str:
    return key[0]


def child_of(raw: Object) -> Key | None:
    """The FineTuneJob whose child it is; None where its labels are not ours, or its owner is none that we make."""
    labels = raw["metadata"].get("labels") or {}
    attempt = labels.get(ATTEMPT_LABEL, "")
    numbered = attempt == PREPARE or (attempt.isascii() and attempt.isdigit() and len(attempt) < 10)
    owners = raw["metadata"].get("ownerReferences") or ()
    if not any(owner.get("controller") and owner.get("kind") in ("FineTuneJob", "Job") for owner in owners):
        return None
    return (raw["metadata"]["namespace"], labels[JOB_LABEL]) if numbered and JOB_LABEL in labels else None


def parent_of(raw: Object) -> Key:
    """The FineTuneJob that a child which cannot be read says it is of; no job's key where it says nothing."""
    namespace, _ = named(raw)
    meta = raw.get("metadata")
    labels = meta.get("labels") if isinstance(meta, dict) else None
    name = labels.get(JOB_LABEL) if isinstance(labels, dict) else None
    return namespace, name if isinstance(name, str) else ""


def at_rest(raw: Object) -> bool:
    """A FineTuneJob that is finished and has no ttl."""
    conditions = (raw.get("status") or {}).get("conditions") or ()
    over = any(c.get("type") in ("Complete", "Failed") and c.get("status") == "True" for c in conditions)
    return over and "ttlSecondsAfterFinished" not in ((raw.get("spec") or {}).get("runPolicy") or {})


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
