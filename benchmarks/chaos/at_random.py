"""Something is killed every few seconds while runs go on: every round commits, nothing leaks, no memory grows."""

from __future__ import annotations

import random
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos.ground import GONE, Ground, Trial
from benchmarks.tables.common import markdown, write
from tests.deployed import Worker

PAUSE = (2.0, 8.0)  # seconds between two blows, where an undisturbed run of two rounds takes `UNDISTURBED`
UNDISTURBED = 15.0  # seconds; on a slower machine the pauses are longer in proportion, or nothing would ever be done
ROUNDS = 10  # of a run
ABOUT = f"""runs of {ROUNDS} rounds over six sites, one after the other, FedAvg, SCAFFOLD and DiLoCo in turn. Every {PAUSE[0]:g} to {PAUSE[1]:g} seconds
(more, in proportion, where an undisturbed run of two rounds takes more than {UNDISTURBED:g} seconds) something is killed and started again, drawn at random; a training that was interrupted is resumed. The last site's worker is never
stopped, nor is the coordinator's in the second half: the memory of what is always new would tell nothing."""
WARM = 1 / 60  # hours after which a worker that was started has imported all
ENOUGH = 5 / 60  # hours over which a slope tells something
GROWTH = 1.15  # of a role's memory, median of the last third to that of the first, that is still called flat


def at_random(ground: Ground, algorithms: Sequence[str], *, minutes: float, seed: int, out: Path | None = None) -> int:
    """Print what was done and found, and write it and a plot of the memory into the folder `out`; 1 where something did not hold."""
    slower = max(1.0, undisturbed(ground, algorithms[0]) / UNDISTURBED)
    until = time.monotonic() + 60 * minutes
    fists, memory = Fists(ground, seed, until - 30 * minutes, slower), Memory(ground)
    problems: list[str] = []
    runs = rounds = 0
    while time.monotonic() < until:
        algorithm = algorithms[runs % len(algorithms)]
        trial = Trial(ground, algorithm, f"random-{runs}")
        trial.start(rounds=ROUNDS, attempts=10, timeouts={"round_deadline": "10m"})
        with fists.beating(), memory.watched():
            trial.finish(resumes=1000)
        ground.heal()
        verdict = trial.judge()
        rounds += len(trial.journal.committed())
        problems += [f"{trial.name}: {why}" for why in verdict.why]
        runs += 1
        told = "; ".join(verdict.why) or f"{len(trial.journal.committed())} rounds"
        print(f"{trial.name}: {told}, resumed {trial.resumes} times", file=sys.stderr, flush=True)
    leaked = leaks(ground, runs + 2)  # those that `undisturbed` made
    problems += leaked + memory.growing()
    if rounds != ROUNDS * runs:
        problems.append(f"{ROUNDS * runs - rounds} rounds did not commit")
    told = (
        f"{runs} runs, {rounds} rounds committed of {ROUNDS * runs}, {len(leaked)} processes and temporary files left, "
        f"and {len(locks(ground))} files of locks, at most one a site and run; "
    )
    told += f"a blow every {PAUSE[0] * slower:.0f} to {PAUSE[1] * slower:.0f} s"
    told += "" if problems else "; every run has the bytes of an undisturbed one"
    text = report(fists.done, memory, told, problems)
    print(text)
    if out is not None:
        ways = f"--minutes {minutes:g} --seed {seed} --out docs/tables"
        write(out, "soak", f"# Killed at random\n\n`python -m benchmarks.chaos {ways}`: {ABOUT}\n\n{text}", memory.draw)
    return int(bool(problems))


def undisturbed(ground: Ground, algorithm: str) -> float:
    """Seconds that a run of two rounds takes, after one that warms everything up."""
    for name in ("warm", "undisturbed"):
        trial = Trial(ground, algorithm, name)
        trial.start()
        trial.finish(resumes=0)
    assert trial.verdict.lost is not None
    return trial.verdict.lost


