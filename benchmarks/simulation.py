"""The simulator beside a bare PyTorch loop, pfl-research, Flower and NVFlare: the same data, weights, local SGD and cohort sizes, two workers with
a thread each. What is measured is the whole process, from the start of its interpreter to its end, and a steady round.

    python -m benchmarks.simulation --setup              # once: an environment for each peer, by pip
    python -m benchmarks.simulation                      # goes on where it was interrupted; --fresh: from the beginning
    python -m benchmarks.simulation --models mlp --regimes 320 --peers bare pfl --laps 5

Contenders take turns, lap by lap, each lap with a seed of its own. A peer without an environment is left out. Writes docs/tables/simulation.md
with its plot.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.common import Setting, data_folder
from benchmarks.tables.common import ROOT, markdown, spread, tell

PEERS = ROOT / "benchmarks/peers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedflow-peers"

REGIMES: Mapping[str, Setting] = {
    "32": Setting(samples=32),
    "320": Setting(samples=320),
    "3200": Setting(samples=3200, rounds=3),
    "pfl": Setting(sites=1000, samples=50, cohort=50, batch=10),  # what pfl-research publishes figures of
}
ABOUT = {
    "32": "100 sites × 32 images, 20 a round, 10 rounds",
    "320": "100 sites × 320 images, 20 a round, 10 rounds",
    "3200": "100 sites × 3200 images, 20 a round, 3 rounds",
    "pfl": "1000 sites × 50 images, 50 a round, batches of 10, 10 rounds",
}


@dataclass(frozen=True)
class Contender:
    """name: in the table; peer: the folder of its script; command: what its interpreter is given."""

    name: str
    peer: str
    command: Sequence[str]


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
CONTENDERS = [
    Contender("bare loop", "bare", ["{peer}/run.py"]),
    Contender("bare loop, vmap", "bare", ["{peer}/run.py", "vmap"]),
    Contender("fedflow, fast", "fedflow", ["{peer}/run.py", "fast"]),
    Contender("fedflow, bitwise", "fedflow", ["{peer}/run.py", "bitwise"]),
    Contender("pfl-research, 1 process", "pfl", ["{peer}/run.py"]),
    Contender("pfl-research, 2 processes", "pfl", [*TWO_PROCESSES, "{peer}/run.py"]),
    Contender("Flower", "flower", ["{peer}/run.py"]),
    Contender("NVFlare, 20 sites", "nvflare", ["{peer}/run.py"]),
]
BARE, FAST, BITWISE, PFL, FLOWER, NVFLARE = (CONTENDERS[i].name for i in (0, 2, 3, 5, 6, 7))


@dataclass(frozen=True)
class Target:
    """`of` takes at most (`most`) or at least `limit` × the seconds of `against`; of the whole process, or of a steady round."""

    model: str
    of: str
    against: str
    limit: float
    most: bool = True
    round: bool = False


TARGETS = [
    Target("cnn", FAST, BARE, 0.65),
    Target("cnn", FAST, PFL, 0.9),
    Target("cnn", BITWISE, BARE, 0.75),
    Target("mlp", FAST, BARE, 1.0),
    Target("mlp", FAST, BARE, 0.7, round=True),
    Target("mlp", FLOWER, FAST, 5, most=False),
    Target("mlp", NVFLARE, FAST, 20, most=False),
]


@dataclass(frozen=True)
class Measured:
    """One process. wall, cpu: seconds of it, cpu of its children too; round: a steady one's, the median of those after the first."""

    contender: str
    model: str
    regime: str
    lap: int
    wall: float
    cpu: float
    round: float
    accuracy: float
    version: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.contender, self.model, self.regime, self.lap


