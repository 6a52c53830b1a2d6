"""Trials that have ended, as lines of JSON, and the table of them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.cases import CASES
from benchmarks.chaos.ground import Verdict
from benchmarks.tables.common import markdown

NOTE = 160
"""Characters of a note in the table."""
Found = Mapping[tuple[str, str], Verdict]
"""(case, algorithm) -> how its newest trial went."""


@dataclass(frozen=True)
class Results:
    """A file of trials, to which any number of processes may add. since: trials that ended before, as Unix time, do not count."""

    path: Path
    database: str
    since: float = 0.0

    def keep(self, case: str, algorithm: str, verdict: Verdict) -> None:
        line = {"at": time.time(), "case": case, "algorithm": algorithm, "database": self.database, **asdict(verdict)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(line))

    def found(self) -> Found:
        found = {}
        for text in self.path.read_text().splitlines() if self.path.exists() else ():
            with suppress(json.JSONDecodeError):  # cut off
                line = json.loads(text)
                if line.pop("database") == self.database and line.pop("at") >= self.since:
                    trial = line.pop("case"), line.pop("algorithm")
                    found[trial] = Verdict(**line)
        return found

    def logs(self, case: str, algorithm: str) -> Path:
        """The folder for logs of a trial that does not hold."""
        return self.path.with_suffix("") / f"{case}-{algorithm}"


def table(found: Found, cases: Iterable[str], algorithms: Sequence[str]) -> str:
    """Markdown: a line a case."""
    head = ["case", "what happens", "survived", "trained again"]
    head += [*(f"seconds lost, {a}" for a in algorithms), "same bytes", "notes"]
    return markdown(head, [_row(case, [found.get((case, a)) for a in algorithms]) for case in cases])


def _row(case: str, verdicts: Sequence[Verdict | None]) -> list[str]:
    tried = [v for v in verdicts if v is not None]
    again: dict[str, int] = {}
    for site, times in sorted(item for v in tried for item in v.retrained.items()):
        again[site] = max(times, again.get(site, 0))
    bytes_ = {True: "yes", False: "**no**", None: "–"}
    lost = ["–" if v is None or v.lost is None else f"{v.lost:.1f}" for v in verdicts]
    notes = dict.fromkeys(note for v in tried for note in [*v.why, *v.notes])
    return [
        case,
        CASES[case].what,
        _merged("yes" if v.holds else "**no**" for v in tried),
        ", ".join(f"{site} ×{n}" if n > 1 else site for site, n in again.items()),
        *lost,
        _merged(bytes_[v.same] for v in tried),
        "; ".join(map(_short, notes)),
    ]


def _short(note: str) -> str:
    """For a cell: without the places of this trial, and not all of a long message."""
    told = re.sub(r"\b(file|s3)://\S+", "…", note).replace("|", "\\|")
    return told if len(told) <= NOTE else f"{told[: NOTE - 1].rstrip()}…"


def _merged(words: Iterable[str]) -> str:
    """One word where all say the same."""
    said = list(words)
    return (said[0] if len(set(said)) == 1 else ", ".join(said)) if said else "not tried"


def draw(axes: Any, found: Found, cases: Sequence[str], algorithms: Sequence[str]) -> None:
    """Seconds lost, a line a case, a mark an algorithm."""
    axes.figure.set_size_inches(8, 2 + 0.18 * len(cases))
    for algorithm, mark in zip(algorithms, "osd", strict=False):
        lost = [v.lost if (v := found.get((case, algorithm))) else None for case in cases]
        points = [(s, i) for i, s in enumerate(lost) if s is not None]
        axes.plot([s for s, _ in points], [i for _, i in points], mark, markersize=4, label=algorithm)
    axes.set(xlabel="seconds more than an undisturbed run takes", ylim=(len(cases) - 0.5, -0.5))
    axes.set_yticks(range(len(cases)), cases, fontsize=7)
    axes.grid(axis="y", linewidth=0.3)
    axes.legend()
