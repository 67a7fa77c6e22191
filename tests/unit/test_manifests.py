"""The objects of an attempt: valid, restricted, and made of nothing that a tenant wrote but what is allowed."""

import json
from typing import Any

import kubernetes_validate
import pytest

from finetune_api.job import parse
from finetune_api.model import quantity
from finetune_api.profile import FineTuneProfile
from finetune_api.run import RunConfig
from finetune_operator import manifests
from finetune_operator.fitting import sized
from support.world import CONTEXT, PREPARED, JobBuilder, Object, make_job, make_profile

FULL_PROFILE: dict[str, Any] = {
    "imagePullPolicy": "IfNotPresent",
    "nodeSelector": {"gpu": "a100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "runtimeClassName": "nvidia",
    "accelerator": {"memory": "80Gi"},
    "resources": {"cpu": "1500m", "memory": "64Gi", "shm": "8Gi", "ephemeralStorage": "100Gi"},
    "dataCache": "1.5Ti",
    "serviceAccounts": ["tuner"],
    "storage": {"endpoint": "https://s3.example", "region": "eu-central-1"},
    "environment": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "FINETUNE_RUN_CONFIG", "value": "/etc/passwd"}],
    "terminationGracePeriodSeconds": 300,
}


def build(builder: JobBuilder, **profile: Any) -> tuple[list[Object], list[Object]]:
    """The objects of `prepare`, and of attempt 3."""
    job = parse(builder.build())
    chosen = FineTuneProfile.model_validate(make_profile(**profile))
    sizing = sized(job, chosen, PREPARED)
    gang = manifests.gang(job, chosen, CONTEXT, 3, PREPARED, sizing)
    return list(manifests.prepare(job, chosen, CONTEXT)), list(gang)


FULL_JOB = make_job().with_spec(
    distribution={"workers": 2, "gpusPerWorker": 8},
    training={"globalBatchSize": 64},
    queue={"name": "team-a", "priorityClassName": "batch"},
    credentials={"secretRef": {"name": "s3-creds"}},
)
CASES = [
    pytest.param(make_job(), {}, id="cpu"),
    pytest.param(FULL_JOB, FULL_PROFILE, id="gpu"),
    pytest.param(make_job().with_spec(credentials={"serviceAccountName": "tuner"}), FULL_PROFILE, id="account"),
]


def pod_of(objects: list[Object]) -> Object:
    spec: Object = objects[-1]["spec"]["template"]["spec"]
    return spec


def environment(objects: list[Object]) -> dict[str, Object]:
    return {entry["name"]: entry for entry in pod_of(objects)["containers"][0]["env"]}


@pytest.mark.parametrize(("job", "profile"), CASES)
def test_the_schemas_of_kubernetes_hold(job: JobBuilder, profile: Any) -> None:
    for objects in build(job, **profile):
        for manifest in objects:
            kubernetes_validate.validate(manifest, "1.37", strict=True)


def restricted(pod: Object) -> list[str]:
    """What Pod Security's level `restricted` forbids in this pod."""
    found = [f"host{name}" for name in ("Network", "PID", "IPC") if pod.get(f"host{name}")]
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    found += [f"volume {v['name']}" for v in pod["volumes"] if not (v.keys() - {"name"}) <= allowed]
    context = pod["securityContext"]
    if context["seccompProfile"]["type"] not in ("RuntimeDefault", "Localhost"):
        found.append("seccomp")
    for container in pod["containers"] + pod.get("initContainers", []):
        own = container["securityContext"]
        if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
            found.append("privileges")
        if own["capabilities"].get("drop") != ["ALL"] or own["capabilities"].get("add"):
            found.append("capabilities")
        if not own.get("runAsNonRoot", context.get("runAsNonRoot")) or own.get("runAsUser", context["runAsUser"]) == 0:
            found.append("root")
        if any("hostPort" in port for port in container.get("ports", [])):
            found.append("hostPort")
    return found


@pytest.mark.parametrize(("job", "profile"), CASES)
def test_pods_are_restricted_and_hold_no_token_but_the_progress_one(job: JobBuilder, profile: Any) -> None:
    for objects in build(job, **profile):
        pod = pod_of(objects)
        assert restricted(pod) == []
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
        [progress] = [v["projected"]["sources"] for v in pod["volumes"] if "projected" in v]
        assert progress[0]["serviceAccountToken"]["audience"] == "finetune.dev/progress/job-uid"
        assert not [v for v in pod["volumes"] if "secret" in v]