def main() -> None:
    args = _arguments()
    if args.setup:
        for peer in args.peers:
            set_up(peer, args.cache)
        return
    if args.fresh:
        args.results.unlink(missing_ok=True)
    contenders = [c for c in CONTENDERS if c.peer in ("fedflow", *args.peers) and _is_there(c, args.cache)]
    for measured in measurements(contenders, args):
        tell(
            f"{measured.contender}, {measured.model}, {measured.regime}, lap {measured.lap + 1}: {measured.wall:.2f} s, a round {measured.round:.3f} s"
        )
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a") as file:
            file.write(json.dumps(asdict(measured)) + "\n")
    write(args.out, _known(args.results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = ["bare", "pfl", "flower", "nvflare"]
    parser.add_argument("--setup", action="store_true", help="make the peers' environments, and nothing else")
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers)
    parser.add_argument("--models", nargs="+", choices=["cnn", "mlp"], default=["cnn", "mlp"])
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES))
    parser.add_argument("--laps", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the peers' environments and of the data")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/simulation.jsonl")
    parser.add_argument("--fresh", action="store_true", help="forget the results that are there")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/tables")
    return parser.parse_args()


# -- environments of the peers -----------------------------------------------------------------------------------------
def set_up(peer: str, cache: Path) -> None:
    """A virtual environment with what the peer requires, and with the torch of this one."""
    required = PEERS / peer / "requirements.txt"
    if not required.exists():
        return
    tell(f"{peer}: {cache / peer}")
    venv.create(cache / peer, with_pip=True)
    torch_here = f"torch=={torch.__version__.partition('+')[0]}"
    subprocess.run([cache / peer / "bin/python", "-m", "pip", "install", "-q", "-r", required, torch_here], check=True)


def _python(contender: Contender, cache: Path) -> Path:
    """Its interpreter: this one where it requires nothing."""
    needs = (PEERS / contender.peer / "requirements.txt").exists()
    return cache / contender.peer / "bin/python" if needs else Path(sys.executable)


def _is_there(contender: Contender, cache: Path) -> bool:
    found = _python(contender, cache).exists()
    if not found:
        tell(f"{contender.name}: left out, it is not installed; --setup --peers {contender.peer}")
    return found


# -- measurements ------------------------------------------------------------------------------------------------------
def measurements(contenders: Sequence[Contender], args: argparse.Namespace) -> Iterator[Measured]:
    """Those that are not among the results yet, contenders in turn, until the time is over."""
    known = {measured.key for measured in _known(args.results)}
    until = time.monotonic() + 60 * args.minutes
    for model in args.models:
        for regime in args.regimes:
            for lap in range(args.laps):
                for contender in contenders:
                    if (contender.name, model, regime, lap) in known or time.monotonic() > until:
                        continue
                    setting = replace(REGIMES[regime], model=model, seed=lap, data=str(args.cache / "data"))
                    if found := measure(contender, setting, args.cache):
                        yield Measured(contender.name, model, regime, lap, **found)


def measure(contender: Contender, setting: Setting, cache: Path) -> dict[str, Any] | None:
    """None where it ended in an error, which is shown."""
    data_folder(setting)
    command = [part.format(peer=PEERS / contender.peer) for part in contender.command]
    hidden = {"PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}  # everybody's modules are compiled once
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "BENCH": json.dumps(asdict(setting))}
    output = cache / "output.txt"
    with output.open("w") as file:
        started = time.perf_counter()
        process = subprocess.Popen(
            [_python(contender, cache), *command],
            cwd=cache,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        wall = time.perf_counter() - started
    text = output.read_text(errors="replace")
    told = next((json.loads(line.partition("BENCH ")[2]) for line in text.splitlines() if "BENCH {" in line), None)
    if status != 0 or told is None:
        tell(f"{contender.name}: ended with {status}\n{text[-2000:]}")
        return None
    return {
        "wall": round(wall, 3),
        "cpu": round(usage.ru_utime + usage.ru_stime, 3),
        "round": round(statistics.median(told["rounds"][1:]), 4),
        "accuracy": told["accuracy"],
        "version": told["version"],
    }


def _known(path: Path) -> list[Measured]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [Measured(**json.loads(line)) for line in lines if line.endswith("}")]


# -- what is shown -----------------------------------------------------------------------------------------------------
Cell = tuple[str, str, str]
"""Contender, model, regime."""


def write(out: Path, found: Sequence[Measured]) -> None:
    """`simulation.md` with the tables, `.svg` and `.png` with the plot."""
    cells: dict[Cell, list[Measured]] = {}
    for measured in found:
        cells.setdefault(measured.key[:3], []).append(measured)
    out.mkdir(parents=True, exist_ok=True)
    panels = sorted({(model, regime) for _, model, regime in cells}, key=lambda p: (p[0], list(REGIMES).index(p[1])))
    parts = [_heading(found), *(_section(cells, *panel) for panel in panels), _targets(cells)]
    (out / "simulation.md").write_text("\n".join(parts))
    _draw(out, cells, panels)
    print(out / "simulation.md")


def _heading(found: Sequence[Measured]) -> str:
    versions = sorted({f"{m.contender.partition(',')[0]} {m.version}" for m in found})
    laps = max((m.lap for m in found), default=0) + 1
    return (
        "# The simulator beside others\n\n"
        f"Seconds of the whole process and of a steady round: median (least … most) of {laps} laps in which the contenders take turns; two "
        f"workers, a thread each; {os.cpu_count()} processors. {'; '.join(versions)}. Made by `python -m benchmarks.simulation`.\n\n"
        "![plot](simulation.svg)\n"
    )


def _section(cells: Mapping[Cell, list[Measured]], model: str, regime: str) -> str:
    head = ["", "process, s", "× bare loop", "round, s", "× bare loop", "accuracy, %"]
    rows = []
    for contender in CONTENDERS:
        if found := cells.get((contender.name, model, regime)):
            walls, rounds = [m.wall for m in found], [m.round for m in found]
            ratios = [
                _ratio(cells, (contender.name, model, regime), (BARE, model, regime), of) for of in (_wall, _round)
            ]
            shown = [f"{ratio:.2f}" if ratio else "–" for ratio in ratios]
            accuracy = spread([100 * m.accuracy for m in found])
            rows.append([contender.name, spread(walls, 2), shown[0], spread(rounds, 3), shown[1], accuracy])
    return f"## {model.upper()}, {ABOUT[regime]}\n\n{markdown(head, rows)}"


def _wall(measured: Measured) -> float:
    return measured.wall


def _round(measured: Measured) -> float:
    return measured.round


def _ratio(cells: Mapping[Cell, list[Measured]], a: Cell, b: Cell, of: Callable[[Measured], float]) -> float | None:
    """Of the medians; None where one is not there."""
    if a not in cells or b not in cells:
        return None
    return statistics.median(map(of, cells[a])) / statistics.median(map(of, cells[b]))


def _targets(cells: Mapping[Cell, list[Measured]]) -> str:
    head = ["of 320 images a site", "wanted", "found"]
    rows = []
    for t in TARGETS:
        ratio = _ratio(cells, (t.of, t.model, "320"), (t.against, t.model, "320"), _round if t.round else _wall)
        of = f"{t.model.upper()}: {t.of} / {t.against}, {'a round' if t.round else 'the process'}"
        rows.append([of, f"{'≤' if t.most else '≥'} {t.limit:g}", "–" if ratio is None else f"{ratio:.2f}"])
    return f"## What is asked of it\n\n{markdown(head, rows)}"


def _draw(out: Path, cells: Mapping[Cell, list[Measured]], panels: Sequence[tuple[str, str]]) -> None:
    """Whole processes as multiples of the bare loop's median, a panel for each model and regime."""
    from matplotlib.figure import Figure

    columns = max(1, min(4, len({regime for _, regime in panels})))
    lines = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.2 * columns + 1, 2.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    names = [c.name for c in CONTENDERS if any(name == c.name for name, _, _ in cells)][::-1]
    for panel, axis in zip(panels, axes.flat, strict=False):
        bare = cells.get((BARE, *panel))
        unit = statistics.median(m.wall for m in bare) if bare else 1.0
        for height, name in enumerate(names):
            if found := cells.get((name, *panel)):
                walls = sorted(m.wall / unit for m in found)
                middle = statistics.median(walls)
                error = [[middle - walls[0]], [walls[-1] - middle]]
                axis.barh(height, middle, xerr=error, color="tab:blue" if name.startswith("fedflow") else "tab:gray")
                axis.annotate(f" {middle:.2f}", (walls[-1], height), va="center", fontsize=8)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set(
            title=f"{panel[0].upper()}, {panel[1]} images a site"
            if panel[1] != "pfl"
            else f"{panel[0].upper()}, 1000 sites × 50",
            xscale="log",
        )
        axis.set_xticks([0.25, 0.5, 1, 2, 5, 10, 20], ["¼", "½", "1", "2", "5", "10", "20"])
        axis.set_xticks([], minor=True)
        axis.set_xlim(0.25, max(40, 2 * axis.get_xlim()[1]))  # room for the figure behind the longest bar
        axis.set_yticks(range(len(names)), names)
    figure.supxlabel("whole process, × bare loop")
    for kind in ("svg", "png"):
        figure.savefig(out / f"simulation.{kind}", metadata={"Date": None} if kind == "svg" else None, dpi=110)


if __name__ == "__main__":
    main()
