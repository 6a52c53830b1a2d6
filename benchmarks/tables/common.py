"""What the tables have in common: a run as a line of JSON, a table as Markdown, a plot as SVG."""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedflow.engine import simulate
from fedflow.memory import settle
from fedflow.recipe import Recipe
from fedflow.simulation.crew import die_with
from fedflow.store.journal import Journal
from fedflow.types import canonical_json

ROOT = Path(__file__).parents[2]
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """One run. metrics: of every round's evaluation; bytes_up, bytes_down: of all updates, and of what the contributors read
    of the broadcasts, at the store."""

    metrics: list[dict[str, float]]
    bytes_up: int
    bytes_down: int
    seconds: float

    def values(self, name: str) -> list[float]:
        return [m[name] for m in self.metrics]

    def rounds_to(self, name: str, target: float) -> int | None:
        """The first round, from 1, whose metric reaches the target; None if none does."""
        return next((i + 1 for i, v in enumerate(self.values(name)) if v >= target), None)


def arguments(name: str, about: str | None, **more: Mapping[str, Any]) -> argparse.Namespace:
    """--results, --out, --seeds, --workers, --only, --tiny, and `more`: option -> what argparse is to know of it."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.tables.{name}", description=about)
    parser.add_argument("--results", type=Path, help=f"finished runs; default: benchmarks/results/{name}.jsonl")
    parser.add_argument("--out", type=Path, help="folder of the table and its plot; default: docs/tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, a core each")
    parser.add_argument(
        "--only", help="make just the runs whose names begin so, and no table: to see how long they take"
    )
    parser.add_argument("--tiny", action="store_true", help="a very small setting, to see that it runs")
    for option, settings in more.items():
        parser.add_argument(f"--{option}", **settings)
    found = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="fedflow-tables-")) if found.tiny else None
    found.results = found.results or (scratch or ROOT / "benchmarks/results") / f"{name}.jsonl"
    found.out = found.out or scratch or ROOT / "docs/tables"
    return found


@dataclass(frozen=True)
class Run:
    """A recipe, and how many sites it is for."""

    fields: Fields
    sites: Sequence[str]

    @property
    def recipe(self) -> Recipe:
        return Recipe.load(self.fields)

    @property
    def key(self) -> dict[str, Any]:
        recipe = self.recipe
        return {"recipe": recipe.digest(), "rounds": recipe.rounds, "sites": len(self.sites)}


Runs = Mapping[Any, Sequence[Run]]


def play(cells: Runs, args: argparse.Namespace) -> dict[Any, list[Result]]:
    """The results of every cell's runs: from `args.results` as far as they are there, the others made now and added to it."""
    cells = {cell: [r for r in runs if _chosen(r, args.only)] for cell, runs in cells.items()}
    known = _known(args.results)
    missing = {canonical_json(r.key): r for runs in cells.values() for r in runs if canonical_json(r.key) not in known}
    tell(f"{sum(map(len, cells.values()))} runs, of which {len(missing)} are to be made; {args.results}")
    started = time.monotonic()
    for done, (run, result) in enumerate(_made(list(missing.values()), args.workers), start=1):
        _keep(args.results, run, result)
        known[canonical_json(run.key)] = asdict(result)
        left = (time.monotonic() - started) / done * (len(missing) - done) / 60
        told = f"{run.fields['name']}: {len(result.metrics)} rounds, {result.seconds:.0f} s"
        tell(f"[{done}/{len(missing)}] {told}; about {left:.0f} min left")
    if args.only is not None:
        sys.exit(0)
    return {cell: [Result(**known[canonical_json(r.key)]) for r in runs] for cell, runs in cells.items()}


def _chosen(run: Run, only: str | None) -> bool:
    return only is None or str(run.fields["name"]).startswith(only)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _known(path: Path) -> dict[bytes, dict[str, Any]]:
    """Finished runs; a line that was cut off is none."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        found[canonical_json(entry["key"])] = entry["result"]
    return found


def _keep(path: Path, run: Run, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and path.read_text()[-1:] not in ("", "\n")
    with path.open("a") as file:
        file.write("\n" * cut_off)
        file.write(json.dumps({"key": run.key, "name": run.fields["name"], "result": asdict(result)}) + "\n")


def _made(runs: Sequence[Run], workers: int) -> Iterator[tuple[Run, Result]]:
    """Each run with its result, as they end."""
    context = multiprocessing.get_context("spawn")  # torch may have threads already
    with ProcessPoolExecutor(max(1, workers), mp_context=context, initializer=_begin) as pool:
        waiting = {pool.submit(_run, run): run for run in runs}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    """A worker has one thread, and ends when the process that started it does, killed or not."""
    importlib.import_module("torch._dynamo")  # what a first optimizer step imports
    torch.set_num_threads(1)
    die_with(os.getppid())
    settle()


def _run(run: Run) -> Result:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedflow-table-") as folder:
        metrics, up, down = _measured(simulate(run.recipe, list(run.sites), store=f"{folder}/store"))
    return Result(metrics, up, down, time.monotonic() - started)


def _measured(journal: Journal) -> tuple[list[dict[str, float]], int, int]:
    metrics, up, down = [], 0, 0
    for round, phase in journal.committed():
        evaluation, manifest = journal.evaluation(round), journal.manifest(round, phase)
        assert evaluation and manifest
        metrics.append({name: float("nan") if v is None else v for name, v in evaluation.metrics.items()})
        up += sum(c.bytes for c in manifest.contributors.values())
        down += sum(c.received for c in manifest.contributors.values())
    return metrics, up, down


# -- what is shown -----------------------------------------------------------------------------------------------------
def spread(values: Sequence[float], digits: int = 1) -> str:
    """ "median (least … most)" """
    if not values:
        return "–"
    middle, low, high = (round(v, digits) for v in (statistics.median(values), min(values), max(values)))
    number: Callable[[float], str] = lambda v: f"{v:.{digits}f}"  # noqa: E731
    return number(middle) if low == high else f"{number(middle)} ({number(low)} … {number(high)})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write(out: Path, name: str, text: str, draw: Callable[[Any], None]) -> None:
    """`<name>.md` with the table and `<name>.svg` with what `draw` draws on axes."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 5), layout="constrained")
    draw(figure.subplots())
    figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    (out / f"{name}.md").write_text(f"{text}\n![plot]({name}.svg)\n")
    print(out / f"{name}.md")
