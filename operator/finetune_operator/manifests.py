"""PURE. Profile + job + attempt -> the objects that an attempt is made of, as plain dicts.

A pod spec is built from an allow-list: what a tenant writes reaches a pod only inside `run.json`, as the names of their
own Secret and of a ServiceAccount that the profile lists, and as the number of pods.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from finetune_api import API_VERSION
from finetune_api.failures import EXIT_CODES, outcome_of
from finetune_api.job import FineTuneJob, FineTuneJobSpec
from finetune_api.model import quantity
from finetune_api.profile import FineTuneProfile, FineTuneProfileSpec
from finetune_api.progress import audience
from finetune_api.run import Devices, PreparedSummary, RunConfig
from finetune_api.signature import Signature
from finetune_api.sizing import Sizing
from finetune_operator import network, restricted

Object = dict[str, Any]

JOB_LABEL = "finetune.dev/job-name"
ATTEMPT_LABEL = "finetune.dev/attempt"
MANAGED_BY = ("app.kubernetes.io/managed-by", "finetune-operator")
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
PROFILE = "finetune.dev/profile"
PROFILE_GENERATION = "finetune.dev/profile-generation"
PREPARE = "prepare"
CONTAINER = "trainer"
PORT = 29500
PREPARE_RETRIES = 3
"""Fresh pods of `prepare` after the first, with the Job controller's own back-off."""


@dataclass(frozen=True)
class Context:
    """What the operator itself contributes to a pod."""

    progress_url: str
    """Where pods reach the progress server, without a path."""
    ca: str
    """PEM: the authority of the progress server's certificate."""
    version: str
    sign: Callable[[bytes], Signature] | None = None
    """By the operator's key, where it has one: of the same bytes always the same."""


def child_name(job: str, attempt: int | None) -> str:
    """Name of every object of an attempt; None: of `prepare`."""
    return f"{job}-{PREPARE if attempt is None else attempt}"


def spec_sha256(spec: FineTuneJobSpec) -> str:
    """Over what decides the training's outcome: a checkpoint is resumed only under the same hash."""
    data = spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"run_policy", "queue"})
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def devices(spec: FineTuneJobSpec, profile: FineTuneProfileSpec, workers: int | None = None) -> Devices:
    """`workers`: of a gang that is smaller than the spec asks for."""
    return Devices(
        kind="CUDA" if profile.accelerator else "CPU",
        workers=workers or spec.distribution.workers,
        processes_per_worker=spec.distribution.gpus_per_worker,
    )


def prepare(job: FineTuneJob, profile: FineTuneProfile, context: Context) -> tuple[Object, ...]:
    """Job of the step that checks and converts the data, and before it what its pod needs; no GPU is asked for."""
    builder = _Builder(job, profile, context, None)
    codes = sorted(code for reason, code in EXIT_CODES.items() if outcome_of(reason) == "Permanent")
    policy: list[Object] = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": codes}},
    ]
    resources = profile.spec.prepare
    amounts = {"cpu": resources.cpu, "memory": resources.memory}
    template = builder.pod("prepare", {"requests": amounts, "limits": {"memory": resources.memory}}, "256Mi", {}, [])
    return (
        *builder.network_policy(),
        builder.config_map(None, ()),
        builder.job(template, pods=1, retries=PREPARE_RETRIES, policy=policy, labels={}, suspend=False),
    )


