"""What the tables have in common: a run as a line of JSON, a table as Markdown, a plot as SVG."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedflow.engine import simulate
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal
from fedflow.types import canonical_json

ROOT = Path(__file__).parents[2]
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """One run. metrics: of every round's evaluation; bytes_up, bytes_down: of all updates and broadcasts, at the store."""

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
    """--results, --out, --seeds, --workers, --tiny, and `more`: option -> what argparse is to know of it."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.tables.{name}", description=about)
    parser.add_argument("--results", type=Path, default=ROOT / f"benchmarks/results/{name}.jsonl", help="finished runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/tables", help="folder of the table and its plot")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="processes that train sites")
    parser.add_argument("--tiny", action="store_true", help="a very small setting, to see that it runs")
    for option, settings in more.items():
        parser.add_argument(f"--{option}", **settings)
    found = parser.parse_args()
    if found.tiny:
        found.results = found.out = Path(tempfile.mkdtemp(prefix="fedflow-tables-"))
        found.results = found.results / f"{name}.jsonl"
    return found


def played(fields: Fields, sites: Sequence[str], args: argparse.Namespace) -> Result:
    """The result of this recipe at these sites, from `args.results` if it is there."""
    recipe = Recipe.load(fields)
    key = {"recipe": recipe.digest(), "rounds": recipe.rounds, "sites": len(sites)}
    if found := _known(args.results).get(canonical_json(key)):
        return Result(**found)
    result = _run(recipe, sites, args.workers)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a") as file:
        file.write(json.dumps({"key": key, "name": recipe.name, "result": asdict(result)}) + "\n")
    print(f"{recipe.name}: {len(result.metrics)} rounds, {result.seconds:.0f} s", file=sys.stderr, flush=True)
    return result


def _known(path: Path) -> dict[bytes, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {canonical_json(entry["key"]): entry["result"] for entry in map(json.loads, lines)}


def _run(recipe: Recipe, sites: Sequence[str], workers: int) -> Result:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedflow-table-") as store:
        journal = simulate(recipe, list(sites), store=store, workers=workers)
        metrics, up, down = _measured(journal)
    return Result(metrics, up, down, time.monotonic() - started)


def _measured(journal: Journal) -> tuple[list[dict[str, float]], int, int]:
    metrics, up, down = [], 0, 0
    for round, phase in journal.committed():
        evaluation, manifest = journal.evaluation(round), journal.manifest(round, phase)
        plan = journal.plan(round, phase)
        assert evaluation and manifest and plan
        metrics.append({name: float("nan") if v is None else v for name, v in evaluation.metrics.items()})
        up += sum(c.bytes for c in manifest.contributors.values())
        down += len(plan.tasks) * sum(ref.size for ref in plan.broadcast.values())
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
