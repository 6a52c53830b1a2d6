"""Aggregating models larger than memory: time against what the storage alone takes, and peak memory.

    python -m benchmarks.aggregation [--mebibytes 500] [--sites 16] [--backend local|s3] [--threads N] [--budget 256MiB]
                                     [--algorithm fedavg] [--warm] [--naive] [--laps 1] [--folder DIR]
    python -m benchmarks.aggregation --plot memory.png [--sizes 64,256,1024] [--counts 2,8,32]

A round of `sites` updates of `mebibytes` (float32) is closed; then, each in a process of its own and in turn:

aggregate: what `fedflow` does in its aggregating child, up to the commit
storage:   reads the same bytes and writes as many as the result has: dd for local directories, else obstore's own calls
naive:     loads all updates with safetensors, sums in float64 with torch, saves

Before each the pages of all files are dropped from the page cache, or, with --warm, read into it. Peak memory is VmHWM of the
process, that of importing torch and fedflow apart. Ratios of times are of the same lap; the medians over the laps count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

LAYER = 16 << 20  # elements of most tensors: 64 MiB


def peak() -> float:
    """VmHWM of this process, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


# -- a closed round ----------------------------------------------------------------------------------------------------
def prepare(url: str, options: Mapping[str, Any], mebibytes: int, sites: int, algorithm: str) -> list[str]:
    """A run whose first round is closed; the keys of its updates."""
    import torch

    from fedflow.engine import close_round, next_step, open_round, survey
    from fedflow.engine.aggregation import commit_initial
    from fedflow.recipe import Recipe
    from fedflow.store.journal import Journal
    from fedflow.store.objects import ObjectStore
    from fedflow.store.records import RunRecord, UpdateManifest, utc_now
    from fedflow.store.tensors import write_tensors

    def tensors(seed: int) -> dict[str, torch.Tensor]:
        """All layers are the same memory, so that preparing takes little of it."""
        layer = torch.randn(LAYER, generator=torch.Generator().manual_seed(seed)).reshape(-1, 4096)
        full, rest = divmod(mebibytes << 18, LAYER)
        found = {f"layer.{i:04}.weight": layer for i in range(full)}
        return found | ({"layer.last.weight": layer.reshape(-1)[:rest].reshape(-1, 64)} if rest else {})

    recipe = Recipe.load(
        {"name": "size", "model": "torch.nn:Module", "workload": "a:b", "rounds": 1, "algorithm": algorithm}
    )
    names = [f"site-{i:04}" for i in range(sites)]
    store = ObjectStore(url, options)
    journal = Journal(store, "run")
    record = RunRecord(
        fedflow="",
        run="run",
        nonce=uuid.uuid4().hex,
        created=utc_now(),
        recipe=recipe.model_dump(mode="json"),
        sites=names,
    )
    journal.create(record)
    commit_initial(journal, recipe.computation, {"params": tensors(0), "frozen": {}, "buffers": {}})
    plan, opening = open_round(journal, next_step(journal, recipe))  # type: ignore[arg-type]
    keys = []
    for number, site in enumerate(names, start=1):
        inbox = journal.inbox(site, 0, plan.phase)
        groups = {"params": tensors(number), "buffers": {}}
        update = UpdateManifest(
            run="run", nonce=plan.nonce, site=site, round=0, phase=plan.phase, plan=plan.digest(), state_base=None,
            examples=10 + number, steps=1, lr_sum=0.1,
            groups={group: write_tensors(store, inbox, found) for group, found in groups.items()},
        )  # fmt: skip
        keys.append(update.groups["params"].key)
        store.put(f"{inbox}/{update.update_digest().partition(':')[2]}.json", update.to_bytes())
    close_round(journal, plan, opening, survey(journal, plan), why="every site answered")
    return keys