def gang(
    job: FineTuneJob,
    profile: FineTuneProfile,
    context: Context,
    attempt: int,
    prepared: PreparedSummary,
    sizings: Sequence[Sizing],
    workers: int | None = None,
    affinity: Object | None = None,
) -> tuple[Object, ...]:
    """Service, NetworkPolicy where the profile wants one, ConfigMap and Indexed Job of one attempt; the Job comes last,
    so that its pods find the others.

    `sizings`: one for each stage; `workers`: where they are fewer than the spec asks for.
    """
    builder = _Builder(job, profile, context, attempt, workers)
    # All pods live and die together: whatever ends one ends the Job, and the next attempt is another Job.
    policy: list[Object] = [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "NotIn", "values": [0]}},
    ]
    processes = job.spec.distribution.gpus_per_worker
    name, namespace = builder.name, job.metadata.namespace
    env = [
        _field("FINETUNE_WORKER_INDEX", "metadata.labels['batch.kubernetes.io/job-completion-index']"),
        _value("FINETUNE_MASTER_ADDR", f"{name}-0.{name}.{namespace}.svc"),
        _value("FINETUNE_MASTER_PORT", str(PORT)),
    ]
    if profile.spec.accelerator is None and all(e.name != "OMP_NUM_THREADS" for e in profile.spec.environment):
        # Pods on one node share its cores: the threads that each would start for all of them wait for each other.
        env.append(_value("OMP_NUM_THREADS", str(max(1, int(quantity(profile.spec.resources.cpu))))))
    # Only the gang goes to the profile's nodes: preparing data on a machine with GPUs would keep others from them.
    placement: Object = {
        "subdomain": name,
        "runtimeClassName": profile.spec.runtime_class_name,
        "nodeSelector": dict(profile.spec.node_selector),
        "tolerations": [toleration.to_json() for toleration in profile.spec.tolerations],
        "affinity": affinity,
    }
    shm = times(profile.spec.resources.shm, processes)
    template = builder.pod("train", _gang_resources(profile.spec, processes), shm, placement, env)
    queue = job.spec.queue
    labels = {QUEUE_LABEL: queue and queue.name, PRIORITY_LABEL: queue and queue.priority_class_name}
    return (
        builder.service(),
        *builder.network_policy(),
        builder.config_map(prepared, sizings),
        builder.job(
            template,
            pods=workers or job.spec.distribution.workers,
            retries=0,
            policy=policy,
            labels={key: value for key, value in labels.items() if value},
            suspend=bool(queue and queue.name),
        ),
    )


def without(nodes: Sequence[str], *, strictly: bool) -> Object | None:
    """The affinity of pods that stay away from these nodes: always, or where there is room elsewhere."""
    if not nodes:
        return None
    # By the node's own name, which its label kubernetes.io/hostname need not be; one requirement takes one name.
    term = {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]}
    if strictly:
        return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}
    preferred = [{"weight": 100, "preference": term}]
    return {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}


def times(amount: str, factor: int) -> str:
    """`"1.5Gi"` times 2 is `"3Gi"`."""
    number = amount.rstrip("mkKMGTPi")
    return f"{(Decimal(number) * factor).normalize():f}{amount[len(number) :]}"


def _gang_resources(profile: FineTuneProfileSpec, processes: int) -> Object:
    own = profile.resources
    requests = {"cpu": times(own.cpu, processes), "memory": times(own.memory, processes)}
    limits = {"memory": requests["memory"]}
    if own.ephemeral_storage:
        requests["ephemeral-storage"] = limits["ephemeral-storage"] = times(own.ephemeral_storage, processes)
    if profile.accelerator:
        requests[profile.accelerator.resource_name] = limits[profile.accelerator.resource_name] = str(processes)
    return {"requests": requests, "limits": limits}


