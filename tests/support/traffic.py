"""What a NetworkPolicy lets through, as the Kubernetes API defines it: a second reading of it, for tests."""

import ipaddress
from typing import Any, NamedTuple

Object = dict[str, Any]


class End(NamedTuple):
    """The other end of a connection: a pod with its namespace, or an address."""

    namespace: str = ""
    labels: Object = {}
    address: str = ""


def allows(policy: Object, direction: str, own: str, other: End, port: int, protocol: str = "TCP") -> bool:
    """Whether a pod of namespace `own` that the policy selects may talk so: `direction` is ingress or egress."""
    side = {"ingress": "from", "egress": "to"}[direction]
    if direction.capitalize() not in policy["spec"]["policyTypes"]:
        return True
    for rule in policy["spec"].get(direction, ()):
        ports = [(p["protocol"], p["port"]) for p in rule.get("ports", ())]
        peers = rule.get(side, ())
        if (not ports or (protocol, port) in ports) and (not peers or any(_meant(p, own, other) for p in peers)):
            return True
    return False


def _meant(peer: Object, own: str, other: End) -> bool:
    if "ipBlock" in peer:
        if not other.address:
            return False
        address, block = ipaddress.ip_address(other.address), peer["ipBlock"]
        inside = [address in ipaddress.ip_network(cidr) for cidr in (block["cidr"], *block.get("except", ()))]
        return inside[0] and not any(inside[1:])
    if other.address:
        return False
    namespaces = peer.get("namespaceSelector")
    if namespaces is None:
        there = other.namespace == own
    else:
        there = _carries({"kubernetes.io/metadata.name": other.namespace}, namespaces)
    return there and _carries(other.labels, peer.get("podSelector", {}))


def _carries(labels: Object, selector: Object) -> bool:
    assert not selector.keys() - {"matchLabels"}
    return bool(selector.get("matchLabels", {}).items() <= labels.items())