class Fists:
    """Hits something every few seconds, `slower` times as many, and starts it again. The last site's worker is never stopped, nor
    is the coordinator's after `half` (of `time.monotonic`): the memory of what is always new would tell nothing."""

    def __init__(self, ground: Ground, seed: int, half: float, slower: float) -> None:
        self.ground, self._random, self._half, self._slower = ground, random.Random(seed), half, slower
        self.done: Counter[str] = Counter()

    def blows(self) -> dict[str, Callable[[], object]]:
        """Name -> what it does. Everything that it stops is started again."""
        ground = self.ground
        *others, spared = ground.sites.values()
        site, trainers = self._random.choice(others), self._random.choice([*others, spared])

        def hit(worker: Worker, how: Callable[[Worker], None]) -> Callable[[], object]:
            def blow() -> None:
                how(worker)
                if not worker.running:
                    worker.start()

            return blow

        found: dict[str, Callable[[], object]] = {
            "trainer": hit(trainers, Worker.kill_at_work),
            "a site's worker": hit(site, Worker.kill),
            "a site's worker, SIGTERM": hit(site, Worker.stop),
            "a site's machine": hit(site, Worker.lose),
            "coordinator": hit(ground.coordinator, Worker.kill_at_work),
            "API": ground.prefect.restart,
            "store": ground.s3.restart,
        }
        if time.monotonic() < self._half:
            found["the coordinator's worker"] = hit(ground.coordinator, Worker.kill)
            found["the coordinator's machine"] = hit(ground.coordinator, Worker.lose)
        return found | ({"PostgreSQL": ground.postgres.restart} if ground.postgres is not None else {})

    def beating(self) -> _Thread:
        """Until the end of a `with` block."""
        return _Thread(self._beat)

    def _beat(self, over: threading.Event) -> None:
        while not over.wait(self._slower * self._random.uniform(*PAUSE)):
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
        self.ground, self._began = ground, time.monotonic()
        *others, self._spared = ground.sites.values()
        self._roles = {"sites": others, f"{self._spared.name}, never stopped": [self._spared]}
        self._roles["coordinator"] = [ground.coordinator]
        self.of: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)  # role -> (hours, MiB)
        self._warm: dict[str, float] = {}  # role of workers -> hours when its newest one had imported all
        self._pids: dict[str, int | None] = {}

    def watched(self) -> _Thread:
        return _Thread(self._watch)

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(2):
            at = (time.monotonic() - self._began) / 3600
            for role, workers in self._roles.items():
                for worker in workers:
                    if worker.pid != self._pids.get(worker.name):
                        self._pids[worker.name], self._warm[f"worker: {role}"] = worker.pid, at + WARM
                    busy, resting = worker.at_work(), worker.resting()
                    whole = [sum(filter(None, map(resident, resting)))] if resting else []
                    self.of[f"worker: {role}"] += [(at, mebibytes) for mebibytes in whole]
                    self.of[f"flow runs: {role}"] += [(at, m) for m in map(resident, busy) if m]

    def thirds(self, role: str) -> tuple[float, float]:
        """Medians of the first and of the last third."""
        found = [mebibytes for _, mebibytes in self.of[role]]
        third = max(len(found) // 3, 1)
        return statistics.median(found[:third]), statistics.median(found[-third:])

    def slope(self, role: str) -> float | None:
        """MiB an hour, by least squares, of workers since the last start of one; None where that is too short to say."""
        found = [(at, mebibytes) for at, mebibytes in self.of[role] if at >= self._warm.get(role, 0.0)]
        if not found or found[-1][0] - found[0][0] < ENOUGH:
            return None
        hours, mebibytes = zip(*found, strict=True)
        return statistics.linear_regression(hours, mebibytes).slope

    def growing(self) -> list[str]:
        found = []
        for role in sorted(self.of):
            if len(self.of[role]) >= 30 and (m := self.thirds(role))[1] > GROWTH * m[0]:
                found.append(f"{role}: memory grows, {m[0]:.0f} MiB in the first third, {m[1]:.0f} MiB in the last")
        return found

    def draw(self, axes: Any) -> None:
        for role in sorted(self.of):
            if self.of[role]:
                axes.plot(
                    [60 * h for h, _ in self.of[role]], [m for _, m in self.of[role]], ".", markersize=2, label=role
                )
        axes.set(xlabel="minutes", ylabel="MiB resident", ylim=(0, None))
        axes.legend(markerscale=4)


def resident(process: psutil.Process) -> float | None:
    """None of one that has ended."""
    with suppress(psutil.Error):
        return float(process.memory_info().rss) / 2**20
    return None


def locks(ground: Ground) -> list[Path]:
    """The files of locks besides the workers' own: those of trainers that were killed are left, at most one a site and run."""
    return [p for p in ground.temporary.glob("fedflow-locks-*/*") if not p.name.startswith("worker-")]


def leaks(ground: Ground, runs: int) -> list[str]:
    """Processes and temporary files that are left when no run is, and more locks than one a site and run."""
    time.sleep(GONE)
    found = [f"process {p.pid} of {w.name} is left" for w in ground.deployed.workers for p in w.at_work()]
    files = [p for p in ground.temporary.rglob("*") if p.is_file() and "locks" not in p.parent.name]
    found += [f"a temporary file is left: {path}" for path in files[:20]]
    if (left := len(locks(ground))) > (most := len(ground.sites) * runs):
        found.append(f"{left} files of locks are left, expected at most one a site and run: {most}")
    return found


def report(done: Counter[str], memory: Memory, told: str, problems: Sequence[str]) -> str:
    """As Markdown."""
    rows = []
    for role in sorted(role for role in memory.of if memory.of[role]):
        first, last = memory.thirds(role)
        most = max(mebibytes for _, mebibytes in memory.of[role])
        slope = "–" if (found := memory.slope(role)) is None else f"{found:+.0f}"
        rows.append([role, f"{first:.0f}", f"{last:.0f}", f"{most:.0f}", slope])
    head = ["memory of", "first third, MiB", "last third, MiB", "most, MiB", "slope since the last start, MiB an hour"]
    blows = markdown(["killed", "times"], [[name, str(times)] for name, times in sorted(done.items())])
    wrong = "".join(f"- {problem}\n" for problem in problems)
    return "\n".join(filter(None, [f"{told}.\n", wrong, blows, markdown(head, rows)]))
