"""Kubernetes quantities: their one canonical spelling (`1024Mi` is stored as `1Gi`, `0.5` as `500m`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finetune_sandbox.quantity import parse

_FORM = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))(?:([KMGTPE]i)|([numkMGTPE])|[eE]([+-]?\d+))?")
_BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_DECIMAL: Mapping[str, int] = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
RULE = r"quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"


def canonical(text: Any) -> str:
    """The spelling that the API server gives back. Raises ValueError."""
    exact = parse(text)
    if exact == 0:
        return "0"
    if (match := _FORM.fullmatch(str(text))) and match[2] and exact.denominator == 1:
        whole, step = int(exact), 0
        while whole % 1024 == 0 and step < len(_BINARY) - 1:
            whole, step = whole // 1024, step + 1
        return f"{whole}{_BINARY[step]}"
    nano = -(-exact * 10**9 // 1)  # nothing is smaller than a nano-unit: rounded up
    power = -9
    while nano % 1000 == 0 and power < 18:
        nano, power = nano // 1000, power + 3
    if match and match[4]:
        return f"{nano}e{power}" if power else str(nano)
    suffix = next(s for s, p in _DECIMAL.items() if p == power)
    return f"{nano}{suffix}"


def canonical_map(quantities: Any) -> Any:
    """Canonical where it can be read; what cannot is left for validation to name."""
    if not isinstance(quantities, dict):
        return quantities
    out = {}
    for name, text in quantities.items():
        try:
            out[name] = canonical(text)
        except ValueError:
            out[name] = text
    return out
