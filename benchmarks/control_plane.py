"""Rounds of many sites without training: what a site costs the coordinator and the Prefect API.

    python -m benchmarks.control_plane [--sites 100] [--rounds 3] [--workers 2] [--at-once 4] [--databases sqlite postgres] [--out docs/tables]
    python -m benchmarks.control_plane --sites 144 --silent 2 --quorum 138 --rounds 1 --databases postgres
    python -m benchmarks.control_plane --sites 8 --databases sqlite   # of more, SQLite's writers wait for each other for minutes

A PocEnv whose sites' workers, one a site as deployed, share a few processes, and so the parent of which trainings are forked.
A site takes one step on a model of five numbers; `--silent` ones never answer. For each database are printed
seconds: of a round, from its plan to its commit; of that, until the last flow run was sent, and after the closing;
coordinator: milliseconds a site and round: its CPU, of all its processes; waiting for flow runs to be sent, and after the closing;
requests: at the API, a site and round, by route;
API: milliseconds of CPU of the server (one process) a site and round, and the share of a processor that this is; of its database;
how long a request that reads the database takes meanwhile, asked every 0.2 s: median and 95th percentile, milliseconds; and
before, when nothing happens;
excluded: sites of the last round, and why.
The first round is not counted: it warms the workers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import httpx
import psutil
import torch
from prefect.client.schemas.objects import FlowRun
from torch import Tensor, nn

from benchmarks.dispatch import await_commit
from benchmarks.tables.common import markdown, write
from fedflow.engine.forks import ForkServer, Line
from fedflow.environments.base import Run
from fedflow.environments.poc import QUIET, PocEnv
from fedflow.local import TensorWorkload
from fedflow.prefect.worker import SiteWorker, run_at_site
from fedflow.recipe import Federation, Recipe, SiteConfig

REQUEST = re.compile(r'"(GET|POST|PATCH|PUT|DELETE) /api(/\S*) HTTP')  # a line of the server's access log
NAMES = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|(?<=/)site-\d+|(?<=name/).*|\?.*")
TYPE = "fedflow-sites"


class Small(nn.Linear):
    """Five numbers."""

    def __init__(self) -> None:
        super().__init__(4, 1)


class OneStep(TensorWorkload):
    """One row. silent: the first so many sites never answer."""

    def __init__(self, site: str, silent: int) -> None:
        super().__init__(torch.ones(1, 4), torch.ones(1, 1), loss=nn.functional.mse_loss)
        self.answers = int(site.rpartition("-")[2]) > silent

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterable[tuple[Tensor, Tensor]]:
        if not self.answers:
            threading.Event().wait()
        return super().batches(batch_size, generator)


# -- workers of many sites ---------------------------------------------------------------------------------------------
def run_as_its_site(asked: dict[str, Any], line: Line) -> None:
    configured(asked["flow_run"]["parameters"]["site"])
    run_at_site(asked, line)


def configured(site: str) -> str:
    """This process works for that site now."""
    sites = Path(os.environ[SiteConfig.environment_variable]).parents[1]
    os.environ[SiteConfig.environment_variable] = str(sites / site / "site.yaml")
    return site


async def serve(sites: list[str], at_once: int) -> None:
    """Sites' workers that share this process, the parent of their trainers and their number."""
    slots, servers = asyncio.Semaphore(at_once), list[ForkServer]()

    class OneOfMany(SiteWorker):
        type = TYPE
        runs: ClassVar[str] = "benchmarks.control_plane:run_as_its_site"

        def fork_server(self) -> ForkServer:
            servers[:] = servers or [super().fork_server()]
            return servers[0]

        async def work_on(self, flow_run: FlowRun) -> int:
            async with slots:
                return await super().work_on(flow_run)

    workers = [OneOfMany(work_pool_name=site, name=configured(site)) for site in sites]
    await asyncio.gather(*(worker.start() for worker in workers))


