"""PURE: what a result must reach (spec.evaluation.gates), and what it must not lose (retention)."""

from collections.abc import Iterator, Mapping, Sequence

from finetune_api.evaluation import Evaluation, Gate
from finetune_api.failures import FineTuneError, Reason
from finetune_api.figures import name_of, parse, ranked

SHOWN = 20
"""Figures that are named where the wanted one does not exist."""


def check(evaluation: Evaluation, metrics: Mapping[str, float], stages: Sequence[str] = ()) -> None:
    """Raises GateNotMet with every gate that is not met. `stages`: names, in their order, where there are any."""
    missed = [*_gates(evaluation.gates, metrics), *_retention(evaluation, metrics, stages)]
    if missed:
        raise FineTuneError(Reason.GATE_NOT_MET, "; ".join(missed))


def _gates(gates: Sequence[Gate], metrics: Mapping[str, float]) -> Iterator[str]:
    for number, gate in enumerate(gates):
        field = f"spec.evaluation.gates[{number}]"
        found = _found(gate.metric, metrics)
        if found is None:
            known = ranked(metrics)
            more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
            yield f"{field}: {gate.metric} was not measured; there are {', '.join(known[:SHOWN])}{more}"
        elif not (found >= gate.value if gate.operator == "AtLeast" else found <= gate.value):
            words = "at least" if gate.operator == "AtLeast" else "at most"
            yield f"{field}: {gate.metric} is {found:.6g}; {words} {gate.value:.6g} is wanted"


def _found(name: str, metrics: Mapping[str, float]) -> float | None:
    """A figure; that of the only dataset there is, is the one over everything."""
    if name in metrics:
        return metrics[name]
    figure = parse(name)
    whole = name_of(figure.base, figure.split, figure.before)
    alone = figure.dataset and not figure.slice and not figure.stage
    others = [found for found in map(parse, metrics) if found.dataset and not found.slice]
    told_apart = any((found.base, found.split) == (figure.base, figure.split) for found in others)
    return metrics.get(whole) if alone and not told_apart else None


def _retention(evaluation: Evaluation, metrics: Mapping[str, float], stages: Sequence[str]) -> Iterator[str]:
    """The loss after the last stage that can tell it, against that before the first."""
    if evaluation.retention is None:
        return
    allowed = evaluation.retention.max_regression
    names = [f"{stage}/" for stage in stages] or [""]
    before = next((metrics[n] for n in (f"{stage}retentionLossBefore" for stage in names) if n in metrics), None)
    after = next((metrics[n] for n in (f"{stage}retentionLoss" for stage in reversed(names)) if n in metrics), None)
    if before is None or after is None:
        yield "spec.evaluation.retention: its loss was not measured"
    elif after > before * (1 + allowed):
        share = f"{after / before - 1:.1%}" if before else "all"
        yield (
            f"spec.evaluation.retention: retentionLoss rose from {before:.6g} to {after:.6g}, by {share}; "
            f"at most {allowed:.1%} is allowed"
        )
