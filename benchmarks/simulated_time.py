"""What a quorum saves where speeds are heavy-tailed: accuracy over simulated time. Digits, 100 sites.

`python -m benchmarks.simulated_time` writes docs/tables/simulated-time.md and .svg. With `--asynchronous` it compares FedBuff with
synchronous rounds where one of ten sites is 8 times slower (asynchronous.md and .svg), with `--week` it measures how long a week of a
thousand sites takes to simulate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.tables.common import markdown, spread, tell, write
from fedflow.errors import RoundError
from fedflow.memory import processors
from fedflow.recipe import Recipe
from fedflow.simulation.clock import EPOCH
from fedflow.simulation.engine import simulate
from fedflow.simulation.tables import Row, Table
from fedflow.simulation.traces import Diurnal, Generated, LogNormal, Pareto
from fedflow.store.journal import Journal
from fedflow.store.records import Manifest

ROOT = Path(__file__).parents[1]
RULES: Mapping[str, Mapping[str, Any]] = {
    "wait for all": {},
    "quorum 80 %": {"quorum": 80},
    "quorum 80 %, late updates carried": {"quorum": 80, "late": "carry"},
}
BUFFER = 5
ASYNCHRONOUS: Mapping[str, Mapping[str, Any]] = {
    "synchronous rounds": {"algorithm": {"kind": "fedavg", "weight_by": "uniform"}, "rounds": 60},
    f"FedBuff, K = {BUFFER}": {
        "algorithm": "fedbuff",
        "schedule": {"kind": "buffered", "size": BUFFER, "max_staleness": 20},
        "rounds": 100,
    },
}
LONGEST_ROUND = timedelta(hours=2)
"""Of a week's."""
Course = Sequence[tuple[float, float]]
"""(simulated seconds, accuracy) after every round."""


def recipe(name: str, seed: int, **more: Any) -> Recipe:
    fields: dict[str, Any] = {
        "name": name,
        "model": "benchmarks.tables.digits:Logistic",
        "workload": {"path": "benchmarks.tables.digits:Similar", "args": {"similarity": 0.1, "seed": seed}},
        "evaluation": "benchmarks.tables.digits:HeldOut",
        "seed": seed,
        "training": {"steps": 10, "batch_size": 5, "optimizer": {"lr": 0.1}},
        "timeouts": {"round_deadline": "2d", "quorum_grace": 0},
        "attempts": 1,
    }
    return Recipe.load(fields | more)


def courses(args: argparse.Namespace) -> dict[str, list[Course]]:
    """Of every rule, a course for each seed."""
    sites = [f"site-{i:03}" for i in range(1, 101)]
    found: dict[str, list[Course]] = {}
    for rule, terms in RULES.items():
        for seed in args.seeds:
            trace = Generated(seed=seed, seconds_per_step=Pareto(least=1, alpha=args.alpha))
            wanted = recipe("digits", seed, rounds=args.rounds, **terms)
            began = time.monotonic()
            found.setdefault(rule, []).append(
                course(simulate(wanted, sites, trace=trace, workers=args.workers), wanted.rounds)
            )
            tell(f"{rule}, seed {seed}: {time.monotonic() - began:.0f} s")
    return found


def asynchronous(args: argparse.Namespace) -> dict[str, list[Course]]:
    """The same of synchronous rounds and of FedBuff: ten sites at 1 s a step, but the first at 8 s."""
    sites = [f"site-{i:02}" for i in range(1, 11)]
    trace = Table(rows=tuple(Row(site=s, seconds_per_step=8 if s == sites[0] else 1) for s in sites))
    found: dict[str, list[Course]] = {}
    for rule, terms in ASYNCHRONOUS.items():
        for seed in args.seeds:
            wanted = recipe("digits", seed, **terms)
            journal = simulate(wanted, sites, trace=trace, workers=args.workers)
            found.setdefault(rule, []).append(course(journal, wanted.rounds))
            tell(f"{rule}, seed {seed}")
    return found


def asynchronous_table(found: Mapping[str, Sequence[Course]], args: argparse.Namespace) -> str:
    about = (
        f"# FedBuff and synchronous rounds\n\nSimulated minutes to {args.target:.0%} accuracy on held-out digits: median (least … most) over "
        f"seeds {', '.join(map(str, args.seeds))}. Ten sites, similarity 10 %, logistic regression, 10 steps a time; a step takes 1 s, at "
        "one site 8 s. Updates weigh the same, and FedBuff's by their age.\n\n"
    )
    return about + markdown(["", *head(args.target)], rows(found, args.target))


def course(journal: Journal, rounds: int) -> Course:
    points = []
    for round in range(rounds):
        manifest, evaluation = journal.manifest(round, "train"), journal.evaluation(round)
        assert manifest and evaluation and evaluation.metrics["accuracy"] is not None
        points.append(((manifest.committed - EPOCH).total_seconds(), evaluation.metrics["accuracy"]))
    return points


