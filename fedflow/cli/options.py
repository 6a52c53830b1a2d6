"""Arguments and options that several commands share, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "HOME",
    "AsJson",
    "FederationFile",
    "Home",
    "Quiet",
    "RecipeFile",
    "RunId",
    "RunIds",
    "Session",
    "StoreUrl",
    "TensorBoard",
    "Tracking",
]

HOME = Path("fedflow-runs")
"""`fedflow.environments.DEFAULT_HOME`, which takes an import of torch to read; a test holds them equal."""


@dataclass
class Session:
    """What the handling of errors must know of a call. home: where a log of an unexpected error goes."""

    traceback: bool = False
    home: Path = HOME


def _remember(ctx: typer.Context, home: Path) -> Path:
    session = ctx.find_root().obj
    if isinstance(session, Session):
        session.home = home
    return home


RunId = Annotated[str, typer.Argument(metavar="RUN", help="Id of the run, as `fedflow runs ls` shows it.")]
RunIds = Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids of runs, as `fedflow runs ls` shows them.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, YAML or JSON.")]
Home = Annotated[
    Path,
    typer.Option(
        "--home",
        metavar="DIR",
        callback=_remember,
        help="Folder of the runs on this machine: store, sites' states, logs.",
    ),
]
StoreUrl = Annotated[
    str | None,
    typer.Option("--store", metavar="URL", help="The object store. Default: the federation's, else <home>/store."),
]
FederationFile = Annotated[
    Path | None,
    typer.Option("--federation", metavar="FILE", help="The sites. Default: federation.yaml beside the recipe."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line; all else goes to stderr.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Tracking = Annotated[
    bool,
    typer.Option("--tracking", help="sim: show it as one flow run on the Prefect server of PREFECT_API_URL."),
]
TensorBoard = Annotated[
    Path | None,
    typer.Option("--tensorboard", metavar="DIR", help="Write each round's figures there, as TensorBoard reads them."),
]
