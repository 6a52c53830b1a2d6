"""`fedflow sites`: who is there."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fedflow.cli.options import AsJson, FederationFile

__all__ = ["sites"]


def sites(
    federation: FederationFile = None,
    names: Annotated[list[str] | None, typer.Argument(metavar="[SITE...]", help="Only these sites.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show who is there, and how each site is.

    On the Prefect server that PREFECT_API_URL names: its worker, its version, what it runs, how its last rounds ended. Without
    --federation all sites and regional aggregators that are deployed there; with it also what was wrong at their last start, from its store.
    """
    from prefect.settings import get_current_settings

    from fedflow.errors import UserError, field_error
    from fedflow.prefect.api import connect
    from fedflow.prefect.sites import deployed_sites, look
    from fedflow.recipe import Federation
    from fedflow.store.objects import ObjectStore

    if not get_current_settings().api.url:
        fix = "prefect config set PREFECT_API_URL=http://HOST:4200/api"
        raise UserError(field_error("PREFECT_API_URL", None, "the Prefect API that the sites' workers use", fix))
    with connect() as client:
        spec = None if federation is None else Federation.load(federation)
        found = deployed_sites(client) if spec is None else spec.workplaces
        store = ObjectStore(spec.store, spec.store_options) if spec and spec.store else None
        known = [site.name for site in found]
        if unknown := sorted(set(names or []) - set(known)):
            expected = f"sites among {known}" if known else "sites that are deployed: none is"
            raise UserError(field_error("SITE", unknown, expected, "correct the names, or run `fedflow deploy`"))
        wanted = [site for site in found if not names or site.name in names]
        rows = [status.row() for status in look(client, wanted, store)]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    from rich.table import Table
    from rich.text import Text

    from fedflow.cli.tables import output

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in rows[0] if rows else ("site", "worker", "last seen"):
        table.add_column(column, overflow="fold", no_wrap=column in ("site", "last seen"))
    for row in rows:
        table.add_row(*map(Text, row.values()), style=None if row["worker"] == "there" else "yellow")
    output().print(table)
