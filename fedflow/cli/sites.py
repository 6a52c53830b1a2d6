"""`fedflow site start`: at a site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="At a site: its worker.", no_args_is_help=True)


@app.callback()
def _site() -> None:
    """`start` stays a command of its own, though it is the only one."""


@app.command()
def start(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="The site's configuration, YAML or JSON.")],
) -> None:
    """Start this site's worker: it takes part in the rounds that its work pool is asked for, until it is stopped."""
    from fedflow.recipe import SiteConfig

    site = SiteConfig.load(config)
    from fedflow.prefect import worker

    worker.start(site, config)
