"""Kubernetes resource quantities ("500m", "8Gi", 2) as exact numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

_SUFFIXES: dict[str, Fraction] = {
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 1000),
    "": Fraction(1),
    **{suffix: Fraction(1000**power) for power, suffix in enumerate(["k", "M", "G", "T", "P", "E"], 1)},
    **{suffix: Fraction(1024**power) for power, suffix in enumerate(["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"], 1)},
}
_PATTERN = re.compile(r"([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)(?:[eE]([+-]?\d+))?([numkKMGTPE]i?)?")


def parse(value: str | int | float) -> Fraction:
    """Raises ValueError for what is no quantity."""
    match = _PATTERN.fullmatch(str(value).strip())
    if match is None or (match[3] or "") not in _SUFFIXES:
        raise ValueError(f'"{value}" is no quantity: a number with one of the suffixes m, k, M, G, T, Ki, Mi, Gi, Ti')
    return Fraction(match[1]) * Fraction(10) ** int(match[2] or 0) * _SUFFIXES[match[3] or ""]


def container_requests(container: Mapping[str, Any]) -> dict[str, Fraction]:
    """What a container asks for; a limit stands for a request that is not given."""
    resources = container.get("resources") or {}
    merged = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    return {name: parse(value) for name, value in merged.items()}


def pod_requests(pod: Mapping[str, Any]) -> dict[str, Fraction]:
    """The sum over the containers, or the largest init container where that is more, plus one of `pods`."""
    spec = pod["spec"]
    total = add(container_requests(container) for container in spec.get("containers") or [])
    for container in spec.get("initContainers") or []:
        for name, value in container_requests(container).items():
            total[name] = max(total.get(name, Fraction(0)), value)
    return total | {"pods": Fraction(1)}


def add(parts: Iterable[Mapping[str, Fraction]]) -> dict[str, Fraction]:
    total: dict[str, Fraction] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, Fraction(0)) + value
    return total
