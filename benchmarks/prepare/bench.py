"""How fast `prepare` reads, cleans, tokenises and uploads, and how much memory it takes, whatever the size of the data.

    python benchmarks/prepare/bench.py --mib 256 2048

The rows are made by code: questions and answers of Zipf-distributed words, 1.6 KB a row in the mean, some of them twice
and some nearly so. They lie in an S3 server (moto) as zstd files, so that gigabytes of JSONL fit into its memory.
With --keep, results go to results.json and results.md beside this file.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
from botocore.config import Config

from finetune_api.failures import TerminationMessage
from finetune_api.run import RunConfig, StorageConfig
from finetune_sandbox.s3 import S3

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.tiny import make_tiny_model

FILE = 128 * 2**20
"""Bytes of JSONL in each file."""
BUCKET = "bench"
WORDS = 30_000
BLOCK = 2**18
"""Words, and rows, that are drawn together."""
VOCABULARY = 16_000
HERE = Path(__file__).parent


@dataclass
class Measured:
    mib: int
    rows: int
    tokens: int
    dropped: int
    seconds: float
    cpu_seconds: float
    peak_mib: int

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds

    @property
    def mb_per_second(self) -> float:
        return self.mib * 2**20 / 1e6 / self.seconds


class Text:
    """Rows that look like a data set of answers: the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
        weights = 1 / np.arange(1, 27)
        lengths = np.random.default_rng(0).integers(2, 11, WORDS)
        picked = np.random.default_rng(1).choice(letters, lengths.sum(), p=weights / weights.sum())
        ends = np.cumsum(lengths)
        self._words = np.array(["".join(picked[end - n : end]) for end, n in zip(ends, lengths, strict=True)])
        shares = 1 / np.arange(1, WORDS + 1)
        self._shares = np.cumsum(shares / shares.sum())
        self._block, self._at = "", 0

    def take(self, length: int) -> str:
        """About so many characters, which no other text has."""
        if self._at + length + 20 > len(self._block):
            places = np.searchsorted(self._shares, self._random.random(BLOCK))
            self._block, self._at = " ".join(self._words[np.minimum(places, WORDS - 1)].tolist()), 0
        start, self._at = self._at, self._block.index(" ", self._at + length) + 1
        return self._block[start : self._at - 1]

    def rows(self) -> Iterator[bytes]:
        old: list[bytes] = []
        while True:
            asked = np.clip(self._random.lognormal(5.0, 0.6, BLOCK), 20, 20_000).astype(int).tolist()
            said = np.clip(self._random.lognormal(6.9, 0.7, BLOCK), 20, 20_000).astype(int).tolist()
            repeated = (self._random.random(BLOCK) < 0.02).tolist()
            for question, answer, again in zip(asked, said, repeated, strict=True):
                line = f'{{"prompt": "{self.take(question)}?", "completion": "{self.take(answer)}."}}\n'.encode()
                yield line
                if again:
                    # Half of them with one word that differs.
                    old = [*old[-500:], line if question % 2 else line.replace(b': "', b': "other ', 1)]
                    yield old[len(line) % len(old)]

    def files(self, size: int) -> Iterator[bytes]:
        """`size` bytes of JSONL in files of FILE bytes."""
        rows = self.rows()
        while size > 0:
            lines, room = [], min(size, FILE)
            while room > 0:
                lines.append(next(rows))
                room -= len(lines[-1])
            data = b"".join(lines)
            size -= len(data)
            yield data


async def measure(mib: int, folder: Path) -> Measured:
    server = await S3.start(folder / "s3")
    keys = {"aws_access_key_id": server.admin.access_key_id, "aws_secret_access_key": server.admin.secret_access_key}
    path_style: Any = Config(s3={"addressing_style": "path"})
    client = boto3.client("s3", endpoint_url=server.endpoint, region_name=server.region, config=path_style, **keys)
    client.create_bucket(Bucket=BUCKET)
    text = Text(mib)
    sample = "\n".join(text.take(5000) for _ in range(200))
    model = make_tiny_model(folder / "model", vocab_text=sample, vocab_size=VOCABULARY, max_positions=4096)
    for path in model.iterdir():
        client.put_object(Bucket=BUCKET, Key=f"model/{path.name}", Body=path.read_bytes())
    for number, data in enumerate(text.files(mib * 2**20)):
        packed = pa.compress(data, "zstd", asbytes=True)
        client.put_object(Bucket=BUCKET, Key=f"data/{number:05}.jsonl.zst", Body=packed)
    return prepare(mib, folder, server, keys)


