"""What a fault costs: from kill -9 of a rank to the next step, lost steps, checkpoint stall, resume time, goodput.

    python benchmarks/recovery/bench.py --keep

Ours beside torchrun's restarts of transformers' Trainer with its own checkpoints, on the same machine, model and steps.
With --keep, results go to results.json and results.md beside this file.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "tests"), str(HERE)]

import goodput  # noqa: E402
import recovering  # noqa: E402
import saving  # noqa: E402

from finetune_trainer.pace import FIRST_SECONDS, auto_seconds  # noqa: E402
from support.gang import make_tiny_model  # noqa: E402
from support.s3 import running_s3  # noqa: E402

TRAINER_SAVES = 500
"""Steps between the Trainer's checkpoints where nobody says otherwise."""


def measure(sizes: list[int], rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="recovery-") as name, running_s3() as s3:
        directory = Path(name)
        os.environ.update(s3.environment)
        model = make_tiny_model(directory / "model")
        kills = {
            "ours": [recovering.ours(directory / f"ours-{i}", s3, model) for i in range(rounds)],
            "torchrun": [recovering.plain(directory / f"plain-{i}", model) for i in range(rounds)],
        }
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        sizes_found = [saving.measure(directory / f"size-{size}", s3, size) for size in sizes]
        dist.destroy_process_group()
    recovery = {
        name: {
            "seconds": statistics.median(kill.seconds for kill in found),
            "lostSteps": statistics.median(kill.lost for kill in found),
        }
        for name, found in kills.items()
    }
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "recovery": recovery,
        "sizes": sizes_found,
        "goodput": simulate(sizes_found[-1], recovery),
    }


def simulate(size: dict[str, float], recovery: dict[str, Any]) -> dict[str, float]:
    """With steps of a second, of the largest size."""
    interval = [FIRST_SECONDS, *(auto_seconds(size["stall"], 1, failures) for failures in range(1, 13))]

    def auto(now: float, last: float) -> bool:
        return now - last >= interval[min(int(now // goodput.FAULT), len(interval) - 1)]

    def plain(seconds: float) -> float:
        stall = size["plainStall"]
        return goodput.goodput(
            lambda now, last: now - last >= seconds, stall, stall, recovery["torchrun"]["seconds"], 1.0
        )

    ours = goodput.goodput(auto, size["stall"], size["stored"], recovery["ours"]["seconds"], 1.0)
    return {"ours": ours, "torchrun, every 500 steps": plain(TRAINER_SAVES), "torchrun, every 60 s": plain(60.0)}


def report(found: dict[str, Any]) -> str:
    kills, sizes = found["recovery"], found["sizes"]
    lines = [
        "# What a fault costs",
        "",
        f"`python benchmarks/recovery/bench.py --keep` on {found['machine']}; medians. Ours stores in an S3 server on",
        "the same machine, torchrun and the Trainer on the local disk, which a pod that is lost takes with it.",
        *([found["note"]] if found["note"] else []),
        "",
        f"## kill -9 of rank 1 of 2, a checkpoint every {recovering.EVERY} steps",
        "",
        "| | to the next step | lost steps |",
        "|---|---|---|",
        *(f"| {name} | {kill['seconds']:.1f} s | {kill['lostSteps']:.0f} |" for name, kill in kills.items()),
        "",
        "Ours ends the pod and starts one anew on an empty disk, with the download of model, data and checkpoint; what",
        "a cluster adds to it (the operator's next Job, scheduling, the image) is not in it. torchrun restarts its",
        "processes where they were.",
        "",
        "## Checkpoints by size",
        "",
        "| trained parameters | with Adam | training stands still | worst | share of the Auto interval "
        "| the Trainer's | stored after | resumed after |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(size) for size in sizes),
        "",
        "## Goodput",
        "",
        f"One hour with a fault every five minutes, steps of a second, {sizes[-1]['parameters']:,} trained parameters;",
        "time is simulated, with the figures above.",
        "",
        "| | share of the hour |",
        "|---|---|",
        *(f"| {name} | {100 * share:.1f} % |" for name, share in found["goodput"].items()),
    ]
    return "\n".join(lines) + "\n"


def _row(size: dict[str, float]) -> str:
    share = size["stall"] / auto_seconds(size["stall"], 1)
    return (
        f"| {size['parameters']:,} | {size['bytes'] / 2**20:,.0f} MiB | {1000 * size['stall']:.1f} ms | "
        f"{1000 * size['stallWorst']:.1f} ms | {100 * share:.3f} % | {1000 * size['plainStall']:.0f} ms | "
        f"{size['stored']:.1f} s | {size['resumed']:.1f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_048_576, 10_485_760, 41_943_040])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="a sentence about the conditions, for the report")
    parser.add_argument("--keep", action="store_true")
    chosen = parser.parse_args()
    found = measure(chosen.sizes, chosen.rounds) | {"note": chosen.note}
    print(text := report(found))
    if chosen.keep:
        (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")
        (HERE / "results.md").write_text(text)


if __name__ == "__main__":
    main()
