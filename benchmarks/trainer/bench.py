"""How fast is the trainer, beside its peers and beside a loop that is written by hand?

    python benchmarks/trainer/bench.py --peer llamafactory=/path/to/its/python

Every contender is a process of its own, as its users start it, on the same model, examples, precision and batch.
Results go to results.json and results.md beside this file.
"""

import argparse
import asyncio
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ours
import report
from processes import free_port, gpu_memory
from task import Task
from workload import SIZES, Size, examples_of, flops_per_token, make_data, make_model, mixed_lengths, plan_of

HERE = Path(__file__).parent
WARM_UP = 2
"""Steps that are not counted: the first ones fill caches."""


@dataclass(frozen=True)
class Contender:
    name: str
    script: str | None
    """None: ours."""
    packed: bool = False
    peer: str | None = None
    """Whose Python runs it; None: that of this project."""


OURS, OURS_PACKED = Contender("this trainer", None), Contender("this trainer, packed", None, packed=True)
LOOP, LOOP_PACKED = Contender("hand-written loop", "loop.py"), Contender("hand-written loop, packed", "loop.py", True)
TRL, TRL_PACKED = Contender("TRL", "trl_sft.py"), Contender("TRL, packed", "trl_sft.py", packed=True)
FACTORY = Contender("LLaMA-Factory", "factory.py", peer="llamafactory")
FACTORY_PACKED = Contender("LLaMA-Factory, packed", "factory.py", packed=True, peer="llamafactory")
WORKLOADS = {
    "fixed": (LOOP, OURS, TRL, FACTORY),
    "mixed": (LOOP, LOOP_PACKED, OURS, OURS_PACKED, TRL, TRL_PACKED, FACTORY, FACTORY_PACKED),
}


async def main() -> None:
    options = parse()
    folder = Path(tempfile.mkdtemp(prefix="bench-trainer-"))
    s3 = await ours.S3.start(folder / "s3")
    try:
        s3.create_bucket(ours.BUCKET)
        results = await asyncio.to_thread(measure, options, folder, s3)
    finally:
        await s3.stop()
        shutil.rmtree(folder, ignore_errors=True)
    report.write(options.output, results)
    print(report.markdown(results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("CPU", "CUDA"), default="CPU")
    parser.add_argument("--dtype", choices=("Float32", "BFloat16"), default="Float32")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model: 0.2, 7 or 8,000 M parameters")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--micro", type=int, default=8, help="rows of a forward pass that are not packed")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps, of which the first two do not count")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--only", action="append", metavar="NAME", help="a contender; several may be given")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="llamafactory=/path/python")
    parser.add_argument("--peak-tflops", type=float, help="of the device in this precision: adds MFU")
    parser.add_argument("--output", type=Path, default=HERE)
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path, s3: Any) -> dict[str, Any]:
    size = SIZES[options.size]
    model = make_model(folder / "model", size, options.max_length, options.dtype)
    peers = dict(entry.split("=", 1) for entry in options.peer)
    entries = []
    for workload in options.workloads:
        tasks = dict(tasks_of(options, workload, folder, model, size, peers))
        for contender, task in tasks.items():
            task.write()
            if contender.script is None:
                ours.prepare(s3, task, size, f"{workload}-{'packed' if task.packed else 'plain'}")
        runs: dict[Contender, list[report.Run]] = {contender: [] for contender in tasks}
        # One round after the other: what disturbs the machine for a while disturbs all of them.
        for _ in range(options.repeats):
            for contender, task in tasks.items():
                runs[contender].append(run(contender, task, s3, peers))
                print(workload, contender.name, runs[contender][-1], file=sys.stderr, flush=True)
        lengths = examples_of(folder / f"{workload}.parquet").lengths
        flops = flops_per_token(model, float((lengths**2).sum() / lengths.sum()))
        entries.append(
            {
                "workload": workload,
                "examples": len(lengths),
                "mean": float(lengths.mean()),
                "longest": int(lengths.max()),
                "runs": {contender.name: asdict(report.median(found)) for contender, found in runs.items()},
                "spread": {contender.name: report.spread(found) for contender, found in runs.items()},
                "flopsPerToken": flops,
            }
        )
    return {
        "command": shlex.join(["python", "benchmarks/trainer/bench.py", *map(anywhere, sys.argv[1:])]),
        "machine": machine(),
        "device": options.device,
        "dtype": options.dtype,
        "size": asdict(size),
        "repeats": options.repeats,
        "peakTFLOPS": options.peak_tflops,
        "missing": sorted({c.peer for w in options.workloads for c in WORKLOADS[w] if c.peer} - set(peers)),
        "workloads": entries,
        "versions": {"ours": versions(sys.executable)} | {name: versions(python) for name, python in peers.items()},
    }


