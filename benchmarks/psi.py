"""What a private set intersection costs: time, memory, and bytes in the store.

    python -m benchmarks.psi [--items 1000000] [--sites 2] [--threads 1]

Sites are done one after the other in this process, half of each one's items being everybody's; the result is compared with Python's sets. Prints,
for the whole run, seconds on the clock and of processors, the peak of this process's memory above what it had before, and the bytes that are in the store.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

from fedflow.engine import simulate
from fedflow.engine.results import read_result
from fedflow.recipe import Recipe


def items(site: int, count: int) -> list[str]:
    return [*(f"everybody's-{i}" for i in range(count // 2)), *(f"{site}-{i}" for i in range(count - count // 2))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--sites", type=int, default=2, choices=(2, 3))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    sets = {f"site-{i}": items(i, options.items) for i in range(options.sites)}
    fields = {"name": "psi", "workload": "named:nowhere", "algorithm": "psi", "rounds": 1}
    recipe = Recipe.load({**fields, "numerics": {"threads": options.threads}, "memory_budget": "4GiB"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock, processor = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        found = read_result(simulate(recipe, sets, store=f"{folder}/store")).values
        stored = sum(path.stat().st_size for path in Path(folder, "store").rglob("*") if path.is_file())
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    assert found["intersection"] == len(set.intersection(*map(set, sets.values())))
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{options.sites} sites of {options.items} items: {clock:.1f} s, {processor:.1f} s of processors, ", end="")
    print(f"{processor / options.items / options.sites * 1e6:.0f} µs an item and site; ", end="")
    print(f"{memory:.0f} MiB of memory, {stored / 2**20:.0f} MiB in the store")


if __name__ == "__main__":
    main()
