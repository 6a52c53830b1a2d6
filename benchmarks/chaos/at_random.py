"""Something is killed every few seconds while runs go on: every round commits, nothing leaks, no memory grows."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.chaos.ground import GONE, Ground, Trial
from tests.deployed import Worker

PAUSE = (2.0, 8.0)  # seconds between two blows
ROUNDS = 10  # of a run
GROWTH = 1.15  # of a role's memory, median of the last third to that of the first, that is still called flat


def at_random(ground: Ground, algorithms: Sequence[str], *, minutes: float, seed: int) -> int:
    """Print what was done and found; 1 where something did not hold."""
    until = time.monotonic() + 60 * minutes
    fists, memory = Fists(ground, seed), Memory(ground)
    problems: list[str] = []
    runs = rounds = 0
    while time.monotonic() < until:
        algorithm = algorithms[runs % len(algorithms)]
        trial = Trial(ground, algorithm, f"random-{runs}")
        trial.start(rounds=ROUNDS, attempts=10, timeouts={"round_deadline": "10min"})
        with fists.beating(), memory.watched():
            trial.finish(resumes=1000)
        ground.heal()
        verdict = trial.judge()
        rounds += len(trial.journal.committed())
        problems += [f"{trial.name}: {why}" for why in verdict.why]
        runs += 1
    problems += leaks(ground) + memory.growing()
    report(fists.done, memory, f"{runs} runs, {rounds} rounds committed of {ROUNDS * runs}")
    for problem in problems:
        print(problem)
    return int(bool(problems) or rounds != ROUNDS * runs)


class Fists:
    """Hits something every few seconds, and starts it again."""

    def __init__(self, ground: Ground, seed: int) -> None:
        self.ground, self._random = ground, random.Random(seed)
        self.done: Counter[str] = Counter()

    def blows(self) -> dict[str, Callable[[], object]]:
        """Name -> what it does. Everything that it stops is started again."""
        ground = self.ground
        site = self._random.choice(list(ground.sites.values()))

        def hit(worker: Worker, how: Callable[[Worker], None]) -> Callable[[], object]:
            def blow() -> None:
                how(worker)
                if not worker.running:
                    worker.start()

            return blow

        found: dict[str, Callable[[], object]] = {
            "trainer": hit(site, Worker.kill_at_work),
            "a site's worker": hit(site, Worker.kill),
            "a site's worker, SIGTERM": hit(site, Worker.stop),
            "a site's machine": hit(site, Worker.lose),
            "coordinator": hit(ground.coordinator, Worker.kill_at_work),
            "the coordinator's worker": hit(ground.coordinator, Worker.kill),
            "the coordinator's machine": hit(ground.coordinator, Worker.lose),
            "API": ground.prefect.restart,
            "store": ground.s3.restart,
        }
        return found | ({"PostgreSQL": ground.postgres.restart} if ground.postgres is not None else {})

    def beating(self) -> _Thread:
        """Until the end of a `with` block."""
        return _Thread(self._beat)

    def _beat(self, over: threading.Event) -> None:
        while not over.wait(self._random.uniform(*PAUSE)):
            name, blow = self._random.choice(sorted(self.blows().items(), key=lambda item: item[0]))
            blow()
            self.done[name] += 1


class _Thread:
    """Runs `work(over)` while a `with` block runs; what it raises is raised at the block's end."""

    def __init__(self, work: Callable[[threading.Event], None]) -> None:
        self._over, self._work = threading.Event(), work
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._work(self._over)
        except Exception as error:
            self._error = error

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise self._error


class Memory:
    """MiB resident of each worker with its tools, and of each process of a flow run, by role, every two seconds."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.of: defaultdict[str, list[float]] = defaultdict(list)

    def watched(self) -> _Thread:
        return _Thread(self._watch)

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(2):
            for role, workers in {"site": self.ground.sites.values(), "coordinator": [self.ground.coordinator]}.items():
                for worker in workers:
                    busy = worker.at_work()
                    resting = [p for p in worker.processes() if p not in busy]
                    self.of[f"{role}'s worker"] += [sum(filter(None, map(resident, resting)))] if resting else []
                    self.of[f"{role}'s flow runs"] += filter(None, map(resident, busy))

    def thirds(self, role: str) -> tuple[float, float]:
        """Medians of the first and of the last third."""
        third = max(len(self.of[role]) // 3, 1)
        return statistics.median(self.of[role][:third]), statistics.median(self.of[role][-third:])

    def growing(self) -> list[str]:
        found = []
        for role in sorted(self.of):
            if len(self.of[role]) >= 30 and (m := self.thirds(role))[1] > GROWTH * m[0]:
                found.append(f"{role}: memory grows, {m[0]:.0f} MiB in the first third, {m[1]:.0f} MiB in the last")
        return found


def resident(process: psutil.Process) -> float | None:
    """None of one that has ended."""
    with suppress(psutil.Error):
        return float(process.memory_info().rss) / 2**20
    return None


def leaks(ground: Ground) -> list[str]:
    """Processes and temporary files that are left when no run is."""
    time.sleep(GONE)
    found = [f"process {p.pid} of {w.name} is left" for w in ground.deployed.workers for p in w.at_work()]
    files = [p for p in ground.temporary.rglob("*") if p.is_file() and "locks" not in p.parent.name]
    return found + [f"a temporary file is left: {path}" for path in files[:20]]


def report(done: Counter[str], memory: Memory, told: str) -> None:
    blows = Table(box=None, pad_edge=False, header_style="bold")
    blows.add_column("killed")
    blows.add_column("times", justify="right")
    for name, times in sorted(done.items()):
        blows.add_row(name, str(times))
    held = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("memory of", "first third, MiB", "last third, MiB", "most"):
        held.add_column(name, justify="left" if name == "memory of" else "right")
    for role in sorted(memory.of):
        if memory.of[role]:
            first, last = memory.thirds(role)
            held.add_row(role, f"{first:.0f}", f"{last:.0f}", f"{max(memory.of[role]):.0f}")
    console = Console(highlight=False)
    console.print(told)
    console.print(blows)
    console.print(held)
