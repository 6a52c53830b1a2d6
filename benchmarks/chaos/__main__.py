"""What a run survives: each fault of a list, on a Prefect server with PostgreSQL, an S3 store and fedflow's own workers.

    python -m benchmarks.chaos [--case PATTERN...] [--algorithm NAME...] [--database sqlite] [--continue] [--out DIR]
    python -m benchmarks.chaos --minutes N [--seed N] [--out DIR]     # something is killed every few seconds, for so long
    python -m benchmarks.chaos --list

A case holds where its run ends as it should, the model and the state have the bytes of a reference run with the same
contributors in every round, only the sites that the case names trained more than once, and ten seconds later (and as long as the API was gone) no process and
no flow run of it is left. Exit code 1 where a case does not hold. Each algorithm has servers and workers of its own, on free
ports of 127.0.0.1, which its cases share; `--at-once` algorithms are tried side by side, since a case mostly waits. Each
trial that has ended is a line of `--results`, and the logs of one that does not hold are beside it: `--continue` tries only what does
not hold there. The clock cases need Debian's package `faketime`, and are left out, and named, without it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.chaos.at_random import at_random
from benchmarks.chaos.cases import CASES, Case
from benchmarks.chaos.ground import ALGORITHMS, Ground, Trial, Verdict
from benchmarks.chaos.results import Found, Results, draw, table
from benchmarks.tables.common import ROOT, write


def read(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; `cases` are those that were asked for. Ends the process, with a line, where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="the cases")
    parser.add_argument("--case", nargs="+", default=["*"], metavar="PATTERN", help="only these, as `cancel-*`")
    parser.add_argument("--algorithm", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--database", choices=("postgres", "sqlite"), default="postgres", help="of the Prefect server")
    parser.add_argument("--at-once", type=int, default=len(ALGORITHMS), metavar="N", help="algorithms side by side")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/chaos.jsonl", metavar="FILE")
    parser.add_argument("--continue", action="store_true", dest="goes_on", help="only what does not hold in --results")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write chaos.md, chaos-sqlite.md or soak.md, and its plot, there"
    )
    parser.add_argument("--minutes", type=float, help="kill at random for so long, in place of the cases")
    parser.add_argument("--seed", type=int, default=1, help="of what is killed when")
    parser.add_argument("--lane", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    unknown = [pattern for pattern in options.case if not any(fnmatch(name, pattern) for name in CASES)]
    if unknown:
        parser.error(f"--case: found {unknown}, expected names or patterns of those that --list has")
    options.cases = [case for case in CASES.values() if any(fnmatch(case.name, pattern) for pattern in options.case)]
    return options


def main(args: Sequence[str] | None = None) -> int:
    options, began = read(args), time.time()
    # in a shell's background SIGINT is ignored; Prefect's workers stop by it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if options.list:
        print("\n".join(f"{case.name:32}{case.what}" for case in CASES.values()))
        return 0
    if options.minutes is not None:
        with Ground(options.database, sites=6) as ground:
            return at_random(ground, options.algorithm, minutes=options.minutes, seed=options.seed, out=options.out)
    results = Results(options.results, options.database, since=0.0 if options.goes_on else began)
    if options.lane:
        _ends_with_stdin()
        run_cases(options.algorithm[0], options.cases, results)
        return 0
    for case in options.cases:
        if missing := case.needs(options.database):
            print(f"{case.name}: left out, {missing}", file=sys.stderr)
    options.cases = [case for case in options.cases if not case.needs(options.database)]
    left = {a: [c for c in options.cases if not _holds(results.found(), c, a)] for a in options.algorithm}
    side_by_side({algorithm: cases for algorithm, cases in left.items() if cases}, options)
    return report(results.found(), options)


def report(found: Found, options: argparse.Namespace) -> int:
    """The table, and 1 where a case does not hold."""
    names = [case.name for case in options.cases if any((case.name, a) in found for a in options.algorithm)]
    print(text := table(found, names, options.algorithm))
    if options.out:
        name, server = PAGES[options.database]
        page = PAGE.format(asked=_asked(options), server=server, table=text)
        write(options.out, name, page, lambda axes: draw(axes, found, names, options.algorithm))
    return 0 if all(_holds(found, case, a) for case in options.cases for a in options.algorithm) else 1


def _asked(options: argparse.Namespace) -> str:
    """The command line, as far as it decides what the page has."""
    database = [] if options.database == "postgres" else ["--database", options.database]
    cases = [] if options.case == ["*"] else ["--case", *options.case]
    return shlex.join(["python", "-m", "benchmarks.chaos", *database, *cases, "--out", "docs/tables"])


PAGES = {"postgres": ("chaos", "PostgreSQL"), "sqlite": ("chaos-sqlite", "SQLite")}
PAGE = """# The fault matrix