def prepare(mib: int, folder: Path, server: S3, keys: dict[str, str]) -> Measured:
    config = RunConfig.model_validate(
        {
            "namespace": "bench",
            "job": "bench",
            "jobUid": "11111111-2222-3333-4444-555555555555",
            "spec": {
                "baseModel": {"uri": f"s3://{BUCKET}/model/"},
                "datasets": [{"name": "rows", "uri": f"s3://{BUCKET}/data/"}],
                "validation": {"fraction": 0.02},
                "training": {"maxLength": 4096},
                "output": {"uri": f"s3://{BUCKET}/out/"},
            },
            "specSha256": "0" * 64,
            "devices": {"kind": "CPU", "workers": 1, "processesPerWorker": 1},
            "storage": StorageConfig(endpoint=server.endpoint, region=server.region, addressing_style="path"),
            "scratchUri": f"s3://{BUCKET}/out/.scratch/11111111-2222-3333-4444-555555555555/",
            "outputUri": f"s3://{BUCKET}/out/bench/",
        }
    )
    (folder / "run.json").write_text(config.model_dump_json(by_alias=True, exclude_none=True))
    env = os.environ | {
        "FINETUNE_RUN_CONFIG": str(folder / "run.json"),
        "FINETUNE_WORK_DIR": str(folder / "work"),
        "FINETUNE_TERMINATION_LOG": str(folder / "termination-log"),
        "AWS_ACCESS_KEY_ID": keys["aws_access_key_id"],
        "AWS_SECRET_ACCESS_KEY": keys["aws_secret_access_key"],
    }
    command = [sys.executable, "-m", "finetune_trainer", "prepare"]
    begun = time.monotonic()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begun
    message = TerminationMessage.decode((folder / "termination-log").read_text())
    if status or message is None or message.prepared is None:
        raise SystemExit(f"prepare failed: {message}")
    known = message.prepared
    return Measured(
        mib=mib,
        rows=known.train_examples + known.validation_examples + known.dropped,
        tokens=known.train_tokens,
        dropped=known.dropped,
        seconds=round(seconds, 1),
        cpu_seconds=round(usage.ru_utime + usage.ru_stime, 1),
        peak_mib=usage.ru_maxrss // 1024,
    )


def table(found: list[Measured], command: str) -> str:
    lines = [
        "# What `prepare` takes",
        "",
        f"    {command}",
        "",
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}; "
        "the S3 server (moto) ran on the same cores.",
        "",
        "| JSONL | rows | tokens | left out | seconds | rows/s | MB/s | seconds of one core | peak resident |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {m.mib:,} MiB | {m.rows:,} | {m.tokens:,} | {m.dropped:,} | {m.seconds:,.0f} | {m.rows_per_second:,.0f} | "
        f"{m.mb_per_second:.1f} | {m.cpu_seconds:,.0f} | {m.peak_mib:,} MiB |"
        for m in found
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, nargs="+", default=[256, 2048], help="MiB of JSONL, one run for each")
    parser.add_argument("--keep", action="store_true", help="write results.json and results.md")
    options = parser.parse_args()
    found = []
    for mib in options.mib:
        with tempfile.TemporaryDirectory() as folder:
            measured = asyncio.run(measure(mib, Path(folder)))
        print(json.dumps(asdict(measured) | {"rows_per_second": round(measured.rows_per_second)}), flush=True)
        found.append(measured)
    text = table(found, f"python benchmarks/prepare/bench.py --mib {' '.join(map(str, options.mib))}")
    print(text)
    if options.keep:
        (HERE / "results.json").write_text(json.dumps([asdict(m) for m in found], indent=1) + "\n")
        (HERE / "results.md").write_text(text)


if __name__ == "__main__":
    main()
