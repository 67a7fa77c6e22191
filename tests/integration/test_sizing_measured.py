"""The memory that sizing predicts is what a job takes: jobs as pods run them, measured by the kernel."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.gang]

MEASURE = Path(__file__).parents[2] / "benchmarks" / "sizing" / "measure.py"
CASES = ["LoRA"]
"""Of the ten of `make bench-sizing`."""


@pytest.mark.timeout(600)
def test_the_estimate_is_within_a_fifth_of_the_peak() -> None:
    command = [sys.executable, str(MEASURE), "--json", *(word for case in CASES for word in ("--case", case))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [entry["case"] for entry in found] == CASES
    for entry in found:
        assert entry["predicted"] == pytest.approx(entry["measured"], rel=0.2), entry