def test_the_check_of_pod_security_sees_what_it_should() -> None:
    pod = pod_of(build(make_job())[1])
    container = pod["containers"][0]
    bad = container | {"securityContext": {"privileged": True, "capabilities": {}, "runAsUser": 0}}
    broken = pod | {"containers": [bad], "hostNetwork": True, "volumes": [{"name": "h", "hostPath": {"path": "/"}}]}
    assert set(restricted(broken)) == {"hostNetwork", "volume h", "privileges", "capabilities", "root"}


def test_the_gang_is_one_unit() -> None:
    service, config, job = build(FULL_JOB, **FULL_PROFILE)[1]
    spec = job["spec"]
    assert {o["metadata"]["name"] for o in (service, config, job)} == {"support-bot-3"}
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert (spec["backoffLimit"], spec["podReplacementPolicy"]) == (0, "Failed")
    assert [rule["action"] for rule in spec["podFailurePolicy"]["rules"]] == ["FailJob", "FailJob"]
    assert spec["suspend"] is True
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["template"]["spec"]["subdomain"] == "support-bot-3"
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 300
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()


def test_amounts_are_those_of_a_process_times_the_processes() -> None:
    container = pod_of(build(FULL_JOB, **FULL_PROFILE)[1])["containers"][0]
    limits = {"memory": "512Gi", "ephemeral-storage": "800Gi", "nvidia.com/gpu": "8"}
    assert container["resources"] == {"requests": {"cpu": "12000m"} | limits, "limits": limits}
    [shm] = [v["emptyDir"] for v in pod_of(build(FULL_JOB, **FULL_PROFILE)[1])["volumes"] if v["name"] == "shm"]
    assert shm == {"medium": "Memory", "sizeLimit": "64Gi"}


@pytest.mark.parametrize("text", ["1", "1500m", "1.5Gi", "10k", "0.1"])
@pytest.mark.parametrize("factor", [1, 3, 10])
def test_times(text: str, factor: int) -> None:
    assert quantity(manifests.times(text, factor)) == pytest.approx(quantity(text) * factor)


def test_prepare_asks_for_no_gpu_and_goes_to_no_gpu_node() -> None:
    config, job = build(FULL_JOB, **FULL_PROFILE)[0]
    pod = pod_of([job])
    assert "nvidia.com/gpu" not in json.dumps(job)
    assert "nodeSelector" not in pod
    assert "tolerations" not in pod
    assert job["spec"]["suspend"] is False
    assert "kueue.x-k8s.io/queue-name" not in job["metadata"]["labels"]
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["action"] == "Ignore"
    codes = rules[1]["onExitCodes"]["values"]
    assert 66 in codes, "invalid data does not become valid"
    assert 71 not in codes, "a store that is away comes back"
    assert config["immutable"] is True
    assert pod["containers"][0]["command"] == ["python", "-m", "finetune_trainer", "prepare"]


def test_the_run_config_says_it_all() -> None:
    _, config, _ = build(FULL_JOB, **FULL_PROFILE)[1]
    run = RunConfig.model_validate_json(config["data"]["run.json"])
    assert (run.job, run.namespace, run.job_uid, run.attempt) == ("support-bot", "team-a", "job-uid", 3)
    assert (run.devices.kind, run.devices.world_size, run.grace_seconds) == ("CUDA", 16, 300)
    assert run.scratch_uri == "s3://adapters/team-a/.scratch/job-uid/"
    assert run.output_uri == "s3://adapters/team-a/support-bot/"
    assert run.prepared == PREPARED
    assert run.data_cache_bytes == 3 * 2**39
    assert run.sizing
    assert config["data"]["ca.crt"] == CONTEXT.ca
    first = RunConfig.model_validate_json(build(make_job())[0][0]["data"]["run.json"])
    assert (first.attempt, first.prepared, first.sizing, first.devices.kind) == (None, None, None, "CPU")


