"""Where progress goes, and how much of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["View"]

_STARTING = {
    "sim": "starting the simulation",
    "poc": "starting a Prefect server here, and a worker for each site",
    "prod": "starting on the Prefect server",
}


@dataclass(frozen=True)
class View:
    """How a run is shown. home: where its plot goes; as_json: all but one object goes to stderr; tensorboard: a folder."""

    home: Path
    as_json: bool = False
    quiet: bool = False
    tensorboard: Path | None = None

    def check(self) -> None:
        """Raises UserError where TensorBoard's files cannot be written: before anything starts."""
        if self.tensorboard is not None:
            from fedflow.engine.metrics import check_events

            check_events(self.tensorboard)

    def console(self) -> Console:
        from rich.console import Console

        return Console(stderr=self.as_json, highlight=False)

    def starting(self, env: str, backend: str | None = None) -> AbstractContextManager[object]:
        """Something to look at while `env` starts: a spinner, or a line where there is no terminal; nothing where a debugger has it."""
        if self.quiet or backend == "debug":
            return nullcontext()
        console = self.console()
        if console.is_terminal:
            return console.status(f"{_STARTING[env]} …")
        if env != "sim":
            console.print(f"{_STARTING[env]} …")
        return nullcontext()
