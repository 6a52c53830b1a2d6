"""A user's small project, with its code beside the recipe, and `fedflow` called on it."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedflow.cli import main

ROOT = Path(__file__).parents[2]

SITES = ["site-1", "site-2", "site-3"]

CODE = '''
from pathlib import Path

import torch
from torch import nn

from fedflow.local import TensorWorkload


def points(seed):
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    return inputs, (inputs.sum(dim=1) > 0).long()


class Line(nn.Linear):
    def __init__(self, classes=2):
        super().__init__(4, classes)


class Tied(nn.Module):
    """Two names for one tensor."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 2)
        self.second = self.first

    def forward(self, x):
        return self.second(x)


class Explodes(nn.Module):
    def __init__(self):
        raise ZeroDivisionError("one\\ntwo")


class Points(TensorWorkload):
    """Sixteen points. A site whose name is a file in the folder `broken` fails."""

    def __init__(self, site, broken="broken"):
        super().__init__(*points(int(site[-1])))
        self.site, self.broken = site, Path(broken)

    def batches(self, batch_size, generator):
        if (self.broken / self.site).exists():
            raise OSError(f"the disk of {self.site} is gone")
        return super().batches(batch_size, generator)


class HeldOut(TensorWorkload):
    def __init__(self):
        super().__init__(*points(0), held_out=points(0))
'''


@dataclass(frozen=True)
class Result:
    """What a call of `fedflow` gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object that `--json` prints."""
        (line,) = self.out.splitlines()
        found: dict[str, Any] = json.loads(line)
        return found

    @property
    def mistake(self) -> str:
        """The one line that a user's mistake gives: exit code 2, nothing but that line."""
        assert (self.code, self.out) == (2, ""), self
        return self.problem

    @property
    def problem(self) -> str:
        """The one line with the error, the last on stderr."""
        assert "Traceback" not in self.err, self.err
        line = self.err.splitlines()[-1]
        assert line.startswith("error: "), self.err
        return line.removeprefix("error: ")


@dataclass(frozen=True)
class Project:
    """A folder with a recipe, a federation and their code; `fedflow` is called in it."""

    folder: Path

    def __post_init__(self) -> None:
        (self.folder / "broken").mkdir()
        (self.folder / "points_workload.py").write_text(CODE)
        (self.folder / "federation.yaml").write_text(yaml.safe_dump({"sites": SITES}))
        self.recipe()

    def recipe(self, name: str = "recipe.yaml", **changes: Any) -> str:
        """Write a recipe of three rounds, with `changes`; its file name."""
        fields = {
            "name": "points",
            "model": "points_workload:Line",
            "workload": "points_workload:Points",
            "evaluation": "points_workload:HeldOut",
            "rounds": 3,
            "quorum": 2,
            "training": {"batch_size": 8, "optimizer": {"lr": 0.5}},
        }
        path = self.folder / name
        path.write_text(yaml.safe_dump(fields | changes))
        return name

    def break_site(self, site: str) -> None:
        (self.folder / "broken" / site).touch()

    def mend_site(self, site: str) -> None:
        (self.folder / "broken" / site).unlink()

    def call(self, *args: object) -> Result:
        """`fedflow args` in this process: quick, and the same code from `main` on."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _in(self.folder):
            code = main([str(arg) for arg in args])
        return Result(code, out.getvalue(), err.getvalue())

    def shell(self, *args: object, **env: str) -> Result:
        """`fedflow args` as a process."""
        done = subprocess.run(command(*args), cwd=self.folder, env=environment(**env), capture_output=True, text=True)
        return Result(done.returncode, done.stdout, done.stderr)


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "fedflow.cli", *map(str, args)]


def environment(**more: str) -> dict[str, str]:
    """This process's environment for a `fedflow` that comes from this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **more}


@contextlib.contextmanager
def _in(folder: Path) -> Iterator[None]:
    """With `folder` as the working directory, as if nothing of any project had been imported; the path is restored."""
    path = list(sys.path)
    sys.modules.pop("points_workload", None)
    importlib.invalidate_caches()
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        sys.path[:] = path
