"""From nothing to a verified adapter, on this machine: what `make demo` runs.

Each step is a command that you can type yourself. Everything lies below .sandbox/demo/; the base model is kept there
and used again. The exit code is not 0 where anything is off.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / ".sandbox" / "demo"
MANIFEST = HERE.parent / "sft-lora.yaml"
JOB = "stdlib-helper"
QUESTIONS = ["What does json.dumps do?", "What is the module zipfile for?", "What is threading.Lock?"]

phases: list[tuple[str, float]] = []


def main() -> int:
    shutil.rmtree(WORK / "adapter", ignore_errors=True)
    with phase("Build the data set and the base model"):
        python("corpus.py", WORK / "data")
        model = base_model(WORK / "data" / "text.jsonl")
    finetune("sandbox", "down", quiet=True)  # of a demo that was interrupted
    try:
        with phase("Start the sandbox and upload"):
            finetune("sandbox", "up")
            finetune("sandbox", "cp", model, "s3://finetune/models/stdlib-small/")
            finetune("sandbox", "cp", WORK / "data" / "pairs.jsonl", "s3://finetune/data/stdlib/")
        with phase("Prepare, train on two workers, publish"):
            finetune("run", "--sandbox", "-f", MANIFEST)
        with phase("Fetch, verify, check"):
            job = json.loads(finetune("get", JOB, "--sandbox", "-o", "json", quiet=True))
            finetune("fetch", JOB, "--sandbox", "-o", WORK / "adapter")
            improved = check(job)
    finally:
        with phase("Stop the sandbox"):
            finetune("sandbox", "down")
    with phase("Answer with plain peft"):
        python("answer.py", model, WORK / "adapter", *QUESTIONS)
    print()
    for name, seconds in phases:
        print(f"{seconds:6.1f} s  {name}")
    print(f"{sum(seconds for _, seconds in phases):6.1f} s  in all")
    return 0 if improved else 1


def base_model(text: Path) -> Path:
    """The folder of the base model: made anew only where the text or the way it is made has changed."""
    recipe = hashlib.sha256(text.read_bytes() + (HERE / "base_model.py").read_bytes()).hexdigest()[:12]
    directory = WORK / f"model-{recipe}"
    if directory.exists():
        print(f"the base model of an earlier run is used again: {directory}")
        return directory
    partial = WORK / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    python("base_model.py", text, partial)
    partial.rename(directory)
    return directory


def check(job: dict[str, Any]) -> bool:
    """Prints what the job has to show for itself; whether training has lowered the loss on held-out data."""
    status = job["status"]
    result = status["result"]
    before, after = result["metrics"]["evalLossBefore"], result["metrics"]["evalLoss"]
    print(f"state:     {status['state']}")
    print(f"attempts:  {len(status['attempts'])}")
    print(f"eval loss: {before:.3f} before, {after:.3f} after training")
    print(f"adapter:   {result['uri']}")
    if status["state"] != "Complete" or not after < before:
        print("error: the job is not Complete, or its evaluation loss did not fall", file=sys.stderr)
        return False
    return True


@contextmanager
def phase(name: str) -> Iterator[None]:
    print(f"\n== {name}", flush=True)
    start = time.monotonic()
    yield
    phases.append((name, time.monotonic() - start))


def finetune(*arguments: object, quiet: bool = False) -> str:
    """Runs the command line, shown as it would be typed; its output where `quiet`."""
    words = [str(argument) for argument in arguments]
    if not quiet:
        print("$ finetune " + " ".join(os.path.relpath(w) if w.startswith("/") else w for w in words), flush=True)
    command = [sys.executable, "-m", "finetune_cli", *words]
    environment = os.environ | {"FINETUNE_SANDBOX": str(WORK / "cluster")}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE if quiet else None, text=True, check=True)
    return run.stdout or ""


def python(script: str, *arguments: object) -> None:
    # Nothing may be looked up on the network: what is not here is an error.
    quiet = {"DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore::FutureWarning"}
    environment = os.environ | quiet | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([sys.executable, str(HERE / script), *map(str, arguments)], env=environment, check=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(map(str, error.cmd))} ended with exit code {error.returncode}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