# -- what is measured, each in a process of its own --------------------------------------------------------------------
def aggregate(url: str, options: Mapping[str, Any], budget: int | None, threads: int | None) -> dict[str, Any]:
    """The aggregating child's work."""
    from fedflow.engine import aggregate_round
    from fedflow.memory import keep_freed
    from fedflow.store.journal import Journal
    from fedflow.store.objects import ObjectStore

    keep_freed()
    imported, started = peak(), time.monotonic()
    journal = Journal(ObjectStore(url, options), "run")
    plan = journal.plan(0, "train")
    closing = journal.closing(plan, 1) if plan else None
    assert plan is not None and closing is not None
    manifest = aggregate_round(journal, plan, closing, memory_budget=budget, threads=threads)
    return {
        "seconds": time.monotonic() - started,
        "peak": peak(),
        "import": imported,
        "digest": manifest.model_digest,
        "cpu": time.process_time(),
    }


def storage(url: str, options: Mapping[str, Any], keys: list[str]) -> dict[str, Any]:
    """The same bytes read, and as many as one update has written, with no arithmetic."""
    started = time.monotonic()
    if url.startswith("file://"):
        folder = Path(url.removeprefix("file://"))
        for key in keys:
            _run("dd", f"if={folder / key}", "of=/dev/null", "bs=1M")
        count = (folder / keys[0]).stat().st_size >> 20
        _run("dd", "if=/dev/zero", f"of={folder / 'written'}", "bs=1M", f"count={count}", "conv=fsync")
        seconds = time.monotonic() - started
        (folder / "written").unlink()
        return {"seconds": seconds}
    from fedflow.store.objects import ObjectStore

    store = ObjectStore(url, options)
    for key in keys:
        size = store.size(key)
        for start in range(0, size, 32 << 20):
            store.get_range(key, start, min(size, start + (32 << 20)))
    store.write_stream("written", (bytes(8 << 20) for _ in range(size >> 23)))
    return {"seconds": time.monotonic() - started, "peak": peak()}


def naive(url: str, options: Mapping[str, Any], keys: list[str]) -> dict[str, Any]:
    """Everything loaded, then summed."""
    from safetensors.torch import load_file, save_file

    folder, started = Path(url.removeprefix("file://")), time.monotonic()
    updates = [load_file(folder / key) for key in keys]
    weights = [11.0 + i for i in range(len(keys))]
    mean = {
        name: (sum(u[name].double() * w for u, w in zip(updates, weights, strict=True)) / sum(weights)).float()  # type: ignore[union-attr]
        for name in updates[0]
    }
    save_file(mean, folder / "summed")
    with (folder / "summed").open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.monotonic() - started
    (folder / "summed").unlink()
    return {"seconds": seconds, "peak": peak()}


CALLS = {"prepare": prepare, "aggregate": aggregate, "storage": storage, "naive": naive}


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def in_process(name: str, *args: Any) -> Any:
    """The call's result, from a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.aggregation", "--call", name, json.dumps(args)],
        check=True,
        stdout=subprocess.PIPE,
    )
    return json.loads(done.stdout)


def condition(url: str, warm: bool) -> None:
    """Every file in the page cache, or none."""
    if not url.startswith("file://"):
        return
    _run("sync")
    for path in Path(url.removeprefix("file://")).rglob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            if warm:
                while file.read(1 << 20):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -- laps --------------------------------------------------------------------------------------------------------------
def measure(
    url: str, options: Mapping[str, Any], mebibytes: int, sites: int, laps: int, *, algorithm: str = "fedavg",
    budget: int | None = None, threads: int | None = None, warm: bool = False, with_naive: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Medians over the laps, and the largest peaks."""
    keys = in_process("prepare", url, options, mebibytes, sites, algorithm)
    calls: dict[str, list[Any]] = {"storage": [url, options, keys], "aggregate": [url, options, budget, threads]}
    if with_naive:
        calls["naive"] = [url, options, keys]
    found: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(laps):
        for name, args in calls.items():
            condition(url, warm)
            found[name].append(in_process(name, *args))
        _uncommit(url, options)
    times = {name: statistics.median(lap["seconds"] for lap in laps_) for name, laps_ in found.items()}

    def ratio(a: str, b: str) -> float:
        return statistics.median(x["seconds"] / y["seconds"] for x, y in zip(found[a], found[b], strict=True))

    return {
        "MiB": mebibytes,
        "sites": sites,
        "algorithm": algorithm,
        "warm": warm,
        "seconds": {name: round(seconds, 2) for name, seconds in times.items()},
        "MiB/s": round(mebibytes * (sites + 1) / times["aggregate"]),
        "aggregate/storage": round(ratio("aggregate", "storage"), 2),
        **({"naive/aggregate": round(ratio("naive", "aggregate"), 2)} if with_naive else {}),
        "cpu": round(statistics.median(lap["cpu"] for lap in found["aggregate"]), 1),
        "peak": round(max(lap["peak"] for lap in found["aggregate"])),
        "import": round(max(lap["import"] for lap in found["aggregate"])),
        **({"naive peak": round(max(lap["peak"] for lap in found["naive"]))} if with_naive else {}),
    }


