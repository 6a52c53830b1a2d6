"""What environments on this machine share: child processes, log files, and which run was started how."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedflow.errors import RunMissing
from fedflow.recipe import Recipe
from fedflow.store.journal import list_runs
from fedflow.store.objects import ObjectStore

__all__ = ["child_environment", "new_run_id", "read_log", "recalled", "remember", "stop_group"]


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment for a child that is to find the same modules, with `more`."""
    paths = [str(Path(p).resolve()) for p in sys.path]  # "" is the working directory
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONUNBUFFERED": "1", **more}


def new_run_id(store: ObjectStore, recipe: Recipe) -> str:
    """`<recipe's name>-<n>`, the first n from 1 that no run in the store has."""
    taken = [int(m[1]) for run in list_runs(store) if (m := re.fullmatch(re.escape(recipe.name) + r"-(\d+)", run))]
    return f"{recipe.name}-{max(taken, default=0) + 1}"


def stop_group(pid: int, sig: signal.Signals, *, gone: Callable[[], bool], grace: float = 10.0) -> None:
    """Signal a process group, and kill it if it is not `gone` after `grace` seconds."""
    for number in (sig, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)
        until = time.monotonic() + grace
        while not gone() and time.monotonic() < until:
            time.sleep(0.05)
        if gone():
            return


def read_log(path: Path, site: str | None = None) -> Iterator[str]:
    """Lines of a log file, of one site if named; none where there is no file."""
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = (line.rstrip("\n") for line in file)
            yield from (line for line in lines if site is None or f"[{site}]" in line)


# -- which run was started how -----------------------------------------------------------------------------------------
def remember(env: Any, run: str) -> None:
    """Write down how `run` was started, so that `resume` and `logs` need no more than its name."""
    path = _memory(env.home, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {
        "env": env.kind,
        "store": env.store.url,
        "federation": env.federation.model_dump(mode="json"),
        "options": env.options(),
        "python_path": [p for p in sys.path if p],
    }
    half = path.with_suffix(".tmp")
    half.write_text(json.dumps(fields, indent=1))
    half.replace(path)


def recalled(run: str, home: Path) -> dict[str, Any]:
    """What `remember` wrote. Raises RunMissing."""
    path = _memory(home, run)
    if not path.exists():
        known = sorted(p.stem for p in path.parent.glob("*.json")) if path.parent.exists() else []
        raise RunMissing(
            f"run: found no run {run!r} started from {home}, expected one of {known}; give --home, or --env and --store"
        )
    fields: dict[str, Any] = json.loads(path.read_text())
    return fields


def _memory(home: Path, run: str) -> Path:
    return home / "runs" / f"{run}.json"
