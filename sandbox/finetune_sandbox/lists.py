"""Collections: lists in pages, as objects or as a Table, and the deletion of what a selector matches."""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping

from finetune_sandbox import table
from finetune_sandbox.errors import ApiError, Obj, bad_request, expired, not_allowed
from finetune_sandbox.errors import invalid as invalid_error
from finetune_sandbox.registry import Call, DeleteOptions, Registry
from finetune_sandbox.requests import Route, filter_of, revision, wants_table
from finetune_sandbox.resources import Resource
from finetune_sandbox.store import Entry, dump

KEPT_PAGES = 64


class Lister:
    """Pages are cut from a snapshot, so that they fit together; the newest KEPT_PAGES snapshots are kept."""

    def __init__(self, registry: Registry) -> None:
        self.registry, self.store = registry, registry.store
        self._snapshots: OrderedDict[str, tuple[int, list[Entry]]] = OrderedDict()

    def answer(self, resource: Resource, route: Route, query: Mapping[str, str], accept: str) -> bytes:
        entries, list_meta = self._page(resource, route, query)
        if include := wants_table(accept, query):
            return dump(table.render(resource, entries, list_meta, include))
        kind = resource.list_kind or resource.kind + "List"
        head: Obj = {"kind": kind, "apiVersion": resource.api_version, "metadata": list_meta, "items": []}
        return dump(head)[:-2] + b",".join(e.raw for e in entries) + b"]}"

    def _page(self, resource: Resource, route: Route, query: Mapping[str, str]) -> tuple[list[Entry], Obj]:
        limit = query.get("limit", "0")
        if not limit.isdigit():
            raise bad_request(f"limit: expected a number, found {limit!r}")
        if token := query.get("continue"):
            rev, entries = self._continued(token)
        else:
            self._check_version(query)
            rev, entries = self.store.rev, self.registry.select(resource, filter_of(resource, route, query))
        list_meta: Obj = {"resourceVersion": str(rev)}
        size = int(limit)
        if size and len(entries) > size:
            rest = entries[size:]
            list_meta |= {"continue": self._keep(rev, rest), "remainingItemCount": len(rest)}
            entries = entries[:size]
        return entries, list_meta

    def _keep(self, rev: int, rest: list[Entry]) -> str:
        name = secrets.token_hex(8)
        self._snapshots[name] = (rev, rest)
        if len(self._snapshots) > KEPT_PAGES:
            self._snapshots.popitem(last=False)
        return base64.urlsafe_b64encode(json.dumps({"v": "sandbox/v1", "rv": rev, "start": name}).encode()).decode()

    def _continued(self, token: str) -> tuple[int, list[Entry]]:
        try:
            name = str(json.loads(base64.urlsafe_b64decode(token))["start"])
        except (ValueError, KeyError, TypeError, binascii.Error) as error:
            raise bad_request("continue key is not valid: it was not made by this server") from error
        if name not in self._snapshots:
            raise expired("The provided continue parameter is too old to display a consistent list result. You must "
                          "start a new list without the continue parameter.")  # fmt: skip
        return self._snapshots[name]

    def _check_version(self, query: Mapping[str, str]) -> None:
        """The present answers every version but one from the past that must be exact, or one from the future."""
        text, match = query.get("resourceVersion", ""), query.get("resourceVersionMatch", "")
        if match and (not text or match not in ("Exact", "NotOlderThan")):
            why = "resourceVersionMatch is Exact or NotOlderThan and needs a resourceVersion"
            raise invalid_error("ListOptions", "meta.k8s.io", "", [not_allowed("resourceVersionMatch", why)])
        if not text:
            return
        rev = revision(text)
        if rev > self.store.rev:
            raise too_large(rev, self.store.rev)
        if match == "Exact" and rev == 0:
            raise invalid_error("ListOptions", "meta.k8s.io", "", [not_allowed("resourceVersionMatch",
                                "resourceVersionMatch \"Exact\" is forbidden for resourceVersion \"0\"")])  # fmt: skip
        if match == "Exact" and rev != self.store.rev:
            raise expired(f"the sandbox keeps no past lists: {rev} is over, {self.store.rev} is now")

    def delete_collection(
        self,
        resource: Resource,
        route: Route,
        query: Mapping[str, str],
        options: DeleteOptions,
        call: Call,
        admit: Callable[[Entry], None],
    ) -> Obj:
        """Deletes each match; returns them as a list, as they were. `admit` raises ApiError for one that must stay."""
        entries = self.registry.select(resource, filter_of(resource, route, query))
        for entry in entries:
            if self.store.get(resource.key, *entry.key):
                admit(entry)
                self.registry.delete(resource, *entry.key, options, call)
        kind = resource.list_kind or resource.kind + "List"
        head: Obj = {"kind": kind, "apiVersion": resource.api_version}
        return head | {"metadata": {"resourceVersion": str(self.store.rev)}, "items": [e.obj for e in entries]}


def too_large(rev: int, now: int) -> ApiError:
    details = {"causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]}
    message = f"Timeout: Too large resource version: {rev}, current: {now}"
    return ApiError(504, "Timeout", message, details | {"retryAfterSeconds": 1})
