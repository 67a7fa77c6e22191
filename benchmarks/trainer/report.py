"""What the benchmark measures, and how it is told."""

import json
import statistics
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    tokens_per_second: float
    """Useful tokens, padding excluded, after the first steps."""
    first_step_seconds: float
    """From the start of the process to the end of its first optimizer step."""
    resident_mb: float
    gpu_mb: float | None


def median(runs: list[Run]) -> Run:
    """Field by field."""
    values: dict[str, Any] = {}
    for each in fields(Run):
        found = [value for run in runs if (value := getattr(run, each.name)) is not None]
        values[each.name] = statistics.median(found) if found else None
    return Run(**values)


def spread(runs: list[Run]) -> float:
    """Of the rates, from the lowest to the highest, as a share of the median."""
    rates = [run.tokens_per_second for run in runs]
    return (max(rates) - min(rates)) / statistics.median(rates)


def write(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    (folder / "results.md").write_text(markdown(results))


def markdown(results: dict[str, Any]) -> str:
    host, size = results["machine"], results["size"]
    where = host["gpu"] if results["device"] == "CUDA" else f"{host['cores']} cores ({host['cpu']})"
    lines = [
        "# Results",
        "",
        f"`{results['command']}` on {where}, Python {host['python']}; medians of {results['repeats']} runs each. "
        f"A Llama of {size['layers']} layers of {size['hidden']}, {size['vocabulary']} tokens, {results['dtype']}, "
        "LoRA of rank 16 on every linear layer.",
        "",
    ]
    for entry in results["workloads"]:
        lines += table(results, entry)
    if results["missing"]:
        lines += [f"Not there, so not measured: {', '.join(results['missing'])} (`--peer NAME=PYTHON`).", ""]
    for name, found in results["versions"].items():
        lines.append(f"{name}: {', '.join(f'{library} {version}' for library, version in found.items())}  ")
    return "\n".join(lines).rstrip() + "\n"


def table(results: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """One workload; the ratios are to the hand-written loop with the same packing, and of ours to each contender."""
    runs, peak = entry["runs"], results["peakTFLOPS"]
    mean, longest = entry["mean"], entry["longest"]
    what = f"every row {longest} tokens" if entry["workload"] == "fixed" else f"{mean:.0f} tokens, at most {longest}"
    best = max((run["tokens_per_second"] for name, run in runs.items() if name.startswith("this")), default=None)
    memory = "GPU memory" if results["device"] == "CUDA" else "RSS"
    lines = [
        f"## {'Rows of one length' if entry['workload'] == 'fixed' else 'Rows of mixed lengths'} ({what})",
        "",
        f"| | tokens/s | of the loop with the same packing | this trainer's best to it | {memory} | first step after "
        f"| spread |{' MFU |' if peak else ''}",
        f"| --- | --- | --- | --- | --- | --- | --- |{' --- |' if peak else ''}",
    ]
    for name, run in runs.items():
        rate = run["tokens_per_second"]
        floor = runs.get("hand-written loop" + (", packed" if name.endswith(", packed") else ""))
        cells = [
            name,
            f"{rate:,.0f}",
            f"{rate / floor['tokens_per_second']:.2f}" if floor else "",
            f"{best / rate:.2f}" if best else "",
            f"{run['gpu_mb'] if results['device'] == 'CUDA' else run['resident_mb']:,.0f} MB",
            f"{run['first_step_seconds']:.1f} s",
            f"{100 * entry['spread'][name]:.0f} %",
        ]
        if peak:
            cells.append(f"{100 * rate * entry['flopsPerToken'] / (peak * 1e12):.1f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]