def reached(course: Course, target: float) -> tuple[int, float] | None:
    """(rounds, simulated minutes) to the target."""
    return next(((i + 1, at / 60) for i, (at, accuracy) in enumerate(course) if accuracy >= target), None)


def table(found: Mapping[str, Sequence[Course]], args: argparse.Namespace) -> str:
    about = (
        f"# Simulated time\n\nSimulated minutes to {args.target:.0%} accuracy on held-out digits: median (least … most) over seeds "
        f"{', '.join(map(str, args.seeds))}. 100 sites, similarity 10 %, logistic regression, 10 steps a round; a site's seconds "
        f"per step are Pareto (least 1 s, alpha {args.alpha:g}), drawn once a site. No grace after the quorum.\n\n"
    )
    return about + markdown(["a round closes", *head(args.target)], rows(found, args.target))


def head(target: float) -> list[str]:
    return [f"minutes to {target:.0%}", "rounds", "accuracy at the end, %"]


def rows(found: Mapping[str, Sequence[Course]], target: float) -> list[list[str]]:
    made = []
    for rule, all_courses in found.items():
        there = [r for c in all_courses if (r := reached(c, target))]
        minutes, rounds = [m for _, m in there], [float(n) for n, _ in there]
        finals = [100 * c[-1][1] for c in all_courses]
        cells = (spread(minutes), spread(rounds, 0)) if len(there) == len(all_courses) else ("not reached", "–")
        made.append([rule, *cells, spread(finals)])
    return made


def draw(axes: Any, found: Mapping[str, Sequence[Course]], args: argparse.Namespace) -> None:
    for i, (rule, all_courses) in enumerate(found.items()):
        for j, c in enumerate(all_courses):
            minutes, accuracy = [at / 60 for at, _ in c], [100 * value for _, value in c]
            axes.step(minutes, accuracy, where="post", color=f"C{i}", lw=1.4, alpha=0.8, label=None if j else rule)
    axes.axhline(100 * args.target, color="#888888", lw=1, ls=":")
    axes.set_xscale("log")
    axes.set_xlabel("simulated minutes")
    axes.set_ylabel("accuracy on held-out digits, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")


def week(args: argparse.Namespace) -> None:
    """A thousand sites that are there for half of their day, 40 asked a round, 20 close it, until a week is over."""
    sites = [f"site-{i:04}" for i in range(1, 1001)]
    trace = Generated(
        seconds_per_step=LogNormal(median=30, sigma=1),
        download_mbit=LogNormal(median=20, sigma=1),
        upload_mbit=LogNormal(median=5, sigma=1),
        drop=0.05,
        availability=Diurnal(),
    )
    wanted = recipe(
        "week",
        0,
        rounds=100_000,
        workload={"path": "benchmarks.tables.digits:Similar", "args": {"similarity": 1.0}},
        schedule={"kind": "sampled", "sites_per_round": 20, "over_selection": 2.0},
        timeouts={"round_deadline": LONGEST_ROUND, "quorum_grace": 0, "run_timeout": timedelta(days=args.days)},
    )
    committed: list[Manifest] = []
    began = time.monotonic()
    try:
        simulate(wanted, sites, trace=trace, workers=args.workers, on_commit=committed.append)
    except RoundError as error:
        tell(str(error))  # the week is over
    seconds, last = time.monotonic() - began, committed[-1]
    counted = sum(len(m.contributors) for m in committed)
    tell(
        f"{(last.committed - EPOCH) / timedelta(days=1):.2f} days: {len(committed)} rounds, {counted} updates in {seconds:.0f} s, "
        f"{1000 * seconds / len(committed):.0f} ms a round, with {args.workers} processes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulated_time", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--target", type=float, default=0.88, help="accuracy to reach")
    parser.add_argument("--alpha", type=float, default=1.2, help="of the Pareto distribution of seconds per step")
    parser.add_argument("--workers", type=int, default=processors())
    parser.add_argument("--out", type=Path, default=ROOT / "docs/tables", help="folder of the table and its plot")
    parser.add_argument("--asynchronous", action="store_true", help="FedBuff beside synchronous rounds; seeds 0 to 4")
    parser.add_argument("--week", action="store_true", help="how long a week of a thousand sites takes to simulate")
    parser.add_argument("--days", type=float, default=7.0)
    args = parser.parse_args()
    if args.days <= LONGEST_ROUND / timedelta(days=1):
        parser.error(f"--days: found {args.days}, expected more than a round may take, {LONGEST_ROUND}")
    if args.week:
        week(args)
        return
    args.seeds = args.seeds or list(range(5 if args.asynchronous else 3))
    if args.asynchronous:
        found = asynchronous(args)
        write(args.out, "asynchronous", asynchronous_table(found, args), lambda axes: draw(axes, found, args))
        return
    found = courses(args)
    write(args.out, "simulated-time", table(found, args), lambda axes: draw(axes, found, args))


if __name__ == "__main__":
    main()
