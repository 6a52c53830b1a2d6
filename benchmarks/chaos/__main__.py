"""What a run survives: each fault of a list, on a Prefect server with PostgreSQL, an S3 store and fedflow's own workers.

    python -m benchmarks.chaos [--case PATTERN...] [--algorithm NAME...] [--database sqlite] [--json FILE]
    python -m benchmarks.chaos --minutes N [--seed N]     # something is killed every few seconds, for so long
    python -m benchmarks.chaos --list

A case holds where its run ends as it should, the model and the state have the bytes of a reference run with the same
contributors in every round, only the sites that the case names trained more than once, and ten seconds later no process and
no flow run of it is left. Exit code 1 where a case does not hold. Servers listen on free ports of 127.0.0.1; the
clock cases need Debian's package `faketime`, and are left out, and named, without it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.chaos.at_random import at_random
from benchmarks.chaos.cases import CASES, Case
from benchmarks.chaos.ground import ALGORITHMS, Ground, Trial, Verdict


def read(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; `cases` are those that were asked for. Ends the process, with a line, where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="the cases")
    parser.add_argument("--case", nargs="+", default=["*"], metavar="PATTERN", help="only these, as `cancel-*`")
    parser.add_argument("--algorithm", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--database", choices=("postgres", "sqlite"), default="postgres", help="of the Prefect server")
    parser.add_argument("--minutes", type=float, help="kill at random for so long, in place of the cases")
    parser.add_argument("--seed", type=int, default=1, help="of what is killed when")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(args)
    unknown = [pattern for pattern in options.case if not any(fnmatch(name, pattern) for name in CASES)]
    if unknown:
        parser.error(f"--case: found {unknown}, expected names or patterns of those that --list has")
    options.cases = [case for case in CASES.values() if any(fnmatch(case.name, pattern) for pattern in options.case)]
    return options


def main() -> int:
    options = read()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background: Prefect's workers stop by it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.list:
        print("\n".join(f"{case.name:32}{case.what}" for case in CASES.values()))
        return 0
    with Ground(options.database) as ground:
        if options.minutes is not None:
            return at_random(ground, options.algorithm, minutes=options.minutes, seed=options.seed)
        results = run_cases(ground, options.cases, options.algorithm)
    Console(width=None if sys.stdout.isatty() else 200).print(table(results))
    if options.json:
        options.json.write_text(json.dumps([{"case": c, "algorithm": a, **asdict(v)} for c, a, v in results], indent=1))
    return 0 if all(verdict.holds for *_, verdict in results) else 1


Result = tuple[str, str, Verdict]


def run_cases(ground: Ground, cases: Sequence[Case], algorithms: Sequence[str]) -> list[Result]:
    """One after the other; the first of each algorithm is undisturbed, to compare seconds with."""
    results = []
    trial(ground, CASES["undisturbed"], algorithms[0], "warm-")
    for algorithm in algorithms:
        for case in [CASES["undisturbed"], *(c for c in cases if c.name != "undisturbed")]:
            if missing := case.needs(ground):
                print(f"{case.name}: left out, {missing}", file=sys.stderr)
                continue
            verdict = trial(ground, case, algorithm)
            if case.name == "undisturbed" and verdict.lost is not None:
                ground.seconds[algorithm], verdict.lost = verdict.lost, 0.0
            results.append((case.name, algorithm, verdict))
            how = "holds" if verdict.holds else "; ".join(verdict.why)
            print(f"{case.name}, {algorithm}: {how} {verdict.notes or ''}", file=sys.stderr, flush=True)
    return results


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
    return verdict


def table(results: Sequence[Result]) -> Table:
    found = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("case", "algorithm", "survived", "retrained", "seconds lost", "same bytes", "notes"):
        found.add_column(name, overflow="fold", justify="right" if name == "seconds lost" else "left")
    for case, algorithm, verdict in results:
        again = ", ".join(f"{site} ×{n}" if n > 1 else site for site, n in sorted(verdict.retrained.items()))
        found.add_row(
            case,
            algorithm,
            "[green]yes[/]" if verdict.holds else "[bold red]no[/]",
            again,
            "" if verdict.lost is None else f"{verdict.lost:.1f}",
            {True: "yes", False: "[bold red]no[/]", None: "–"}[verdict.same],
            "; ".join([*verdict.why, *verdict.notes]),
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