def test_the_environment() -> None:
    env = environment(build(FULL_JOB, **FULL_PROFILE)[1])
    values = {name: entry.get("value") for name, entry in env.items()}
    assert values["FINETUNE_RUN_CONFIG"] == "/etc/finetune/run.json", "a profile cannot override ours"
    assert values["NCCL_DEBUG"] == "INFO"
    assert values["FINETUNE_MASTER_ADDR"] == "support-bot-3-0.support-bot-3.team-a.svc"
    assert values["FINETUNE_MASTER_PORT"] == "29500"
    assert values["AWS_ENDPOINT_URL"] == "https://s3.example"
    assert values["AWS_REGION"] == "eu-central-1"
    path = "/apis/finetune.dev/v1alpha1/namespaces/team-a/finetunejobs/support-bot/status"
    assert values["KUBEFLOW_TRAINER_SERVER_URL"] == f"https://progress.example:8443{path}"
    assert env["AWS_SECRET_ACCESS_KEY"]["valueFrom"]["secretKeyRef"]["name"] == "s3-creds"
    assert env["AWS_SESSION_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"] is True
    pod = pod_of(build(FULL_JOB, **FULL_PROFILE)[1])
    # The same keys as files, which follow a Secret that is renewed.
    assert values["FINETUNE_CREDENTIALS"] == "/var/run/finetune/credentials"
    volume = next(volume for volume in pod["volumes"] if volume["name"] == "progress")
    secret = next(source["secret"] for source in volume["projected"]["sources"] if "secret" in source)
    assert (secret["name"], secret["optional"]) == ("s3-creds", True)
    assert [item["path"] for item in secret["items"]] == [
        f"credentials/{key}" for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    ]
    listed = [entry["name"] for entry in pod["containers"][0]["env"]]
    assert len(listed) == len(set(listed))
    assert "FINETUNE_WORKER_INDEX" not in environment(build(FULL_JOB, **FULL_PROFILE)[0])


@pytest.mark.parametrize(
    ("profile", "threads"),
    [
        ({"resources": {"cpu": "500m"}}, "1"),
        ({"resources": {"cpu": "3500m"}}, "3"),
        ({"resources": {"cpu": "4"}, "environment": [{"name": "OMP_NUM_THREADS", "value": "2"}]}, "2"),
        ({"accelerator": {"memory": "80Gi"}}, None),
    ],
)
def test_cpu_processes_take_the_threads_that_they_have_cores_for(profile: dict[str, Any], threads: str | None) -> None:
    entry = environment(build(make_job(), **profile)[1]).get("OMP_NUM_THREADS")
    assert (entry and entry["value"]) == threads


def test_the_owner_is_the_job_and_needs_no_right_on_finalizers() -> None:
    for objects in build(make_job()):
        for manifest in objects:
            [owner] = manifest["metadata"]["ownerReferences"]
            assert (owner["kind"], owner["uid"], owner["controller"]) == ("FineTuneJob", "job-uid", True)
            assert owner["blockOwnerDeletion"] is False


def test_generated_names_are_valid_at_their_longest() -> None:
    name = "j" * 50
    for objects in build(make_job(name).with_spec(distribution={"workers": 1024}, training={"globalBatchSize": 1024})):
        for manifest in objects:
            assert len(manifest["metadata"]["name"]) <= 63
            for value in manifest["metadata"]["labels"].values():
                assert len(value) <= 63
    # The host names of the last worker of the ten-thousandth attempt, which are labels of DNS.
    assert len(f"{manifests.child_name(name, 9999)}-1023") <= 63
    assert len(f"{manifests.child_name(name, None)}-0") <= 63


def test_a_tenants_words_stay_in_the_run_config() -> None:
    template = "{{ prompt }} $(touch /tmp/x)"
    dataset = {"name": "tickets", "uri": "s3://data/evil-words.jsonl", "template": template}
    for objects in build(make_job().with_spec(datasets=[dataset])):
        for manifest in objects:
            if manifest["kind"] != "ConfigMap":
                assert "evil-words" not in json.dumps(manifest)
                assert "touch" not in json.dumps(manifest)


def test_the_spec_hash_is_of_what_decides_the_training() -> None:
    def digest(builder: JobBuilder) -> str:
        return manifests.spec_sha256(parse(builder.build()).spec)

    same = [make_job(), make_job().with_policy(suspend=True, maxAttempts=9), make_job().with_spec(queue={"name": "q"})]
    assert len({digest(builder) for builder in same}) == 1
    assert digest(make_job().with_spec(training={"seed": 7})) != digest(make_job())
