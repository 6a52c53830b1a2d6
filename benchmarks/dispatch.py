"""Deployed rounds without training: what dispatching costs, with Prefect's stock process workers and with fedflow's.

    python -m benchmarks.dispatch [--sites 1 2 4 8] [--rounds 20] [--stock-rounds 5] [--out docs/tables]

A PocEnv for each: a real Prefect server (on PostgreSQL with the extra `poc`), a worker a site, the coordinator's, all on this
machine. A site takes one step on a model of four numbers. Printed, a line each:
seconds: of a round, from its plan to its commit: median, and 10th and 90th percentile; between: from one commit to the next;
CPU seconds of a round: a site's worker and all that it started (mean of the sites); the coordinator's; server and database;
requests: at the API, a round, of everybody together.
The first round is not counted: it warms the workers. Stock workers, which take a minute a round, are given fewer rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from benchmarks.tables.common import markdown, write
from fedflow.environments.base import Run
from fedflow.environments.poc import QUIET, PocEnv
from fedflow.local import FunctionWorkload
from fedflow.recipe import Federation, Recipe
from fedflow.store.journal import Journal

REQUEST = re.compile(rb'"(?:GET|POST|PATCH|PUT|DELETE) /api/')  # a line of the server's access log


class Small(nn.Module):
    """Four parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))


def step(model: Small, data: list[float], config: Any) -> None:
    model.weight.grad = torch.ones(4)
    torch.optim.SGD(model.parameters(), lr=data[0]).step()


def one_step() -> FunctionWorkload:
    return FunctionWorkload(step, [0.1])


class Spent:
    """CPU seconds so far of an environment's processes, and of all that they started: by role."""

    def __init__(self, env: PocEnv) -> None:
        self.of = {_role(p.args): _cpu(p.pid) for p in env.processes()}
        workers = {p.pid for p in env.processes()}
        others = [c.pid for c in psutil.Process().children() if c.pid not in workers]
        self.of["server"] = sum(_cpu(pid) for pid in others)
        self.requests = len(REQUEST.findall((env.server.home / "server.log").read_bytes()))

    def since(self, before: Spent, sites: Sequence[str], rounds: int) -> dict[str, float]:
        """What a round took since then."""
        spent = {role: (seconds - before.of[role]) / rounds for role, seconds in self.of.items()}
        return {
            "site": round(statistics.mean(spent[site] for site in sites), 3),
            "coordinator": round(spent["coordinator"], 3),
            "server": round(spent["server"], 3),
        }


def _role(args: Any) -> str:
    return str(args[args.index("--pool") + 1])


def _cpu(pid: int) -> float:
    """Of a process, of what it started and of what of that has ended."""
    total = 0.0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def measure(kind: str, sites: int, rounds: int, home: Path) -> dict[str, Any]:
    """A run of `rounds` rounds and the first one over that many sites with workers of that type."""
    recipe = Recipe.load(
        {
            "name": "no-op",
            "model": "benchmarks.dispatch:Small",
            "workload": "benchmarks.dispatch:one_step",
            "rounds": rounds + 1,
        }
    )
    with PocEnv(Federation.of(sites), home=home, site_type=kind) as env:
        run = env.execute(recipe)
        await_commit(run, 0)
        before = Spent(env)
        await_commit(run, rounds)
        after = Spent(env)
        run.result()
        seconds, between = _seconds(run.journal, rounds)
        shares = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else seconds * 9
        return {
            "workers": kind,
            "sites": sites,
            "seconds": round(statistics.median(seconds), 2),
            "10-90 %": [round(shares[0], 2), round(shares[-1], 2)],
            "between": round(statistics.median(between), 2),
            "CPU": after.since(before, env.federation.names, rounds),
            "requests": round((after.requests - before.requests) / rounds, 1),
        }


def await_commit(run: Run, number: int) -> None:
    """Until that round is committed: seen in the store, for the API has enough to do."""
    looks = 0
    while run.journal.manifest(number, "train") is None:
        time.sleep(0.05)
        looks += 1
        if looks % 200 == 0 and run.status() != "running":
            run.result()


def _seconds(journal: Journal, rounds: int) -> tuple[list[float], list[float]]:
    """Of the rounds after the first one: from plan to commit, and from commit to commit."""
    held = [m for m in (journal.manifest(number, "train") for number in range(rounds + 1)) if m]
    pairs = itertools.pairwise(held)
    return (
        [(m.committed - m.opened).total_seconds() for m in held[1:] if m.opened],
        [(m.committed - before.committed).total_seconds() for before, m in pairs],
    )


def table(measured: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """Markdown, with its heading: a line a measurement."""
    head = [
        "sites",
        "workers",
        "plan to commit, s",
        "10-90 %",
        "commit to commit, s",
        "CPU a site, s",
        "coordinator, s",
    ]
    head += ["server, s", "requests", "times as quick"]
    rows = []
    for m in measured:
        slow = next((o for o in measured if o["sites"] == m["sites"] and o["workers"] == "process"), m)
        quick = f"{slow['seconds'] / m['seconds']:.1f}" if slow is not m else ""
        spread, cpu = " … ".join(f"{s:.2f}" for s in m["10-90 %"]), m["CPU"]
        row = [m["sites"], m["workers"], f"{m['seconds']:.2f}", spread, f"{m['between']:.2f}"]
        rows.append([str(c) for c in (*row, cpu["site"], cpu["coordinator"], cpu["server"], m["requests"], quick)])
    given = " ".join(map(str, options.sites))
    about = (
        f"# Dispatch\n\n`python -m benchmarks.dispatch --sites {given} --rounds {options.rounds} --stock-rounds {options.stock_rounds} "
        "--out docs/tables`: rounds without training over real servers and workers, all on one machine; each figure is of a round, "
        f"the seconds are medians of {options.rounds} rounds, with Prefect's stock workers of {options.stock_rounds}. "
        f"{os.cpu_count()} cores. `process` is Prefect's stock worker.\n\n"
    )
    return about + markdown(head, rows)


def draw(axes: Any, measured: Sequence[dict[str, Any]]) -> None:
    for kind in dict.fromkeys(m["workers"] for m in measured):
        of = [m for m in measured if m["workers"] == kind]
        spread = [[abs(m["seconds"] - m["10-90 %"][side]) for m in of] for side in (0, 1)]
        sites, seconds = [m["sites"] for m in of], [m["seconds"] for m in of]
        axes.errorbar(sites, seconds, spread, marker="o", capsize=3, label=f"{kind} workers")
    axes.set(xlabel="sites", ylabel="seconds from plan to commit", yscale="log")
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--stock-rounds", type=int, default=5, metavar="N", help="0: no stock workers")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write dispatch.md and its plot there")
    options = parser.parse_args()
    QUIET["PREFECT_LOGGING_SERVER_LEVEL"] = "INFO"  # its access log is what counts the requests
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    measured: list[dict[str, Any]] = []
    for sites in options.sites:
        for kind, rounds in (("process", options.stock_rounds), ("fedflow-site", options.rounds)):
            if not rounds:
                continue
            with tempfile.TemporaryDirectory() as home:
                measured.append(measure(kind, sites, rounds, Path(home)))
            print(json.dumps(measured[-1]), flush=True)
    print(text := table(measured, options))
    if options.out:
        write(options.out, "dispatch", text, lambda axes: draw(axes, measured))


if __name__ == "__main__":
    main()
