"""obstore against s3fs, both on one real SeaweedFS, lap by lap in turn; and what ObjectStore adds to the better one.

    python -m benchmarks.store_backends [--laps 5] [--mebibytes 256] [--creates 1000]

Prints a Markdown table of medians over the laps, and the ratio of s3fs's time to obstore's (above 1: obstore is faster).
Server and clients share the machine, so that only the ratios mean something elsewhere.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from uuid import uuid4

import obstore
from obstore.store import S3Store
from s3fs import S3FileSystem

from fedflow.store.objects import ObjectStore
from tests.servers import S3Server, s3_server

Ranges = list[tuple[int, int]]
KIBIBYTE, MEBIBYTE = 1 << 10, 1 << 20


class Obstore:
    name = "obstore"

    def __init__(self, s3: S3Server, prefix: str) -> None:
        self.store = S3Store(
            s3.bucket,
            prefix=prefix,
            endpoint=s3.endpoint,
            access_key_id=s3.access_key,
            secret_access_key=s3.secret_key,
            client_options={"allow_http": True, "timeout": "10min"},
        )

    def put(self, key: str, data: bytes) -> None:
        obstore.put(self.store, key, data)

    def create(self, key: str, data: bytes) -> None:
        obstore.put(self.store, key, data, mode="create")

    def get(self, key: str) -> int:
        return len(bytes(obstore.get(self.store, key).bytes()))

    def get_ranges(self, key: str, ranges: Ranges) -> int:
        starts, ends = zip(*ranges, strict=True)
        return sum(len(bytes(block)) for block in obstore.get_ranges(self.store, key, starts=starts, ends=ends))


class S3fs:
    name = "s3fs"

    def __init__(self, s3: S3Server, prefix: str) -> None:
        self.root = f"{s3.bucket}/{prefix}"
        self.fs = S3FileSystem(key=s3.access_key, secret=s3.secret_key, endpoint_url=s3.endpoint)

    def put(self, key: str, data: bytes) -> None:
        self.fs.pipe_file(f"{self.root}/{key}", data)

    def create(self, key: str, data: bytes) -> None:
        self.fs.pipe_file(f"{self.root}/{key}", data, mode="create")

    def get(self, key: str) -> int:
        return len(self.fs.cat_file(f"{self.root}/{key}"))

    def get_ranges(self, key: str, ranges: Ranges) -> int:
        starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
        return sum(map(len, self.fs.cat_ranges([f"{self.root}/{key}"] * len(ranges), starts, ends, on_error="raise")))


class Fedflow:
    name = "ObjectStore"

    def __init__(self, s3: S3Server, prefix: str) -> None:
        options = {"endpoint": s3.endpoint, "access_key_id": s3.access_key, "secret_access_key": s3.secret_key}
        self.store = ObjectStore(f"s3://{s3.bucket}/{prefix}", options)

    def put(self, key: str, data: bytes) -> None:
        self.store.put(key, data, mode="overwrite")

    def create(self, key: str, data: bytes) -> None:
        self.store.put(key, data)

    def get(self, key: str) -> int:
        return len(self.store.get(key))

    def get_ranges(self, key: str, ranges: Ranges) -> int:
        return sum(map(len, self.store.get_ranges(key, ranges)))


Client = Obstore | S3fs | Fedflow


def lap(client: Client, data: bytes, creates: int) -> dict[str, float]:
    """Seconds of each kind of work, on keys that no other lap uses."""
    key, size = uuid4().hex, len(data)
    scattered = [(start, start + 256 * KIBIBYTE) for start in range(0, size, 4 * MEBIBYTE)]
    one = [(size // 4, size // 2)]
    small = data[: 4 * KIBIBYTE]
    return {
        f"put {size >> 20} MiB": seconds(lambda: client.put(key, data)),
        f"get {size >> 20} MiB": seconds(lambda: expect(client.get(key), size)),
        f"one range of {size >> 22} MiB": seconds(lambda: expect(client.get_ranges(key, one), size // 4)),
        f"{len(scattered)} ranges of 256 KiB": seconds(lambda: client.get_ranges(key, scattered)),
        f"{creates} creates of 4 KiB": seconds(
            lambda: [client.create(f"{key}-small/{number}", small) for number in range(creates)]
        ),
    }


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def expect(found: int, expected: int) -> None:
    if found != expected:
        raise SystemExit(f"found {found} bytes, expected {expected}")


def measure(s3: S3Server, laps: int, size: int, creates: int) -> dict[str, dict[str, float]]:
    """Work -> client -> median seconds. A first lap of each client warms it up and is not counted."""
    clients: list[Client] = [kind(s3, uuid4().hex) for kind in (Obstore, S3fs, Fedflow)]
    data = os.urandom(size)
    for client in clients:
        lap(client, data[: 16 * MEBIBYTE], 10)
    found = [{client.name: lap(client, data, creates) for client in clients} for _ in range(laps)]
    return {
        work: {client.name: statistics.median(one[client.name][work] for one in found) for client in clients}
        for work in found[0]["obstore"]
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """Seconds per client, and the two ratios."""
    rows = [
        "| work | obstore | s3fs | s3fs / obstore | ObjectStore | ObjectStore / obstore |",
        "|---|---|---|---|---|---|",
    ]
    for work, times in results.items():
        base, other, ours = times["obstore"], times["s3fs"], times["ObjectStore"]
        rows.append(
            f"| {work} | {base:.2f} s | {other:.2f} s | {other / base:.1f} | {ours:.2f} s | {ours / base:.2f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--mebibytes", type=int, default=256)
    parser.add_argument("--creates", type=int, default=1000)
    arguments = parser.parse_args()
    with s3_server() as s3:
        results = measure(s3, arguments.laps, arguments.mebibytes * MEBIBYTE, arguments.creates)
    print(table(results))


if __name__ == "__main__":
    main()