class SharedEnv(PocEnv):
    """PocEnv with few processes for the workers of all sites, each of which holds `at_once` flow runs."""

    def __init__(self, *args: Any, processes: int, at_once: int, **kwargs: Any) -> None:
        super().__init__(*args, site_type=TYPE, **kwargs)
        self.number, self.at_once, self._waiting = processes, at_once, list[str]()

    def _spawn_worker(self, name: str, args: list[str], env: dict[str, str]) -> None:
        if TYPE not in args:
            super()._spawn_worker(name, args, env)
            return
        self._waiting.append(name)
        if len(self._waiting) == len(self.federation.sites):
            for n in range(self.number):
                serving = ["--at-once", str(self.at_once), "--serve", *self._waiting[n :: self.number]]
                super()._spawn_worker(f"sites-{n}", [sys.executable, "-m", "benchmarks.control_plane", *serving], env)


# -- measuring ---------------------------------------------------------------------------------------------------------
def cpu(processes: list[psutil.Process]) -> float:
    """CPU seconds of these, of what they started and of what of that has ended."""
    total = 0.0
    for process in processes:
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = each.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


class Spent:
    """What an environment has taken so far."""

    def __init__(self, env: PocEnv) -> None:
        workers = {p.pid for p in env.processes()}
        coordinator = next(p.pid for p in env.processes() if "coordinator" in p.args)  # type: ignore[operator]
        self.at = time.monotonic()
        self.coordinator = cpu([psutil.Process(coordinator)])
        apart = [c for c in psutil.Process().children() if c.pid not in workers]
        databases = [c for c in apart if "postgres" in c.name()]
        self.server, self.database = cpu([c for c in apart if c not in databases]), cpu(databases)
        log = (env.server.home / "server.log").read_text(errors="replace")
        found = (f"{m[1]} {NAMES.sub('…', m[2])}" for m in REQUEST.finditer(log))
        self.requests = Counter(route for route in found if "/deployments/filter" not in route)


class Probe:
    """How long the API takes to answer one request that reads the database."""

    def __init__(self, env: PocEnv) -> None:
        self._url, self.seconds = f"{env.server.url}/deployments/filter", list[float]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._over.wait(0.2):
                asked = time.monotonic()
                with suppress(httpx.HTTPError):
                    client.post(self._url, json={"limit": 1})
                self.seconds.append(time.monotonic() - asked)

    def milliseconds(self) -> list[float]:
        """Median and 95th percentile."""
        return [
            round(1000 * q, 1) for q in (statistics.median(self.seconds), statistics.quantiles(self.seconds, n=20)[-1])
        ]


def measure(database: str, options: argparse.Namespace, home: Path) -> dict[str, Any]:
    recipe = Recipe.load(
        {
            "name": "no-op",
            "model": "benchmarks.control_plane:Small",
            "workload": {"path": "benchmarks.control_plane:OneStep", "args": {"silent": options.silent}},
            "rounds": options.rounds + 1,
            "training": {"steps": 1},
            "quorum": options.quorum or options.sites,
            "timeouts": {"round_deadline": "30m", "quorum_grace": "30s"},
        }
    )
    shared = {"processes": options.workers, "at_once": options.at_once}
    with SharedEnv(Federation.of(options.sites), home=home, database=database, **shared) as env:
        env.start(recipe)
        with Probe(env) as idle:
            time.sleep(5)
        run = env.execute(recipe)
        await_commit(run, 0)
        before = Spent(env)
        with Probe(env) as probe:
            await_commit(run, options.rounds)
        after = Spent(env)
        run.result()
        return {"database": database, "sites": options.sites, **figures(run, before, after, idle, probe, options)}


def figures(
    run: Run, before: Spent, after: Spent, idle: Probe, probe: Probe, options: argparse.Namespace
) -> dict[str, Any]:
    whole, sending, committing = [], [], []
    for number in range(1, options.rounds + 1):
        plan, manifest = run.journal.plan(number, "train"), run.journal.manifest(number, "train")
        assert plan is not None and manifest is not None and manifest.opened is not None
        closing = next((c for c in run.journal.closings(plan) if c.quorate), None)
        assert closing is not None
        sent = max(attempt.at for attempt in run.journal.attempts(plan))
        whole.append((manifest.committed - manifest.opened).total_seconds())
        sending.append((sent - manifest.opened).total_seconds())
        committing.append((manifest.committed - closing.closed).total_seconds())
    times = options.sites * options.rounds
    took = after.at - before.at
    routes = {
        route: round(n / times, 2) for route, n in (after.requests - before.requests).most_common() if n / times > 0.05
    }
    return {
        "seconds": [round(s, 1) for s in whole],
        "until all were sent": [round(s, 1) for s in sending],
        "after the closing": [round(s, 1) for s in committing],
        "coordinator": {
            "CPU": round(1000 * (after.coordinator - before.coordinator) / times, 1),
            "sending": round(1000 * sum(sending) / times, 1),
            "committing": round(1000 * sum(committing) / times, 1),
        },
        "requests": round(sum((after.requests - before.requests).values()) / times, 1),
        "by route": routes,
        "API": {
            "CPU": round(1000 * (after.server - before.server) / times, 1),
            "processor": round((after.server - before.server) / took, 2),
            "database CPU": round(1000 * (after.database - before.database) / times, 1),
            "ms": probe.milliseconds(),
            "idle ms": idle.milliseconds(),
        },
        "updates": len(manifest.contributors),
        "excluded": dict(manifest.excluded),
    }