@dataclass(frozen=True)
class _Builder:
    """The parts that all objects of one attempt share."""

    owner: FineTuneJob
    profile: FineTuneProfile
    context: Context
    attempt: int | None
    workers: int | None = None

    @property
    def name(self) -> str:
        return child_name(self.owner.metadata.name, self.attempt)

    def labels(self) -> dict[str, str]:
        job = self.owner.metadata.name
        return {
            "app.kubernetes.io/name": "finetune-trainer",
            "app.kubernetes.io/instance": job,
            "app.kubernetes.io/component": PREPARE if self.attempt is None else "trainer",
            "app.kubernetes.io/part-of": "finetune-operator",
            MANAGED_BY[0]: MANAGED_BY[1],
            "app.kubernetes.io/version": self.context.version,
            JOB_LABEL: job,
            ATTEMPT_LABEL: PREPARE if self.attempt is None else str(self.attempt),
        }

    def meta(self, labels: dict[str, str] | None = None) -> Object:
        owner = self.owner.metadata
        return {
            "name": self.name,
            "namespace": owner.namespace,
            "labels": self.labels() | (labels or {}),
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": "FineTuneJob",
                    "name": owner.name,
                    "uid": owner.uid,
                    "controller": True,
                    # True would need rights on finalizers under OwnerReferencesPermissionEnforcement.
                    "blockOwnerDeletion": False,
                }
            ],
        }

    def selector(self) -> dict[str, str]:
        """The pods of this attempt, and no others."""
        return {key: self.labels()[key] for key in (JOB_LABEL, ATTEMPT_LABEL)}

    def network_policy(self) -> tuple[Object, ...]:
        if not self.profile.spec.network_policy:
            return ()
        return (network.policy(self.meta(), self.selector(), self.profile.spec, self.context.progress_url),)

    def service(self) -> Object:
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": self.meta(),
            "spec": {
                "clusterIP": "None",
                # Ranks look for pod 0 before it is ready: nothing here ever is.
                "publishNotReadyAddresses": True,
                "selector": self.selector(),
                "ports": [{"name": "rendezvous", "port": PORT, "targetPort": PORT, "protocol": "TCP"}],
            },
        }

    def config_map(self, prepared: PreparedSummary | None, sizings: Sequence[Sizing]) -> Object:
        spec, meta = self.owner.spec, self.owner.metadata
        run = RunConfig(
            namespace=meta.namespace,
            job=meta.name,
            job_uid=meta.uid,
            attempt=self.attempt,
            image=self.profile.spec.image,
            spec=spec,
            spec_sha256=spec_sha256(spec),
            devices=devices(spec, self.profile.spec, self.workers),
            storage=self.profile.spec.storage,
            data_cache_bytes=max(1, int(quantity(self.profile.spec.data_cache))),
            scratch_uri=f"{(spec.checkpoint.uri or spec.output.uri).rstrip('/')}/.scratch/{meta.uid}/",
            output_uri=f"{spec.output.uri.rstrip('/')}/{meta.name}/",
            prepared=prepared,
            sizing=max(sizings, key=lambda sizing: sizing.memory_per_gpu, default=None),
            stage_sizings=list(sizings) if spec.stages else [],
            grace_seconds=self.profile.spec.termination_grace_period_seconds,
        )
        data = {"run.json": json.dumps(run.to_json(), indent=1, sort_keys=True), "ca.crt": self.context.ca}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": self.meta(), "immutable": True, "data": data}

    def job(
        self, template: Object, *, pods: int, retries: int, policy: list[Object], labels: dict[str, str], suspend: bool
    ) -> Object:
        # For people who ask under what it runs. Nothing is decided by them: that stands in the FineTuneJob's status.
        annotations = {
            PROFILE: self.profile.metadata.name,
            PROFILE_GENERATION: str(self.profile.metadata.generation),
            "finetune.dev/spec-sha256": spec_sha256(self.owner.spec),
        }
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {**self.meta(labels), "annotations": annotations},
            "spec": {
                "completionMode": "Indexed",
                "completions": pods,
                "parallelism": pods,
                "backoffLimit": retries,
                "podReplacementPolicy": "Failed",
                "podFailurePolicy": {"rules": policy},
                "suspend": suspend,
                "template": template,
            },
        }

    def pod(self, command: str, resources: Object, shm: str, placement: Object, env: list[Object]) -> Object:
        profile, credentials = self.profile.spec, self.owner.spec.credentials
        own = [*self._environment(), *env]
        names = {entry["name"] for entry in own}
        extra = [_value(entry.name, entry.value) for entry in profile.environment if entry.name not in names]
        container = {
            "name": CONTAINER,
            "image": profile.image,
            "imagePullPolicy": profile.image_pull_policy,
            "command": ["python", "-m", "finetune_trainer", command],
            "env": own + extra,
            "resources": resources,
            "terminationMessagePath": "/dev/termination-log",
            "terminationMessagePolicy": "File",
            "securityContext": restricted.CONTAINER,
            "volumeMounts": [
                {"name": "run", "mountPath": "/etc/finetune", "readOnly": True},
                {"name": "progress", "mountPath": "/var/run/finetune", "readOnly": True},
                {"name": "work", "mountPath": "/work"},
                {"name": "shm", "mountPath": "/dev/shm"},
            ],
        }
        group = {"fsGroup": restricted.USER, "fsGroupChangePolicy": "OnRootMismatch"}
        own_spec = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": profile.termination_grace_period_seconds,
            "serviceAccountName": credentials and credentials.service_account_name,
            "securityContext": restricted.POD["securityContext"] | group,
            "containers": [_without_none(container)],
            "volumes": self._volumes(shm),
        }
        spec = placement | restricted.POD | own_spec
        return {"metadata": {"labels": self.labels()}, "spec": _without_none(spec)}

    def _volumes(self, shm: str) -> list[Object]:
        token = {"path": "token", "audience": audience(self.owner.metadata.uid), "expirationSeconds": 3600}
        authority = {"name": self.name, "items": [{"key": "ca.crt", "path": "ca.crt"}]}
        sources: list[Object] = [{"serviceAccountToken": token}, {"configMap": authority}]
        credentials = self.owner.spec.credentials
        if credentials and credentials.secret_ref:
            # As files they follow a Secret that is renewed. Optional: it is the variables that say what is missing.
            items = [{"key": key, "path": f"credentials/{key}"} for key, _ in _KEYS]
            sources.append({"secret": {"name": credentials.secret_ref.name, "items": items, "optional": True}})
        return [
            {"name": "run", "configMap": {"name": self.name, "items": [{"key": "run.json", "path": "run.json"}]}},
            {"name": "progress", "projected": {"sources": sources}},
            {"name": "work", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shm}},
        ]

    def _environment(self) -> list[Object]:
        meta, credentials, storage = self.owner.metadata, self.owner.spec.credentials, self.profile.spec.storage
        progress = f"{self.context.progress_url}/apis/{API_VERSION}/namespaces/{meta.namespace}"
        env = [
            _value("FINETUNE_RUN_CONFIG", "/etc/finetune/run.json"),
            _value("FINETUNE_WORK_DIR", "/work"),
            _value("FINETUNE_TERMINATION_LOG", "/dev/termination-log"),
            # Folders that exist from the start: the root file system is read-only.
            _value("HOME", "/work"),
            _value("TMPDIR", "/work"),
            _value("HF_HOME", "/work/huggingface"),
            _field("FINETUNE_ATTEMPT_UID", "metadata.labels['batch.kubernetes.io/controller-uid']"),
            _field("FINETUNE_POD_NAME", "metadata.name"),
            _field("FINETUNE_POD_UID", "metadata.uid"),
            _field("FINETUNE_POD_IP", "status.podIP"),
            _field("FINETUNE_NODE_NAME", "spec.nodeName"),
            _field("FINETUNE_NAMESPACE", "metadata.namespace"),
            _value("KUBEFLOW_TRAINER_SERVER_URL", f"{progress}/finetunejobs/{meta.name}/status"),
            _value("KUBEFLOW_TRAINER_SERVER_CA_CERT", "/var/run/finetune/ca.crt"),
            _value("KUBEFLOW_TRAINER_SERVER_TOKEN", "/var/run/finetune/token"),
        ]
        if credentials and credentials.secret_ref:
            env.append(_value("FINETUNE_CREDENTIALS", "/var/run/finetune/credentials"))
            for key, optional in _KEYS:
                ref = {"name": credentials.secret_ref.name, "key": key, "optional": optional}
                env.append({"name": key, "valueFrom": {"secretKeyRef": ref}})
        if storage.endpoint:
            env.append(_value("AWS_ENDPOINT_URL", storage.endpoint))
        if storage.region:
            env.append(_value("AWS_REGION", storage.region))
        return env


_KEYS = (("AWS_ACCESS_KEY_ID", False), ("AWS_SECRET_ACCESS_KEY", False), ("AWS_SESSION_TOKEN", True))
"""Of the credentials' Secret, and whether they are optional."""


def _value(name: str, value: str) -> Object:
    return {"name": name, "value": value}


def _field(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _without_none(entry: Object) -> Object:
    return {key: value for key, value in entry.items() if value is not None}
