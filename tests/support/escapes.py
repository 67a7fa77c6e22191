"""The escape corpus: manifests by which a tenant would get at what is not theirs, and what each is told.

`Schema`: the CRD alone refuses it. `Unknown`: a field that does not exist, which strict validation refuses (kubectl's,
and that of GitOps tools) and without which nothing of it is kept. `Lookup`: what only a look at the profile can tell.
`Author`: what the author has no rights on. `Update`: a change of a job that was admitted.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

from support.manifests import job_manifest

Object = dict[str, Any]
Layer = Literal["Schema", "Unknown", "Lookup", "Author", "Update"]


class Escape(NamedTuple):
    name: str
    layer: Layer
    change: Callable[[Object], None]
    """Of a manifest that would be admitted; of `Update` one that has been."""
    words: str
    """Of the refusal: the field, or what is wrong with it."""

    def manifest(self, **spec: Any) -> Object:
        made = copy.deepcopy(job_manifest("escape", **spec))
        del made["metadata"]["namespace"]
        self.change(made)
        return made


def spec(**members: Any) -> Callable[[Object], None]:
    def change(manifest: Object) -> None:
        manifest["spec"].update(copy.deepcopy(members))

    return change


def meta(**members: Any) -> Callable[[Object], None]:
    def change(manifest: Object) -> None:
        manifest["metadata"].update(copy.deepcopy(members))

    return change


def dataset(**members: Any) -> Callable[[Object], None]:
    return spec(datasets=[{"name": "a", "uri": "s3://data/a.jsonl", **members}])


def reward(expression: str) -> Callable[[Object], None]:
    return spec(method={"type": "GRPO", "grpo": {"rewards": [{"name": "a", "expression": expression}]}})


def mlflow(uri: str) -> Callable[[Object], None]:
    return spec(tracking={"mlflow": {"uri": uri}})


def stages_of(count: int, manifest: Object) -> None:
    datasets = [{"name": f"d{n}", "uri": f"s3://data/{n}.jsonl", "template": "x" * 4000} for n in range(32)]
    manifest["spec"]["stages"] = [{"name": f"s{n}", "datasets": datasets} for n in range(count)]


BASE, OUTPUT = "spec.baseModel.uri", "spec.output.uri"
METADATA = "a metadata service or an address in disguise"
DOTS = "must not contain '.' or '..'"
TEMPLATE = "a template must not reach for"
EXPRESSION = "an expression must not reach for"

ESCAPES: tuple[Escape, ...] = (
    # A pod of one's own making.
    Escape("hostPath volume", "Unknown", spec(volumes=[{"name": "h", "hostPath": {"path": "/"}}]), "spec.volumes"),
    Escape("pod template", "Unknown", spec(template={"spec": {"hostNetwork": True}}), "spec.template"),
    Escape("pod template overrides", "Unknown", spec(podTemplateOverrides=[{"spec": {}}]), "spec.podTemplateOverrides"),
    Escape("host network", "Unknown", spec(hostNetwork=True), "spec.hostNetwork"),
    Escape("host PID", "Unknown", spec(hostPID=True), "spec.hostPID"),
    Escape("privileged", "Unknown", spec(securityContext={"privileged": True}), "spec.securityContext"),
    Escape("init container", "Unknown", spec(initContainers=[{"name": "a", "image": "b"}]), "spec.initContainers"),
    Escape("image", "Unknown", spec(image="evil.example/trainer"), "spec.image"),
    Escape("image of the model", "Unknown",
           spec(baseModel={"uri": "s3://models/tiny/", "image": "a"}), "baseModel.image"),
    Escape("image pull secret", "Unknown", spec(imagePullSecrets=[{"name": "a"}]), "spec.imagePullSecrets"),
    Escape("command", "Unknown", spec(command=["sh", "-c", "id"]), "spec.command"),
    Escape("environment", "Unknown",
           spec(environment=[{"name": "LD_PRELOAD", "value": "/work/a.so"}]), "spec.environment"),
    Escape("env", "Unknown", spec(env=[{"name": "PYTHONPATH", "value": "/work"}]), "spec.env"),
    Escape("environment of distribution", "Unknown",
           spec(distribution={"env": {"NCCL_DEBUG": "INFO"}}), "distribution.env"),
    Escape("node selector", "Unknown",
           spec(nodeSelector={"node-role.kubernetes.io/control-plane": ""}), "spec.nodeSelector"),
    Escape("toleration", "Unknown", spec(tolerations=[{"operator": "Exists"}]), "spec.tolerations"),
    Escape("runtime class", "Unknown", spec(runtimeClassName="host"), "spec.runtimeClassName"),
    Escape("resources", "Unknown", spec(resources={"limits": {"nvidia.com/gpu": 64}}), "spec.resources"),
    Escape("storage endpoint", "Unknown", spec(storage={"endpoint": "http://169.254.169.254"}), "spec.storage"),
    Escape("endpoint of output", "Unknown",
           spec(output={"uri": "s3://a-b/", "endpoint": "http://a"}), "output.endpoint"),
    Escape("remote code", "Unknown",
           spec(baseModel={"uri": "s3://models/tiny/", "trustRemoteCode": True}), "trustRemoteCode"),
    Escape("no network policy", "Unknown", spec(networkPolicy=False), "spec.networkPolicy"),
    # What belongs to another namespace.
    Escape("Secret elsewhere", "Unknown",
           spec(credentials={"secretRef": {"name": "s3", "namespace": "team-b"}}), "credentials.secretRef.namespace"),
    Escape("Secret by path", "Schema",
           spec(credentials={"secretRef": {"name": "team-b/s3"}}), "spec.credentials.secretRef.name"),
    Escape("Secret by dots", "Schema",
           spec(credentials={"secretRef": {"name": "../team-b/secrets/s3"}}), "spec.credentials.secretRef.name"),
    Escape("two credentials", "Schema",
           spec(credentials={"secretRef": {"name": "a"}, "serviceAccountName": "b"}), "exactly one of secretRef"),
    Escape("ServiceAccount elsewhere", "Schema",
           spec(credentials={"serviceAccountName": "kube-system:admin"}), "spec.credentials.serviceAccountName"),
    Escape("profile by path", "Schema", spec(profile="../finetuneprofiles/big"), "spec.profile"),
    Escape("queue by path", "Schema", spec(queue={"name": "team-b/queue"}), "spec.queue.name"),
    Escape("queue as a label that is too long", "Schema", spec(queue={"name": "q" * 64}), "spec.queue.name"),
    Escape("other manager", "Schema",
           spec(runPolicy={"managedBy": "evil.example/controller"}), "spec.runPolicy.managedBy"),
    # Keys and buckets.
    Escape("dots in the model", "Schema", spec(baseModel={"uri": "s3://models/team-a/../team-b/"}), DOTS),
    Escape("dots at the end", "Schema", spec(output={"uri": "s3://adapters/team-a/.."}), DOTS),
    Escape("a dot alone", "Schema", spec(output={"uri": "s3://adapters/./team-b/"}), DOTS),
    Escape("dots in a dataset", "Schema", dataset(uri="s3://data/team-a/../../b.jsonl"), DOTS),
    Escape("dots in the scratch", "Schema", spec(checkpoint={"uri": "s3://adapters/a/../b/"}), DOTS),
    Escape("dots in a revision", "Schema", spec(baseModel={"uri": "hf://org/name@../../x"}), DOTS),
    Escape("dots in a claim", "Schema", spec(baseModel={"uri": "pvc://claim/../../etc"}), DOTS),
    Escape("dots in an adapter", "Schema",
           spec(baseModel={"uri": "s3://models/tiny/", "adapterUri": "s3://adapters/team-a/../team-b/x/"}), DOTS),
    Escape("encoded dots", "Schema", spec(baseModel={"uri": "s3://models/team-a/%2e%2e/team-b/"}), BASE),
    Escape("encoded slash", "Schema", spec(baseModel={"uri": "s3://models/team-a/..%2fteam-b/"}), BASE),
    Escape("twice encoded dots", "Schema", spec(output={"uri": "s3://adapters/%252e%252e/b/"}), OUTPUT),
    Escape("wide dots", "Schema", spec(output={"uri": "s3://adapters/\uff0e\uff0e/b/"}), OUTPUT),
    Escape("backslash", "Schema", spec(output={"uri": "s3://adapters/a\\..\\b/"}), OUTPUT),
    Escape("new line", "Schema", spec(output={"uri": "s3://adapters/a/\ns3://adapters/b/"}), OUTPUT),
    Escape("new line at the end", "Schema", spec(output={"uri": "s3://adapters/a/\n"}), OUTPUT),
    Escape("null byte", "Schema", spec(output={"uri": "s3://adapters/a\0/b/"}), OUTPUT),
    Escape("query", "Schema", spec(baseModel={"uri": "s3://models/tiny/?versionId=1"}), BASE),
    Escape("user in a bucket", "Schema", spec(baseModel={"uri": "s3://key:secret@models/tiny/"}), BASE),
    Escape("address as a bucket", "Schema",
           spec(output={"uri": "s3://169.254.169.254/latest/"}), "named like an address"),
    Escape("address as a dataset", "Schema", dataset(uri="s3://10.0.0.1/a.jsonl"), "named like an address"),
    Escape("file", "Schema", spec(baseModel={"uri": "file:///etc/passwd"}), BASE),
    Escape("local path", "Schema", spec(output={"uri": "/var/run/secrets"}), OUTPUT),
    Escape("metadata service as a model", "Schema", spec(baseModel={"uri": "http://169.254.169.254/latest/"}), BASE),
    Escape("shell in a key", "Schema", spec(output={"uri": "s3://adapters/$(id)/"}), OUTPUT),
    Escape("shell in a module", "Schema",
           spec(tuning={"type": "LoRA", "lora": {"targetModules": ["q_proj; id"]}}), "targetModules"),
    # Servers that only a node should see.
    Escape("metadata service", "Schema", mlflow("http://169.254.169.254/"), METADATA),
    Escape("metadata service by name", "Schema",
           mlflow("http://metadata.google.internal/computeMetadata/v1/"), METADATA),
    Escape("metadata service as a number", "Schema", mlflow("http://2852039166/"), METADATA),
    Escape("metadata service in hexadecimal", "Schema", mlflow("http://0xa9fea9fe/"), METADATA),
    Escape("metadata service in octal", "Schema", mlflow("http://0251.0376.0251.0376/"), METADATA),
    Escape("metadata service in IPv6", "Schema", mlflow("http://[fd00:ec2::254]/"), METADATA),
    Escape("metadata service mapped", "Schema", mlflow("http://[::ffff:a9fe:a9fe]/"), METADATA),
    Escape("metadata service behind a user", "Schema", mlflow("http://example.com@169.254.169.254/"), "mlflow.uri"),
    # Templates.
    Escape("class of a value", "Schema", dataset(template="{{ prompt.__class__.__mro__ }}"), TEMPLATE),
    Escape("class by key", "Schema", dataset(template="{{ prompt['__class__'] }}"), TEMPLATE),
    Escape("class by filter", "Schema", dataset(template="{{ prompt | attr('_' ~ '_class_' ~ '_') }}"), TEMPLATE),
    Escape("class by escapes", "Schema", dataset(template="{{ prompt['\\x5f\\x5fclass\\x5f\\x5f'] }}"), TEMPLATE),
    Escape("globals of a statement", "Schema", dataset(template="{% set a = cycler.__init__.__globals__ %}"), TEMPLATE),
    Escape("file by include", "Schema", dataset(template="{% include '/etc/passwd' %}"), TEMPLATE),
    Escape("file by import", "Schema", dataset(template="{%- import 'os' as os %}"), TEMPLATE),
    Escape("template of a stage", "Schema",
           spec(stages=[{"name": "a", "datasets": [{"name": "a", "uri": "s3://data/a", "template": "{{ a.__b__ }}"}]}]),
           TEMPLATE),
    Escape("class in a reward", "Schema", reward("prompt.__class__.__base__.__subclasses__()"), EXPRESSION),
    Escape("attr in a reward", "Schema", reward("prompt|attr('up' ~ 'per')"), EXPRESSION),
    # Names.
    Escape("name over 63 with its children's", "Schema", meta(name="a" * 51), "metadata.name"),
    Escape("name of a pod", "Schema", meta(name="a" * 253), "metadata.name"),
    Escape("generated name that is too long", "Schema",
           lambda m: m.update(metadata={"generateName": "a" * 50}), "metadata.name"),
    Escape("name that is no host's", "Schema", meta(name="0-a"), "metadata.name"),
    Escape("name with a dot", "Schema", meta(name="a.b"), "metadata.name"),
    Escape("dataset that is a path", "Schema", dataset(name="../a"), "datasets"),
    Escape("stage that is a path", "Schema", spec(stages=[{"name": "../../data"}]), "stages"),
    Escape("two datasets of one name", "Schema",
           spec(datasets=[{"name": "a", "uri": "s3://data/a"}, {"name": "a", "uri": "s3://data/b"}]), "datasets"),
    # More than there is.
    Escape("workers without end", "Schema", spec(distribution={"workers": 1_000_000}), "spec.distribution.workers"),
    Escape("GPUs without end", "Schema",
           spec(distribution={"gpusPerWorker": 10**9}), "spec.distribution.gpusPerWorker"),
    Escape("no workers", "Schema", spec(distribution={"workers": 0}), "spec.distribution.workers"),
    Escape("datasets without end", "Schema",
           spec(datasets=[{"name": f"d{n}", "uri": "s3://data/a"} for n in range(65)]), "spec.datasets"),
    Escape("stages without end", "Schema", spec(stages=[{"name": f"s{n}"} for n in range(17)]), "spec.stages"),
    Escape("template without end", "Schema", dataset(template="x" * 4097), "template"),
    Escape("attempts without end", "Schema", spec(runPolicy={"maxAttempts": 10**6}), "spec.runPolicy.maxAttempts"),
    Escape("a spec larger than etcd", "Schema", partial(stages_of, 16), "too large"),
    Escape("a spec larger than a ConfigMap", "Lookup", partial(stages_of, 6), "bytes"),
    # What the profile does not allow.
    Escape("foreign namespace's profile", "Lookup", spec(profile="other"), "metadata.namespace"),
    Escape("ServiceAccount that is not listed", "Lookup",
           spec(credentials={"serviceAccountName": "cluster-admin"}), "spec.credentials.serviceAccountName"),
    Escape("more workers than the profile has", "Lookup",
           spec(distribution={"workers": 100}, training={"globalBatchSize": 100}), "spec.distribution.workers"),
    Escape("longer than the profile's deadline", "Lookup",
           spec(runPolicy={"activeDeadlineSeconds": 10**9}), "spec.runPolicy.activeDeadlineSeconds"),
    Escape("foreign output", "Lookup", spec(output={"uri": "s3://adapters/team-b/"}), OUTPUT),
    Escape("output beside one's own", "Lookup", spec(output={"uri": "s3://adapters/{namespace}b/"}), OUTPUT),
    Escape("foreign bucket for scratch", "Lookup", spec(checkpoint={"uri": "s3://foreign/"}), "spec.checkpoint.uri"),
    Escape("foreign dataset", "Lookup", dataset(uri="s3://foreign/a.jsonl"), "spec.datasets[0].uri"),
    Escape("foreign held-out data", "Lookup",
           spec(validation={"datasets": [{"name": "v", "uri": "s3://foreign/a.jsonl"}]}),
           "spec.validation.datasets[0].uri"),
    Escape("foreign model", "Lookup", spec(baseModel={"uri": "s3://foreign/tiny/"}), BASE),
    Escape("foreign adapter", "Lookup",
           spec(baseModel={"uri": "s3://models/tiny/", "adapterUri": "s3://adapters/team-b/x/y/"}),
           "spec.baseModel.adapterUri"),
    Escape("foreign reward model", "Lookup",
           spec(method={"type": "PPO", "ppo": {"rewardModel": {"uri": "s3://foreign/reward/"}}}),
           "spec.method.ppo.rewardModel.uri"),
    Escape("foreign dataset of a stage", "Lookup",
           spec(stages=[{"name": "a", "datasets": [{"name": "a", "uri": "s3://foreign/a.jsonl"}]}]),
           "spec.stages[0].datasets[0].uri"),
    # What the author may not read.
    Escape("Secret that the author may not read", "Author",
           spec(credentials={"secretRef": {"name": "not-mine"}}), "not-mine"),
    Escape("ServiceAccount that the author may not use", "Author",
           spec(credentials={"serviceAccountName": "listed"}), "listed"),
    # Changes of what was admitted.
    Escape("another Secret", "Update",
           spec(credentials={"secretRef": {"name": "other"}}), "credentials cannot be changed"),
    Escape("no credentials any more", "Update",
           lambda m: m["spec"].pop("credentials"), "credentials cannot be changed"),
    Escape("another output", "Update", spec(output={"uri": "s3://adapters/team-b/"}), "output cannot be changed"),
    Escape("another model", "Update", spec(baseModel={"uri": "s3://models/other/"}), "baseModel cannot be changed"),
    Escape("another dataset", "Update", dataset(uri="s3://data/other.jsonl"), "datasets cannot be changed"),
    Escape("another profile", "Update", spec(profile="other"), "profile cannot be changed"),
    Escape("more workers", "Update", spec(distribution={"workers": 8}), "distribution cannot be changed"),
    Escape("scratch elsewhere", "Update", spec(checkpoint={"uri": "s3://foreign/"}), "checkpoint cannot be changed"),
    Escape("another queue", "Update", spec(queue={"name": "other"}), "queue.name cannot be changed"),
    Escape("manager that comes later", "Update",
           spec(runPolicy={"managedBy": "kueue.x-k8s.io/multikueue"}), "runPolicy.managedBy cannot be changed"),
)  # fmt: skip


def of(*layers: Layer) -> list[Escape]:
    return [escape for escape in ESCAPES if escape.layer in layers]