def table(measured: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """Markdown, with its heading: a line a database."""
    head = [
        "database",
        "a round, s",
        "coordinator's CPU, ms a site",
        "sending, ms a site",
        "after the closing, ms a site",
    ]
    head += [
        "requests a site",
        "API's CPU, ms a site",
        "of a processor",
        "database's CPU, ms a site",
        "an answer takes, ms (95 %)",
        "idle, ms (95 %)",
        "excluded",
    ]
    rows = []
    for m in measured:
        own, api = m["coordinator"], m["API"]
        row = [m["database"], " / ".join(map(str, m["seconds"])), own["CPU"], own["sending"], own["committing"]]
        row += [
            m["requests"],
            api["CPU"],
            api["processor"],
            api["database CPU"],
            *("{} ({})".format(*api[k]) for k in ("ms", "idle ms")),
        ]
        rows.append([*map(str, row), ", ".join(m["excluded"])])
    silent = f" --silent {options.silent} --quorum {options.quorum}" if options.silent else ""
    silent += f" --databases {' '.join(options.databases)}"
    about = (
        f"# Control plane\n\n`python -m benchmarks.control_plane --sites {options.sites}{silent} --rounds {options.rounds} "
        f"--out docs/tables`: rounds without training over {options.sites} sites whose workers share {options.workers} processes, "
        f"with server and database, on one machine with {os.cpu_count()} cores.\n\n"
    )
    return about + markdown(head, rows)


def draw(axes: Any, measured: Sequence[dict[str, Any]]) -> None:
    """Of a round, by database: until all flow runs were sent, until the closing, and after it."""
    names, done = [m["database"] for m in measured], [0.0] * len(measured)
    parts = {
        "until all are sent": [statistics.mean(m["until all were sent"]) for m in measured],
        "sites at work": [
            statistics.mean(m["seconds"])
            - statistics.mean(m["until all were sent"])
            - statistics.mean(m["after the closing"])
            for m in measured
        ],
        "after the closing": [statistics.mean(m["after the closing"]) for m in measured],
    }
    for part, seconds in parts.items():
        axes.bar(names, seconds, bottom=done, width=0.4, label=part)
        done = [a + b for a, b in zip(done, seconds, strict=True)]
    axes.set(ylabel="seconds of a round")
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes with the workers of all sites")
    parser.add_argument("--at-once", type=int, default=4, help="trainings that such a process holds")
    parser.add_argument("--silent", type=int, default=0, help="sites that never answer")
    parser.add_argument("--quorum", type=int, help="default: all sites")
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgres"])
    parser.add_argument("--out", type=Path, metavar="DIR", help="write a table and its plot there: control-plane.md")
    parser.add_argument("--serve", nargs="+", metavar="SITE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve, options.at_once))
        return
    QUIET["PREFECT_LOGGING_SERVER_LEVEL"] = "INFO"  # its access log is what counts the requests
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    measured: list[dict[str, Any]] = []
    for database in options.databases:
        with tempfile.TemporaryDirectory() as home:
            measured.append(measure(database, options, Path(home)))
        print(json.dumps(measured[-1]), flush=True)
    print(text := table(measured, options))
    if options.out:
        name = "-".join(
            ["control-plane"] + ["silent"] * bool(options.silent) + ["sqlite"] * (options.databases == ["sqlite"])
        )
        write(options.out, name, text, lambda axes: draw(axes, measured))


if __name__ == "__main__":
    main()
