"""PURE. Whom the pods of an attempt may talk to: their NetworkPolicy, which denies all that it does not name.

Without a list of the profile's own, the object store is reached where `storage.endpoint` says: the pods of a namespace
for the name of a Service, one address for an address, and else every address but those that only a node should see.
"""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from finetune_api.profile import Egress, FineTuneProfileSpec

Object = dict[str, Any]

NAMESPACE_LABEL = "kubernetes.io/metadata.name"
OPERATOR_PODS = {"app.kubernetes.io/name": "finetune-operator"}
EVERYWHERE = (
    # Link-local addresses are a node's own: cloud metadata and the credentials that it hands out.
    {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]},
    {"cidr": "::/0", "except": ["fe80::/10", "fd00:ec2::/32"]},
)
DNS_RULE: Object = {
    "to": [
        {
            "namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: "kube-system"}},
            # Also CoreDNS carries this label.
            "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
        }
    ],
    "ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")],
}
_SERVICE = re.compile(r"[a-z0-9-]+\.([a-z0-9-]+)\.svc(\.[a-z0-9.-]+)?")
_PORTS = {"https": 443, "http": 80}


class Place(NamedTuple):
    """What a URL says of where its server is."""

    namespace: str | None
    """Of a Service inside the cluster; its pods may listen at another port than it does."""
    address: str | None
    port: int


def policy(metadata: Object, selector: Mapping[str, str], profile: FineTuneProfileSpec, progress_url: str) -> Object:
    """The NetworkPolicy of the pods with these labels: each other, DNS, the progress server, the object store."""
    own = [{"podSelector": {"matchLabels": dict(selector)}}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata,
        "spec": {
            "podSelector": {"matchLabels": dict(selector)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": own}],
            "egress": [{"to": own}, DNS_RULE, _progress(progress_url), *_store(profile)],
        },
    }


def place(url: str) -> Place:
    """Where the server of an http(s) URL is."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    if service := _SERVICE.fullmatch(host):
        return Place(service[1], None, port)
    try:
        return Place(None, str(ipaddress.ip_address(host)), port)
    except ValueError:
        return Place(None, None, port)


def _progress(url: str) -> Object:
    found = place(url)
    to = [_pods(found.namespace, OPERATOR_PODS)] if found.namespace else _addresses(found)
    return {"to": to, "ports": _tcp([found.port])}


def _store(profile: FineTuneProfileSpec) -> Sequence[Object]:
    if profile.egress:
        return [_rule(entry) for entry in profile.egress]
    found = place(profile.storage.endpoint or "https://")
    if found.namespace:
        return [{"to": [_pods(found.namespace, {})]}]
    return [{"to": _addresses(found), "ports": _tcp([found.port])}]


def _rule(entry: Egress) -> Object:
    if entry.cidr:
        block: Object = {"cidr": entry.cidr}
        peer: Object = {"ipBlock": block | ({"except": list(entry.excluded)} if entry.excluded else {})}
    else:
        # It is there where `cidr` is not, by the type's own rule.
        peer = _pods(entry.pod_namespace or "", entry.pod_labels)
    ports = [{"protocol": entry.protocol, "port": port} for port in entry.ports]
    return {"to": [peer]} | ({"ports": ports} if ports else {})


def _addresses(found: Place) -> list[Object]:
    if found.address is None:
        return [{"ipBlock": dict(block)} for block in EVERYWHERE]
    length = ipaddress.ip_address(found.address).max_prefixlen
    return [{"ipBlock": {"cidr": f"{found.address}/{length}"}}]


def _pods(namespace: str, labels: Mapping[str, str]) -> Object:
    peer: Object = {"namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: namespace}}}
    return peer | ({"podSelector": {"matchLabels": dict(labels)}} if labels else {})


def _tcp(ports: Sequence[int]) -> list[Object]:
    return [{"protocol": "TCP", "port": port} for port in ports]
