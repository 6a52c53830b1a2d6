"""What the simulator itself costs, with sites that do not train: a round of few sites and of many, and over the size of the population.

    python -m benchmarks.simulation_scale                        # everything
    python -m benchmarks.simulation_scale --only round sites     # the framework's cost alone
    python -m benchmarks.simulation_scale --populations 1000 100000

round:      20 sites of 100 a round: milliseconds a round
sites:      10,000 of 10,000 sites a round: microseconds a site
population: 1,000 sites a round, and of a million 10,000 too, under SCAFFOLD, each of which remembers a control variate on disk: seconds a
            round and the memory of all processes, from their start on (pages that several share count once)

Each in a process of its own; medians of the rounds after the first. Writes docs/tables/simulation-scale.md with its plot.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from torch import nn

from benchmarks.tables.common import ROOT, markdown, tell
from fedflow.algorithm import LocalResult
from fedflow.recipe import Recipe
from fedflow.simulation.engine import simulate
from fedflow.types import Groups, RoundContext


@dataclass(frozen=True)
class Case:
    """One simulation."""

    kind: str
    model: str
    sites: int
    cohort: int
    rounds: int
    algorithm: str = "fedavg"


MODELS = {"11 parameters": [10, 1], "50,890 parameters": [784, 64, 10], "7,850 parameters": [784, 10]}
CASES = [
    *(Case("round", model, 100, 20, 200) for model in ("11 parameters", "50,890 parameters")),
    *(Case("sites", model, 10_000, 10_000, 4) for model in ("11 parameters", "50,890 parameters")),
]
WANTED = {"round": "≤ 5 ms a round", "sites": "≤ 100 µs a site"}


def layers(widths: Sequence[int]) -> nn.Module:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


class Still:
    """A site whose training is over at once; its model has moved by nothing."""

    def __len__(self) -> int:
        return 1

    def training(self, setup: Any) -> Still:
        return self

    def train(self, broadcast: Groups, ctx: RoundContext, **options: Any) -> LocalResult:
        parts = (broadcast[group] for group in ("params", "frozen", "buffers"))
        return LocalResult(*parts, examples=1, steps=1, lr_sum=1.0)


def still() -> Still:
    return Still()


def measure(case: Case) -> float:
    """Seconds a round."""
    recipe = Recipe.load(
        {
            "name": "still",
            "model": {"path": "benchmarks.simulation_scale:layers", "args": {"widths": MODELS[case.model]}},
            "workload": "benchmarks.simulation_scale:still",
            "rounds": case.rounds,
            "algorithm": case.algorithm,
            "schedule": {"kind": "sampled", "sites_per_round": case.cohort},
        }
    )
    ends: list[float] = []
    with tempfile.TemporaryDirectory(prefix="fedflow-scale-") as folder:
        sites = [f"site-{number:07}" for number in range(case.sites)]
        on_disk: dict[str, Any] = {"store": f"{folder}/store", "book": Path(folder) / "book.sqlite"}
        places = on_disk if case.kind == "population" else {}
        simulate(recipe, sites, on_commit=lambda manifest: ends.append(time.perf_counter()), **places)
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


def apart(case: Case) -> dict[str, float]:
    """The same in a process of its own, and the MiB of it and its children."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.simulation_scale", "--case", json.dumps(asdict(case))]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    memory = most_memory(process)
    said, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    found = {"round": float(said.splitlines()[-1]), "MiB": memory / (1 << 20)}
    tell(f"{case}: {found}")
    return found


def most_memory(process: subprocess.Popen[str]) -> int:
    """The most that it and its children have at a time until it ends, in bytes, looked at five times a second. From outside: a thread
    there would keep the workers from being forked."""
    own, most = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        with suppress(psutil.Error, OSError):
            for each in (own, *own.children(recursive=True)):
                with suppress(psutil.Error, OSError):
                    total += each.memory_full_info().pss
        most = max(most, total)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    return most


def main() -> None:
    kinds = ["round", "sites", "population"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--populations", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=5, help="of each population")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/tables")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(measure(Case(**json.loads(args.case))))
        return
    sizes = [(n, 1_000) for n in args.populations] + [(n, 10_000) for n in args.populations if n >= 1_000_000]
    populations = [Case("population", "7,850 parameters", *size, args.rounds, "scaffold") for size in sizes]
    found = {case: apart(case) for case in [*CASES, *populations] if case.kind in args.only}
    write(args.out, found)


def write(out: Path, found: dict[Case, dict[str, float]]) -> None:
    from matplotlib.figure import Figure

    costs = [_cost(case, values) for case, values in found.items() if case.kind != "population"]
    populations = {case: values for case, values in found.items() if case.kind == "population"}
    rows = [[f"{c.sites:,}", f"{c.cohort:,}", f"{v['round']:.2f}", f"{v['MiB']:,.0f}"] for c, v in populations.items()]
    out.mkdir(parents=True, exist_ok=True)
    (out / "simulation-scale.md").write_text(
        "# What the simulator costs\n\nSites that do not train, a process a processor "
        f"({os.cpu_count()}); medians of the rounds after the first. Made by `python -m benchmarks.simulation_scale`.\n\n"
        + markdown(["", "model", "found", "wanted"], costs)
        + "\nUnder SCAFFOLD with 7,850 parameters, what sites remember on disk. Memory from the first process's start to its end, pages that "
        "several processes share counted once (PSS); wanted of 100,000 sites: ≤ 2,048 MiB.\n\n"
        + markdown(["sites", "sites a round", "seconds a round", "MiB of all processes, shared pages once"], rows)
        + "\n![plot](simulation-scale.svg)\n"
    )
    drawn = {case: values for case, values in populations.items() if case.cohort == 1_000}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, name, label in zip(
        figure.subplots(1, 2), ("round", "MiB"), ("seconds a round", "MiB of all processes"), strict=True
    ):
        axis.plot([c.sites for c in drawn], [v[name] for v in drawn.values()], marker="o")
        axis.set(xscale="log", xlabel="sites, of which 1,000 a round", ylabel=label, ylim=(0, None))
    for kind in ("svg", "png"):
        figure.savefig(out / f"simulation-scale.{kind}", metadata={"Date": None} if kind == "svg" else None, dpi=110)
    print(out / "simulation-scale.md")


def _cost(case: Case, found: dict[str, float]) -> list[str]:
    about = f"{case.cohort:,} sites of {case.sites:,} a round"
    each = {
        "round": f"{1e3 * found['round']:.1f} ms a round",
        "sites": f"{1e6 * found['round'] / case.cohort:.0f} µs a site",
    }
    return [about, case.model, each[case.kind], WANTED[case.kind]]


if __name__ == "__main__":
    main()
