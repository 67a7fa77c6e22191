"""Is the memory that sizing predicts what a job needs?

    python benchmarks/sizing/measure.py                  # every case on the CPU
    python benchmarks/sizing/measure.py --device CUDA    # on a GPU, with bfloat16 and larger models

Each case is a job of its own, run as a pod runs it (benchmarks/trainer/ours.py). On the CPU the measured peak is the
resident memory of the largest rank, from its start to its end, with an allocator that gives back what is freed; on a
GPU what the driver says is in use.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "trainer"))

import numpy as np
import ours
from processes import free_port, gpu_memory
from task import Task
from workload import Size, make_data, make_model

from finetune_api.sizing import Device, Placement, Request, Term, terms
from finetune_api.tuning import Tuning
from finetune_cli import modelsource
from finetune_cli.objectstore import Access

STEPS = 2
HEAD = "| case | predicted | measured | predicted / measured |\n| --- | --- | --- | --- |"
WIDE, BROAD = Size(512, 8, 1408, 8, 4, 8192), Size(768, 6, 2048, 12, 4, 8192)
ON_GPU = Size(2048, 16, 8192, 32, 8, 128_256)
"""Llama-3.2-1B."""


@dataclass(frozen=True)
class Case:
    size: Size
    length: int
    micro: int
    tuning: str = "LoRA"
    strategy: str = "DDP"
    checkpointing: bool = False
    offload: str = "None"
    ranks: int = 1
    packed: bool = False


CASES = {
    "CPU": {
        "LoRA": Case(WIDE, 512, 4),
        "LoRA, recomputed": Case(WIDE, 512, 8, checkpointing=True),
        "LoRA, long packed rows": Case(WIDE, 2048, 1, packed=True),
        "LoRA, 2 ranks, ZeRO3": Case(BROAD, 256, 4, strategy="ZeRO3", ranks=2),
        "QLoRA": Case(BROAD, 512, 4, "QLoRA"),
        "Freeze": Case(BROAD, 512, 4, "Freeze"),
        "Full": Case(BROAD, 256, 4, "Full"),
        "Full, recomputed": Case(BROAD, 512, 4, "Full", checkpointing=True),
        "Full, 2 ranks": Case(BROAD, 256, 4, "Full", ranks=2),
        "Full, 2 ranks, ZeRO2": Case(BROAD, 256, 4, "Full", strategy="ZeRO2", ranks=2),
    },
    "CUDA": {
        "LoRA": Case(ON_GPU, 2048, 4),
        "LoRA, recomputed": Case(ON_GPU, 4096, 8, checkpointing=True),
        "LoRA, long packed rows": Case(ON_GPU, 8192, 1, packed=True),
        "LoRA, ZeRO3": Case(ON_GPU, 2048, 2, strategy="ZeRO3"),
        "QLoRA": Case(ON_GPU, 2048, 4, "QLoRA"),
        "Freeze": Case(ON_GPU, 2048, 4, "Freeze"),
        "Full": Case(ON_GPU, 2048, 2, "Full"),
        "Full, recomputed": Case(ON_GPU, 2048, 8, "Full", checkpointing=True),
        "Full, ZeRO2, offloaded": Case(ON_GPU, 2048, 2, "Full", strategy="ZeRO2", offload="Optimizer"),
    },
}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=CASES, default="CPU")
    parser.add_argument("--case", action="append", help="one of those that there are; several may be given")
    parser.add_argument("--json", action="store_true", help="one JSON object for each case instead of a table")
    parser.add_argument("--keep", action="store_true", help="write results.md, or results-cuda.md, beside this file")
    options = parser.parse_args()
    if options.keep and options.case:
        parser.error("--keep is for all cases: a part of them would replace the whole")
    folder = Path(tempfile.mkdtemp(prefix="bench-sizing-"))
    s3 = await ours.S3.start(folder / "s3")
    rows = [HEAD]
    if not options.json:
        print(HEAD)
    try:
        s3.create_bucket(ours.BUCKET)
        for number, name in enumerate(options.case or CASES[options.device]):
            case = CASES[options.device][name]
            found = await asyncio.to_thread(measure, case, options.device, folder / str(number), s3)
            rows.append(tell(name, *found, as_json=options.json))
        if options.keep:
            file = "results.md" if options.device == "CPU" else "results-cuda.md"
            title = f"# Predicted and measured memory\n\nBy `measure.py --device {options.device} --keep`.\n\n"
            (Path(__file__).parent / file).write_text(title + "\n".join(rows) + "\n")
    finally:
        await s3.stop()
        shutil.rmtree(folder, ignore_errors=True)


def tell(name: str, parts: list[Term], measured: float, as_json: bool) -> str:
    """The row of the table."""
    predicted = sum(term.bytes for term in parts)
    row = f"| {name} | {predicted / 1e6:,.0f} MB | {measured / 1e6:,.0f} MB | {predicted / measured:.2f} |"
    if as_json:
        print(json.dumps({"case": name, "predicted": predicted, "measured": measured}), flush=True)
        return row
    print(row, flush=True)
    told = ", ".join(f"{term.name} {term.bytes / 1e6:,.0f}" for term in parts)
    print(f"  {told} MB", file=sys.stderr, flush=True)
    return row


def measure(case: Case, device: str, folder: Path, s3: Any) -> tuple[list[Term], float]:
    """The terms of the prediction, and the bytes that were measured."""
    dtype = "BFloat16" if device == "CUDA" else "Float32"
    model = make_model(folder / "model", case.size, case.length, dtype)
    lengths = np.full(STEPS * 2 * case.micro * case.ranks, case.length)
    task = Task(
        model=str(model),
        # Every token is learned: what sizing has to expect.
        data=str(make_data(folder / "rows.parquet", lengths, case.size.vocabulary, prompt_share=0)),
        folder=str(folder),
        device=device,
        dtype=dtype,
        packed=case.packed,
        micro=case.micro,
        accumulation=2,
        steps=STEPS,
        max_length=case.length,
        lora_rank=16,
        seed=7,
        ranks=case.ranks,
    )
    spec = {"tuning": {"type": case.tuning}}
    sizing = {"strategy": case.strategy, "gradientCheckpointing": case.checkpointing, "offload": case.offload}
    ours.prepare(s3, task, case.size, folder.name, spec, sizing)
    log = folder / "log"
    command, env = ours.command(s3, task, free_port())
    # glibc keeps what it may need again; here it is to give back what a step has freed.
    env["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    env["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // case.ranks))
    with log.open("w") as file, gpu_memory(device) as gpu:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the job failed:\n{log.read_text()[-3000:]}")
    # Of the launcher or a rank that it waited for, whichever had more.
    return predicted(case, device, dtype, model), gpu[0] * 2**20 if device == "CUDA" else usage.ru_maxrss * 1024.0


def predicted(case: Case, device: str, dtype: str, model: Path) -> list[Term]:
    tuning = Tuning.model_validate({"type": case.tuning})
    shape = modelsource.of(str(model), Access()).shape(tuning)
    request = Request.model_validate(
        {
            "tuning": tuning,
            "dtype": dtype,
            "sequence_length": case.length,
            "global_batch_size": case.micro * case.ranks,
            "world_size": case.ranks,
        }
    )
    place = Placement(case.strategy, case.micro, case.checkpointing, case.offload)  # type: ignore[arg-type]
    found = terms(shape, request, Device(kind=device, memory_bytes=0), place)  # type: ignore[arg-type]
    return [term for term in found if term.name != "allocator"]


if __name__ == "__main__":
    asyncio.run(main())
