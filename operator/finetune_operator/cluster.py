"""The API server, as the rest of the operator sees it. The only module that talks to it.

Objects are plain dicts as the server sends them: the client's typed models refuse quantities that are numbers and cost
time and memory. Reads are live (no cache): a LIST that failed raises, because unknown is not absent.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple, Protocol

from finetune_operator.connection import FIELD_MANAGER as FIELD_MANAGER
from finetune_operator.connection import LARGEST, MIB, Connection, changes
from finetune_operator.connection import in_cluster as in_cluster
from finetune_operator.connection import load_configuration as load_configuration
from finetune_operator.errors import ApiError as ApiError
from finetune_operator.errors import TooLarge
from finetune_operator.essentials import Change, Data, Page, nothing, page_reader, reader, whole
from finetune_operator.essentials import Object as Object
from finetune_operator.kueue import GROUP as KUEUE
from finetune_operator.kueue import JOB_UID
from finetune_operator.manifests import JOB_LABEL, MANAGED_BY
from finetune_operator.paths import collection, item, selector, workloads

PAGE = 500
"""Objects that are asked for at once, at most."""
PAGE_BYTES = 4 * MIB
"""Bytes of an answer with several objects, at most: of larger ones fewer are asked for."""
FIRST_PAGE = 25
MOST_CHILDREN = 5000
"""Objects of a kind that one FineTuneJob may have: a gang has up to 1,024 pods, and some attempts are kept."""


class TokenUser(NamedTuple):
    """Whose token it is, by TokenReview."""

    username: str
    pod_name: str | None
    """None where the token is bound to no pod."""
    pod_uid: str | None


class Cluster(Protocol):
    """What the operator asks of a cluster. Methods raise ApiError where the server refuses or cannot be reached."""

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        """What is needed of the object, or None where it does not exist."""

    async def get_whole(self, kind: str, namespace: str | None, name: str) -> Object | None:
        """The object with every field, or None where it does not exist."""

    async def list_children(self, kind: str, namespace: str, job: str) -> list[Object]:
        """Objects of the kind that carry this FineTuneJob's label, whoever owns them."""

    async def list_profiles(self) -> list[Object]: ...

    def list_all(self, kind: str, namespaces: tuple[str, ...]) -> AsyncIterator[Object]:
        """Every FineTuneJob, or every Job or pod that this operator manages, page by page, so that not all of them are
        in memory at once; no namespaces: all."""

    async def create(self, manifest: Object) -> Object:
        """Creates the object. ApiError's reason is AlreadyExists where the name is taken."""

    async def delete(self, kind: str, namespace: str, name: str, uid: str, resource_version: str | None = None) -> bool:
        """Deletes exactly this object, its dependants in the background. False: it was gone, or is another by now."""

    async def patch_status(
        self, namespace: str, name: str, uid: str, patch: Object, resource_version: str | None = None
    ) -> Object | None:
        """One merge patch of a FineTuneJob's status; the job as it is then. None: it is gone, or is not at that version
        any more."""

    async def patch_profile_status(self, name: str, patch: Object) -> bool:
        """One merge patch of a FineTuneProfile's status. False: it is gone."""

    async def list_workloads(self, namespace: str, job_uid: str) -> list[Object] | None:
        """What Kueue made of a Job; None: the server knows no such kind."""

    async def post_event(self, event: Object) -> None:
        """Creates an Event, or counts up the one of the same name."""

    # For the metrics server.

    async def authenticate(self, token: str) -> Object | None:
        """The token's user (authentication.k8s.io/v1 UserInfo), or None where it is no token of this cluster."""

    async def may_get(self, user: Mapping[str, Any], url: str) -> bool:
        """Whether a user may `get` this nonResourceURL."""

    # For the progress server.

    async def token_review(self, token: str, audiences: tuple[str, ...]) -> TokenUser | None:
        """The token's user, or None where the token is not valid for one of the audiences."""

    async def get_pod(self, namespace: str, name: str) -> Object | None: ...

    async def get_job(self, namespace: str, name: str) -> Object | None:
        """The FineTuneJob, or None."""

    async def patch_trainer_status(
        self, namespace: str, name: str, uid: str, trainer_status: Object, resource_version: str | None = None
    ) -> bool:
        """Merge-patches status.trainerStatus and nothing else. False: the job is gone, or is not at that version."""