def _uncommit(url: str, options: Mapping[str, Any]) -> None:
    """Take the commit back, for the next lap."""
    from fedflow.store.objects import ObjectStore

    store = ObjectStore(url, options)
    for key in store.list("server/run/rounds"):
        store.delete(key)


def plot(path: str, sizes: list[int], counts: list[int], found: list[dict[str, Any]]) -> None:
    """Peak memory and time over the size of the model and over the number of sites."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    by_size, by_count = found[: len(sizes)], found[len(sizes) :]
    for axis, rows, values, label in zip(
        axes, (by_size, by_count), (sizes, counts), ("model, MiB (4 sites)", f"sites ({sizes[0]} MiB)"), strict=True
    ):
        axis.plot(values, [row["peak"] for row in rows], "o-", label="aggregation")
        axis.plot(values, [row["import"] for row in rows], "s--", label="of that, importing torch")
        axis.set(xlabel=label, xscale="log")
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
    axes[0].set_ylim(0, 1.1 * max(row["peak"] for row in found))
    axes[0].set(ylabel="peak resident memory, MiB")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", nargs=2)
    parser.add_argument("--mebibytes", type=int, default=500)
    parser.add_argument("--sites", type=int, default=16)
    parser.add_argument("--backend", choices=["local", "s3"], default="local")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--budget", type=int, help="MiB")
    parser.add_argument("--algorithm", default="fedavg")
    parser.add_argument("--laps", type=int, default=1)
    parser.add_argument("--folder", help="where local stores lie; default: the system's for temporary files")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--naive", action="store_true")
    parser.add_argument("--plot")
    parser.add_argument("--sizes", default="64,256,1024")
    parser.add_argument("--counts", default="2,8,32")
    options = parser.parse_args()
    if options.call:
        name, args = options.call
        print(json.dumps(CALLS[name](*json.loads(args))))
        return
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        store_options: dict[str, Any] = {}
        root = f"file://{base}"
        if options.backend == "s3":
            from tests.servers import s3_server

            server = stack.enter_context(s3_server())
            os.environ.update(server.env)
            root = f"s3://{server.bucket}"
        settings = {
            "algorithm": options.algorithm,
            "budget": options.budget and options.budget << 20,
            "threads": options.threads,
            "warm": options.warm,
            "with_naive": options.naive,
        }
        sizes, counts = ([int(n) for n in text.split(",")] for text in (options.sizes, options.counts))
        shapes = [(options.mebibytes, options.sites)]
        if options.plot:
            shapes = [(size, 4) for size in sizes] + [(sizes[0], count) for count in counts]
        found = []
        for number, (mebibytes, sites) in enumerate(shapes):
            found.append(measure(f"{root}/{number}", store_options, mebibytes, sites, options.laps, **settings))
            print(json.dumps(found[-1]), flush=True)
            shutil.rmtree(base / str(number), ignore_errors=True)
        if options.plot:
            plot(options.plot, sizes, counts, found)


if __name__ == "__main__":
    main()