def tasks_of(
    options: argparse.Namespace, workload: str, folder: Path, model: Path, size: Size, peers: dict[str, str]
) -> Iterator[tuple[Contender, Task]]:
    import numpy as np

    micro = options.micro if workload == "mixed" else max(1, options.micro // 2)
    count = options.steps * micro * 2
    fixed = np.full(count, options.max_length // 2)
    lengths = mixed_lengths(count, options.max_length) if workload == "mixed" else fixed
    data = make_data(folder / f"{workload}.parquet", lengths, size.vocabulary)
    # As many useful tokens in a packed micro-batch as in one that is not.
    packed_micro = max(1, round(micro * float(lengths.mean()) / options.max_length))
    for contender in WORKLOADS[workload]:
        if options.only and contender.name not in options.only:
            continue
        if contender.peer and contender.peer not in peers:
            continue
        own = folder / workload / contender.name.replace(" ", "-").replace(",", "")
        task = Task(
            model=str(model),
            data=str(data),
            folder=str(own),
            device=options.device,
            dtype=options.dtype,
            packed=contender.packed,
            micro=packed_micro if contender.packed else micro,
            accumulation=2,
            steps=options.steps,
            max_length=options.max_length,
            lora_rank=16,
            seed=7,
        )
        if contender.packed:
            # One pass over the data, as without packing.
            rows = len(plan_of(task, examples_of(data)).rows)
            task = replace(task, steps=max(WARM_UP + 1, rows // (task.micro * task.accumulation)))
        yield contender, task


def run(contender: Contender, task: Task, s3: Any, peers: dict[str, str]) -> report.Run:
    folder, log = Path(task.folder), Path(task.folder, "log")
    if contender.script is None:
        shutil.rmtree(folder / "work", ignore_errors=True)
        ours.forget(s3, task)
        command, env = ours.command(s3, task, free_port())
    else:
        python = peers[contender.peer] if contender.peer else sys.executable
        command = [python, str(HERE / contender.script), str(folder / "task.json")]
        env = dict(os.environ)
    env |= {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true"}
    with log.open("w") as file, gpu_memory(task.device) as gpu:
        started = time.time()
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{contender.name} failed:\n{log.read_text()[-3000:]}")
    if contender.script is None:
        steps = ours.steps(task, log)
    else:
        steps = [json.loads(line) for line in task.record.read_text().splitlines()]
    assert len(steps) == task.steps, f"{contender.name}: {len(steps)} of {task.steps} steps in {log}"
    counted = steps[WARM_UP:]
    return report.Run(
        tokens_per_second=sum(step["tokens"] for step in counted) / (steps[-1]["at"] - steps[WARM_UP - 1]["at"]),
        first_step_seconds=steps[0]["at"] - started,
        # Of the process or, of ours, of the rank that it started and waited for: whichever had more.
        resident_mb=usage.ru_maxrss / 1024,
        gpu_mb=gpu[0] if task.device == "CUDA" else None,
    )


def anywhere(argument: str) -> str:
    """A peer without the folder of this machine that it lies in."""
    name, equals, path = argument.partition("=")
    return f"{name}={Path(path).name}" if equals and path.startswith("/") else argument


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 1024**2
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": names[0] if names else platform.machine(),
        "memoryGiB": round(memory),
        "python": platform.python_version(),
        "gpu": shutil.which("nvidia-smi")
        and subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.split(" (")[0].strip(),
    }


def versions(python: str) -> dict[str, str]:
    """What is installed there, of the libraries that matter."""
    text = (
        "import importlib.metadata as m, json\n"
        "print(json.dumps({n: m.version(n) for n in ('torch', 'transformers', 'peft', 'accelerate', 'trl', "
        "'llamafactory') if any(d.metadata['Name'] == n for d in m.distributions())}))"
    )
    found: dict[str, str] = json.loads(subprocess.run([python, "-c", text], capture_output=True, text=True).stdout)
    return found


if __name__ == "__main__":
    asyncio.run(main())
