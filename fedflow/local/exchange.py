"""What goes into a training in a process of its own, and comes out of it: safetensors and JSON in a folder.

task.json, in/<group>.safetensors, in/{offset,merge}.safetensors, in/<rank>/state.{json,safetensors}     written before it starts
out/result.json, out/<group>.safetensors, out/<rank>/state.{json,safetensors}                    result.json last
progress                                                                                  steps so far
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedflow.algorithm import Correction, Merge
from fedflow.errors import SiteError
from fedflow.local.state import TrainingState
from fedflow.types import MODEL_GROUPS, Groups

__all__ = [
    "VARIABLE",
    "Result",
    "Task",
    "read_groups",
    "read_result",
    "read_state",
    "write_groups",
    "write_state",
]

VARIABLE = "FEDFLOW_TASK"
"""Where a script finds the folder of its task."""


@dataclass(frozen=True)
class Task:
    """What a script is asked for.

    run, round, site: where in the run it is
    config:    the recipe's `training` and its `config`
    steps:     exactly so many completed optimizer steps; None = as the script decides
    seed:      of the round; every generator has been set from it
    threads, device, deterministic: the recipe's numerics
    """

    run: str
    round: int
    site: str
    config: Mapping[str, Any]
    seed: int
    steps: int | None = None
    strict: bool = False
    preserve: bool = False
    proximal: float = 0.0
    apply: str = "gradient"
    assumes_sgd: bool = False
    merge_after: int = 0
    merge_keep: float = 0.0
    threads: int = 1
    device: str = "cpu"
    deterministic: str = "bitwise"

    def write(self, folder: Path) -> None:
        write_json(folder / "task.json", asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Task:
        return cls(**json.loads((folder / "task.json").read_text()))

    def correction(self, offset: Mapping[str, Tensor]) -> Correction:
        return Correction(offset=offset, proximal=self.proximal, apply=self.apply, assumes_sgd=self.assumes_sgd)  # type: ignore[arg-type]

    def merge(self, values: Mapping[str, Tensor]) -> Merge:
        return Merge(values, after=self.merge_after, keep=self.merge_keep)


@dataclass(frozen=True)
class Result:
    """What a script returns besides tensors.

    state: the training state's note ("continued", "fresh (...)"); processes: how many there were, each with its own state
    """

    examples: int | None
    steps: int
    lr_sum: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: str | None = None
    processes: int = 1

    def write(self, folder: Path) -> None:
        """The last file: with it the output is complete."""
        write_json(folder / "result.json", asdict(self))


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(value))
    unfinished.replace(path)


def write_groups(folder: Path, groups: Groups) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for group, tensors in groups.items():
        save_file(
            {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()},
            folder / f"{group}.safetensors",
        )


def read_groups(folder: Path, names: tuple[str, ...] = MODEL_GROUPS) -> dict[str, dict[str, Tensor]]:
    """Raises SiteError where a file is missing or not safetensors."""
    try:
        return {name: load_file(folder / f"{name}.safetensors") for name in names}
    except (SafetensorError, OSError) as error:
        raise SiteError(f"{folder.name}: found {error}, expected {', '.join(names)} as safetensors") from error


def write_state(folder: Path, state: TrainingState | None) -> None:
    """Both files, or, where there is no state, neither."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("state.json", "state.safetensors"):
        (folder / name).unlink(missing_ok=True)
    if state is not None:
        write_groups(folder, {"state": state.tensors})
        write_json(folder / "state.json", state.structure)


def read_state(folder: Path) -> TrainingState | None:
    """None where there is none. Raises SiteError where it cannot be read."""
    if not (folder / "state.json").exists():
        return None
    try:
        structure = json.loads((folder / "state.json").read_text())
    except ValueError as error:
        raise SiteError(f"state.json: {error}") from error
    return TrainingState(read_groups(folder, ("state",))["state"], structure)


def read_result(folder: Path) -> Result:
    """Raises SiteError where it is not as `Result.write` left it."""
    try:
        result = Result(**json.loads((folder / "result.json").read_text()))
        counts = (result.examples or 0, result.steps, result.processes)
        whole = all(type(n) is int and n >= 0 for n in counts) and result.steps and result.processes
        numbers = all(isinstance(n, (int, float)) for n in (result.lr_sum, *result.metrics.values()))
        if not (whole and numbers and math.isfinite(result.lr_sum) and isinstance(result.state, (str, type(None)))):
            raise ValueError(f"found {result}")
    except FileNotFoundError:
        raise SiteError("it sent nothing; call fedflow.client.send() after the training") from None
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise SiteError(f"result.json: {error}") from error
    return result