class KubeCluster(Connection):
    """`Cluster` over HTTP. One per event loop; `close` it."""

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        return await self._get(kind, namespace, name, reader(kind))

    async def get_whole(self, kind: str, namespace: str | None, name: str) -> Object | None:
        return await self._get(kind, namespace, name, whole)

    async def _get(self, kind: str, namespace: str | None, name: str, read: Callable[[Data], Object]) -> Object | None:
        try:
            return await self.ask("GET", item(kind, namespace, name), read=read)
        except ApiError as error:
            if error.status == 404 and error.reason == "NotFound":
                return None
            raise

    async def list_children(self, kind: str, namespace: str, job: str) -> list[Object]:
        return await self.list_labelled(kind, namespace, f"{JOB_LABEL}={job}")

    async def list_labelled(self, kind: str, namespace: str, label: str) -> list[Object]:
        """Objects of the kind that carry `label`, written as `name=value`."""
        name, _, value = label.partition("=")
        found: list[Object] = []
        async for page in self._pages(collection(kind, namespace), {"labelSelector": selector(name, value)}, kind):
            found += page.items
            if len(found) > MOST_CHILDREN:
                text = (
                    f"namespace {namespace} has more than {MOST_CHILDREN} objects of kind {kind} with the label {label}"
                )
                raise ApiError(0, "TooMany", f"{text}; delete those that the operator did not make")
        return found

    async def list_profiles(self) -> list[Object]:
        path = collection("FineTuneProfile", None)
        return [found async for page in self._pages(path, {}, "FineTuneProfile") for found in page.items]

    async def list_all(self, kind: str, namespaces: tuple[str, ...]) -> AsyncIterator[Object]:
        for namespace in namespaces or (None,):
            async for page in self.list_pages(kind, namespace):
                for found in page.items:
                    yield found

    async def list_names(self, namespaces: tuple[str, ...]) -> set[tuple[str, str]]:
        """Namespaces and names of all FineTuneJobs."""
        found = set()
        for namespace in namespaces or (None,):
            async for page in self._pages(collection("FineTuneJob", namespace), {}, "name"):
                found |= {(raw["metadata"]["namespace"], raw["metadata"]["name"]) for raw in page.items}
        return found

    def list_pages(self, kind: str, namespace: str | None) -> AsyncIterator[Page]:
        """FineTuneJobs, or Jobs or pods that carry this operator's label; no namespace: of all."""
        return self._pages(collection(kind, namespace), _own(kind), kind)

    async def watch(self, kind: str, namespace: str | None, version: str, silence: float) -> AsyncGenerator[Change]:
        """What happens to the objects of `list_pages` after this resourceVersion, bookmarks included, until the server
        ends the watch or says nothing for `silence` seconds. Raises ApiError."""
        query = _own(kind) | {"watch": "true", "allowWatchBookmarks": "true", "resourceVersion": version}
        stream = self.stream(collection(kind, namespace), query, silence)
        async with aclosing(stream), aclosing(changes(kind, stream)) as found:
            async for change in found:
                yield change

    async def create(self, manifest: Object) -> Object:
        kind = manifest["kind"]
        path = collection(kind, manifest["metadata"]["namespace"])
        return await self.ask("POST", path, {"fieldManager": FIELD_MANAGER}, manifest, read=reader(kind))

    async def replace(self, manifest: Object) -> Object:
        """ApiError's status is 409 where the object is not at the manifest's resourceVersion any more."""
        metadata = manifest["metadata"]
        path = item(manifest["kind"], metadata.get("namespace"), metadata["name"])
        return await self.call("PUT", path, {"fieldManager": FIELD_MANAGER}, manifest)

    async def delete(self, kind: str, namespace: str, name: str, uid: str, resource_version: str | None = None) -> bool:
        preconditions = {"uid": uid} | ({"resourceVersion": resource_version} if resource_version else {})
        options = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": "Background",
            "preconditions": preconditions,
        }
        call = self.ask("DELETE", item(kind, namespace, name), {}, options, read=nothing)
        return await self._unless_gone(call) is not None

    async def patch_status(
        self, namespace: str, name: str, uid: str, patch: Object, resource_version: str | None = None
    ) -> Object | None:
        # kube-apiserver looks at no UID in a patch of a custom resource's status, but it does look at the version, and
        # a later job of the same name never has that of an earlier one.
        version = {"resourceVersion": resource_version} if resource_version else {}
        body = {"metadata": {"uid": uid} | version, "status": patch}
        path = item("FineTuneJob", namespace, name) + "/status"
        read = reader("FineTuneJob")
        return await self._unless_gone(self.ask("PATCH", path, {"fieldManager": FIELD_MANAGER}, body, read=read))

    async def patch_profile_status(self, name: str, patch: Object) -> bool:
        path = item("FineTuneProfile", None, name) + "/status"
        call = self.call("PATCH", path, {"fieldManager": FIELD_MANAGER}, {"status": patch})
        return await self._unless_gone(call) is not None

    async def list_workloads(self, namespace: str, job_uid: str) -> list[Object] | None:
        try:
            # Kueue's versions come and go, and what is read of a Workload is the same in all of them.
            group = await self.call("GET", f"/apis/{KUEUE}")
            preferred = group.get("preferredVersion") or {}
            path = workloads(str(preferred.get("groupVersion")), KUEUE, namespace)
            query = {"labelSelector": selector(JOB_UID, job_uid)}
            return [found async for page in self._pages(path, query, "Workload") for found in page.items]
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def post_event(self, event: Object) -> None:
        namespace, name = event["metadata"]["namespace"], event["metadata"]["name"]
        try:
            await self.create(event)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            known = await self.get("Event", namespace, name) or event
            again = {"count": known.get("count", 1) + 1, "lastTimestamp": event["lastTimestamp"]}
            path = item("Event", namespace, name)
            await self.ask("PATCH", path, {"fieldManager": FIELD_MANAGER}, again, read=nothing)

    async def token_review(self, token: str, audiences: tuple[str, ...]) -> TokenUser | None:
        review = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": list(audiences)},
        }
        status = (await self.call("POST", collection("TokenReview", None), {}, review)).get("status") or {}
        # A server that knows nothing of audiences answers without them: that is a refusal too.
        if not status.get("authenticated") or not set(audiences) & set(status.get("audiences") or ()):
            return None
        user = status.get("user") or {}
        extra = user.get("extra") or {}
        pod_name, pod_uid = (
            next(iter(extra.get(f"authentication.kubernetes.io/{key}") or ()), None) for key in ("pod-name", "pod-uid")
        )
        return TokenUser(user.get("username", ""), pod_name, pod_uid)

    async def may(self, user: Mapping[str, Any], attributes: Object) -> bool:
        """Whether a user (authentication.k8s.io/v1 UserInfo) may do what these resourceAttributes say."""
        return await self._review(user, {"resourceAttributes": attributes})

    async def _review(self, user: Mapping[str, Any], attributes: Object) -> bool:
        spec: Object = {"user": user.get("username"), **attributes}
        spec |= {key: user[key] for key in ("uid", "groups", "extra") if user.get(key)}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        status = (await self.call("POST", collection("SubjectAccessReview", None), {}, review)).get("status") or {}
        return bool(status.get("allowed"))

    async def authenticate(self, token: str) -> Object | None:
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}}
        status = (await self.call("POST", collection("TokenReview", None), {}, review)).get("status") or {}
        return status.get("user") if status.get("authenticated") else None

    async def may_get(self, user: Mapping[str, Any], url: str) -> bool:
        return await self._review(user, {"nonResourceAttributes": {"path": url, "verb": "get"}})

    async def get_pod(self, namespace: str, name: str) -> Object | None:
        return await self.get("Pod", namespace, name)

    async def get_job(self, namespace: str, name: str) -> Object | None:
        return await self.get("FineTuneJob", namespace, name)

    async def patch_trainer_status(
        self, namespace: str, name: str, uid: str, trainer_status: Object, resource_version: str | None = None
    ) -> bool:
        patch = {"trainerStatus": trainer_status}
        return await self.patch_status(namespace, name, uid, patch, resource_version) is not None

    async def _pages(self, path: str, query: dict[str, str], kind: str) -> AsyncIterator[Page]:
        """A list in parts of bounded size: of objects that are larger, fewer are asked for."""
        read, token, limit = page_reader(kind), "", FIRST_PAGE
        while True:
            part = query | {"limit": str(limit)} | ({"continue": token} if token else {})
            most = PAGE_BYTES if limit > 1 else LARGEST
            try:
                page = await self.ask("GET", path, part, read=read, most=most)
            except TooLarge:
                if limit == 1:
                    raise
                limit = max(1, limit // 8)
                continue
            yield page
            if not (token := page.token):
                return
            # Half of what is allowed, by the size of the last ones.
            limit = max(1, min(PAGE, limit * 2, limit * PAGE_BYTES // (2 * max(1, page.size))))

    async def _unless_gone(self, call: Awaitable[Object]) -> Object | None:
        try:
            return await call
        except ApiError as error:
            if error.status in (404, 409):
                return None
            raise


def _own(kind: str) -> dict[str, str]:
    """Query of what concerns this operator; the server filters, since other people's Jobs and pods are many."""
    return {} if kind == "FineTuneJob" else {"labelSelector": "=".join(MANAGED_BY)}