`{asked}`: two rounds over three sites, on a Prefect server with {server}, SeaweedFS as S3 and
fedflow's workers, on one machine, the algorithms side by side. Seconds lost: more than an undisturbed run took there (a run of
some 15 s on a machine whose load comes and goes: some seconds more or less say nothing). Same bytes: model and state are those of
`simulate()` with the same contributors.

{table}"""


def _holds(found: Found, case: Case, algorithm: str) -> bool:
    verdict = found.get((case.name, algorithm))
    return verdict is not None and verdict.holds


# -- algorithms side by side -------------------------------------------------------------------------------------------
def side_by_side(left: Mapping[str, Sequence[Case]], options: argparse.Namespace) -> None:
    """Try what is left, each algorithm in a process of its own."""
    lanes: list[subprocess.Popen[bytes]] = []

    def lane(algorithm: str) -> None:
        command = [sys.executable, "-m", "benchmarks.chaos", "--lane", "--algorithm", algorithm]
        command += ["--database", options.database, "--results", str(options.results.resolve())]
        command += ["--case", *(case.name for case in left[algorithm])]
        lanes.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True))
        lanes[-1].wait()

    with ThreadPoolExecutor(max(1, options.at_once)) as pool:
        try:
            for done in [pool.submit(lane, algorithm) for algorithm in left]:
                done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in lanes:
                process.stdin.close()  # type: ignore[union-attr]


def _ends_with_stdin() -> None:
    """However whoever started this process ends, it stops its servers and workers, and ends too."""

    def watch() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def run_cases(algorithm: str, cases: Sequence[Case], results: Results) -> None:
    """One after the other; first an undisturbed run, to compare seconds with."""
    first = CASES["undisturbed"]
    with Ground(results.database) as ground:
        trial(ground, first, algorithm, "warm-")
        for done, case in enumerate([first, *(c for c in cases if c is not first)]):
            began = time.monotonic()
            verdict = trial(ground, case, algorithm)
            if case is first and verdict.lost is not None:
                ground.seconds[algorithm], verdict.lost = verdict.lost, 0.0
            if not verdict.holds:
                ground.keep_logs(results.logs(case.name, algorithm))
            results.keep(case.name, algorithm, verdict)
            how = "holds" if verdict.holds else f"DOES NOT HOLD: {'; '.join(verdict.why)}"
            took = f"[{algorithm} {done}/{len(cases)}, {time.monotonic() - began:.0f} s]"
            print(took, f"{case.name}: {how}", verdict.notes or "", file=sys.stderr, flush=True)


def trial(ground: Ground, case: Case, algorithm: str, prefix: str = "") -> Verdict:
    """One case for one algorithm."""
    trial = Trial(ground, algorithm, f"{prefix}{case.name}")
    try:
        case.act(trial)
        verdict = trial.judge()
        extra = sorted(verdict.retrained.keys() - set(case.retrains))
        trial.expect(not extra, f"{', '.join(extra)} trained again")
    except Exception as error:
        verdict = trial.give_up(error)
        ground.begin_anew()
    ground.heal()
    ground.deployed.await_workers()  # after an outage their heartbeats come late, too
    return verdict


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
