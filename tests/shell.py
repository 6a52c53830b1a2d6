"""Commands of a document, called in a shell as a reader would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["run_shell"]

ROOT = Path(__file__).parents[1]


def run_shell(folder: Path, lines: Iterable[str]) -> str:
    """What `lines` print, run by bash in `folder` up to the first that fails; `fedflow` is this repository's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", "\n".join(["set -euo pipefail", *lines])],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout
