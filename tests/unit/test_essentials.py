"""What is kept of an object is what the operator reads, whatever else is in it."""

import json
import tracemalloc
from typing import Any

import pytest

from finetune_operator.essentials import DIGEST, MOST_ANNOTATIONS, change_reader, page_reader, reader, whole
from finetune_operator.news import job_facts, job_fingerprint, pod_facts
from finetune_operator.observe import controller_uid, read_job, read_pod
from support.world import World, make_job, started

META = {"name": "a", "namespace": "n", "uid": "u", "resourceVersion": "7", "creationTimestamp": "2024-01-01T00:00:00Z"}
OURS = {"app.kubernetes.io/managed-by": "finetune-operator", "finetune.dev/job-name": "j", "finetune.dev/attempt": "0"}


def read(kind: str, raw: Any) -> Any:
    return reader(kind)(json.dumps(raw).encode())


def noisy(raw: Any) -> Any:
    """The same object with members that nobody reads in each of its parts."""
    if isinstance(raw, dict):
        return {key: noisy(value) for key, value in raw.items()} | {"x-noise": {"a": ["b"] * 3}}
    return [noisy(value) for value in raw] if isinstance(raw, list) else raw


async def test_jobs_and_pods_are_read_as_before() -> None:
    """Every Job and pod of a run, with noise around what is read."""
    world = await started(World(make_job().build()))
    world.place("support-bot-0", 1)
    objects = [(kind, raw) for (kind, _), raw in world.objects.items() if kind in ("Job", "Pod")]
    world.run("support-bot-0")
    world.complete("support-bot-0")
    objects += [(kind, raw) for (kind, _), raw in world.objects.items() if kind in ("Job", "Pod")]
    assert len(objects) > 6
    for kind, raw in objects:
        raw["metadata"] |= {"namespace": "team-a"}
        labels, notes = raw["metadata"]["labels"], raw["metadata"].get("annotations") or {}
        told = noisy(raw) | {"kind": kind}
        told["metadata"] |= {"labels": labels | {"x": "y"}, "annotations": notes | {"x": "y" * 1000}}
        kept = read(kind, told)
        assert controller_uid(kept) == controller_uid(raw)
        assert kept["metadata"]["labels"]["finetune.dev/job-name"] == "support-bot"
        if kind == "Job":
            assert read_job(kept) == read_job(raw)
            assert job_facts(kept) == job_facts(raw)
        else:
            assert read_pod(kept) == read_pod(raw)
            assert pod_facts(kept) == pod_facts(raw)
        assert "noise" not in json.dumps(kept)
        assert "y" not in kept["metadata"]["labels"].values()


async def test_a_finetunejob_keeps_its_spec_and_its_status() -> None:
    world = await started(World(make_job().build()))
    told = world.job | {"metadata": world.job["metadata"] | {"labels": {"a": "b"}, "managedFields": [{"f": {}}]}}
    kept = read("FineTuneJob", told)
    assert (kept["spec"], kept["status"]) == (world.job["spec"], world.job["status"])
    assert set(kept["metadata"]) <= {"name", "namespace", "uid", "generation", "resourceVersion", "creationTimestamp"}


def test_annotations_that_are_many_are_known_by_their_digest() -> None:
    """Whoever sets one is heard, however many there are."""

    def job(**notes: str) -> Any:
        return read("FineTuneJob", {"metadata": META | {"annotations": notes}})

    few, many, other = job(a="b"), job(a="x" * MOST_ANNOTATIONS), job(a="x" * MOST_ANNOTATIONS, b="y")
    assert few["metadata"]["annotations"] == {"a": "b"}
    assert list(many["metadata"]["annotations"]) == [DIGEST]
    assert len({job_fingerprint(found) for found in (few, many, other)}) == 3
    assert job_fingerprint(many) == job_fingerprint(job(a="x" * MOST_ANNOTATIONS))


def test_of_owners_the_controller_is_kept() -> None:
    others = [{"kind": "ConfigMap", "name": f"c{n}", "uid": str(n)} for n in range(5000)]
    owner = {"apiVersion": "v", "kind": "FineTuneJob", "name": "j", "uid": "u", "controller": True}
    kept = read("Job", {"metadata": META | {"ownerReferences": [*others, owner]}, "spec": {}})
    assert kept["metadata"]["ownerReferences"] == [owner]


def test_long_texts_are_cut() -> None:
    condition = {"type": "Failed", "status": "True", "message": "m" * 1_000_000}
    kept = read("Job", {"metadata": META, "spec": {}, "status": {"conditions": [condition]}})
    assert len(kept["status"]["conditions"][0]["message"]) == 16384


FAT: dict[str, Any] = {
    "items": {"spec": {"template": {"spec": {"imagePullSecrets": [{}] * 400_000}}}},
    "labels": {"metadata": META | {"labels": OURS | {f"l{n}": "" for n in range(100_000)}}},
    "managed fields": {"metadata": META | {"managedFields": [{"f": {f"k{n}": {} for n in range(100_000)}}]}},
    "text": {"spec": {"template": {"spec": {"containers": [{"env": [{"value": "<" * 1_500_000}]}]}}}},
}


# A FineTuneJob's spec is kept; the CustomResourceDefinition bounds it.
@pytest.mark.parametrize(
    ("kind", "part"),
    [(kind, part) for kind in ("Job", "Pod") for part in FAT]
    + [("FineTuneJob", p) for p in ("labels", "managed fields")],
)
def test_what_is_not_kept_takes_no_memory(kind: str, part: str) -> None:
    """Beside the bytes themselves."""
    data = json.dumps({"metadata": META, "spec": {}} | FAT[part]).encode()
    event = b'{"type":"ADDED","object":' + data + b"}"
    page = b'{"metadata":{},"items":[' + data + b"]}"
    for take, given in ((reader(kind), data), (change_reader(kind), event), (page_reader(kind), page)):
        tracemalloc.start()
        take(given)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_500_000, f"{peak} bytes for {len(data)}"


def test_other_objects_are_kept_whole_and_their_lists_are_not() -> None:
    raw = {"metadata": META, "data": {"a": "b"}}
    assert read("ConfigMap", raw) == raw
    [listed] = page_reader("ConfigMap")(json.dumps({"items": [raw], "metadata": {}}).encode()).items
    assert "data" not in listed
    assert whole(b"") == {}


def test_events_of_a_watch() -> None:
    of = change_reader("Job")
    bookmark = of(b'{"type":"BOOKMARK","object":{"kind":"Job","metadata":{"resourceVersion":"9"}}}')
    assert (bookmark.type, bookmark.object) == ("BOOKMARK", {"metadata": {"resourceVersion": "9"}})
    error = of(b'{"type":"ERROR","object":{"kind":"Status","code":410,"reason":"Expired"}}')
    assert error.object["code"] == 410
    assert change_reader("Job")(error.encode()).object == error.object
