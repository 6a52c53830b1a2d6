"""`fedflow psi`: how much the sites have in common; at a site, what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedflow.cli.looking import Store, find_journal
from fedflow.cli.options import HOME, Home, RunId

__all__ = ["psi"]


def psi(
    run_id: RunId,
    site: Annotated[
        Path | None,
        typer.Option("--site", metavar="FILE", help="At a site: its configuration. Show the items themselves."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="With --site: write them there, one a line.")
    ] = None,
    home: Home = HOME,
    store: Store = None,
) -> None:
    """Show how many items the sites of RUN have in common.

    Of a run whose algorithm is `psi`, which `fedflow run` starts. The items themselves are known to the sites alone: `--site` shows them
    there.
    """
    from fedflow.engine.psi import common_items, write_items
    from fedflow.engine.results import read_result
    from fedflow.errors import UserError, field_error
    from fedflow.recipe import SiteConfig

    if site is not None:
        items = common_items(SiteConfig.load(site), run_id)
        typer.echo("\n".join(items) if out is None else write_items(items, out))
        return
    if out is not None:
        raise UserError(field_error("--out", str(out), "--site with it", "the coordinator knows sizes only"))
    journal = find_journal(run_id, home, store)
    found, algorithm = read_result(journal), journal.recipe().algorithm
    if algorithm.kind != "psi":
        raise UserError(f"{run_id}: found a run of {algorithm.kind}, expected one of psi; see `fedflow result`")
    typer.echo(algorithm.page(found, journal.sites(), {}))
