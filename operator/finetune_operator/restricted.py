"""PURE. What keeps every pod of ours from its node and from the API server: Pod Security `restricted`, and more."""

from typing import Any

Object = dict[str, Any]

USER = 65532
CONTAINER: Object = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
"""Of a container, its securityContext."""
POD: Object = {
    "automountServiceAccountToken": False,
    "enableServiceLinks": False,
    "securityContext": {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    },
}
"""Of a pod's spec."""
