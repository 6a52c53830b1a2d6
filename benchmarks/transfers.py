"""Sites that download at once: whether one waits for the others.

    python -m benchmarks.transfers [--sites 16] [--mebibytes 64] [--laps 3]

A real S3 server (SeaweedFS), a process a site; all begin at the same instant and verify what they read. Printed are seconds from
there to the end of the fastest, the median and the slowest one, and what one process alone takes in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

from fedflow.store.objects import ObjectRef, ObjectStore
from fedflow.store.reading import Reader
from tests.servers import s3_server


def download(url: str, ref: str) -> None:
    """Ready; when told, read all; done."""
    reader = Reader(ObjectStore(url), ObjectRef.from_json(json.loads(ref)))
    reader.store.size(reader.ref.key)  # connected
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.monotonic()
    reader.verify()
    print(time.monotonic() - started, flush=True)


def at_once(sites: int, url: str, ref: str) -> list[float]:
    """Seconds of each, sorted."""
    command = [sys.executable, "-m", "benchmarks.transfers", "--download", url, ref]
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(command, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            for _ in range(sites)
        ]
        for process in started:
            assert process.stdout and process.stdout.readline() == "ready\n"
        for process in started:
            assert process.stdin
            process.stdin.write("\n")
        return sorted(float(process.stdout.readline()) for process in started if process.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=16)
    parser.add_argument("--mebibytes", type=int, default=64)
    parser.add_argument("--laps", type=int, default=3)
    parser.add_argument("--download", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.download:
        download(*options.download)
        return
    with s3_server() as server:
        os.environ.update(server.env)
        store = ObjectStore(f"s3://{server.bucket}/transfers")
        ref = json.dumps(store.write("objects", os.urandom(options.mebibytes << 20)).to_json())
        for _ in range(options.laps):
            (alone,), many = at_once(1, store.url, ref), at_once(options.sites, store.url, ref)
            found = {
                "MiB": options.mebibytes,
                "alone": round(alone, 2),
                "sites": options.sites,
                "fastest": round(many[0], 2),
                "median": round(statistics.median(many), 2),
                "slowest": round(many[-1], 2),
                "slowest/fastest": round(many[-1] / many[0], 2),
                "slowest/(sites × alone)": round(many[-1] / (options.sites * alone), 2),
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
