"""`fedflow doctor`: what a run needs, and whether it is there."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedflow.cli.options import FederationFile
from fedflow.cli.text import duration
from fedflow.errors import FedflowError, one_line

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from fedflow.recipe import Federation, Recipe

__all__ = ["doctor"]

State = Literal["ok", "warn", "fail"]

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_ANSWER = 10
"""Seconds within which a Prefect server must answer."""


@dataclass(frozen=True)
class Line:
    """One thing that was looked at. fix: what to do about it, where it is not ok."""

    state: State
    what: str
    found: str
    fix: str = ""


def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="Check this recipe and show its timeouts.")
    ] = None,
    federation: FederationFile = None,
    store: Annotated[
        str | None, typer.Option("--store", metavar="URL", help="Check write access to this store.")
    ] = None,
) -> None:
    """Check what a run needs: versions, recipe, store, server.

    Also the recipe's timeouts as they come out, and the sites' workers. Exit code 0 only if nothing fails.
    """
    lines = list(_examine(recipe, federation, store))
    from rich.table import Table

    from fedflow.cli.tables import output

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("state", "what", "found", "fix"):
        table.add_column(name, overflow="fold")
    for line in lines:
        table.add_row(
            f"[{_COLOURS[line.state]}]{line.state}[/]", line.what, *(_plain(t) for t in (line.found, line.fix))
        )
    output().print(table)
    failed = sum(line.state == "fail" for line in lines)
    if failed:
        typer.echo(f"error: {failed} of {len(lines)} checks failed", err=True)
        raise typer.Exit(1)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(one_line(text))


def _examine(recipe: Path | None, federation: Path | None, store: str | None) -> Iterator[Line]:
    yield from _versions()
    sites: Federation | None = None
    if federation is not None or (recipe is not None and (recipe.parent / "federation.yaml").exists()):
        sites, lines = _attempt("federation", lambda: _read_federation(federation, recipe))
        yield from lines
    if recipe is not None:
        spec, lines = _attempt("recipe", lambda: _read_recipe(recipe, sites))
        yield from lines
        yield from _timeouts(spec) if spec else ()
    yield from _keys(sites)
    yield from _store(store, sites)
    yield from _server(sites)


def _attempt(what: str, read: Callable[[], tuple[Any, str]]) -> tuple[Any, list[Line]]:
    """What `read` returns, and the line about it; a FedflowError becomes a line that fails."""
    try:
        value, found = read()
    except FedflowError as error:
        return None, [Line("fail", what, "not as it should be", str(error))]
    return value, [Line("ok", what, found)]


# -- versions ----------------------------------------------------------------------------------------------------------
def _versions() -> Iterator[Line]:
    """fedflow's own requirements against what is installed; extras that are missing are no fault."""
    from packaging.requirements import Requirement

    from fedflow import __version__

    yield Line("ok", "fedflow", __version__)
    try:
        wanted = [Requirement(text) for text in metadata.requires("fedflow") or []]
        python = metadata.metadata("fedflow")["Requires-Python"]
    except metadata.PackageNotFoundError:
        yield Line(
            "warn", "python", platform.python_version(), "fedflow itself is not installed, only found: pip install it"
        )
        yield from (_version(Requirement(name)) for name in ("torch", "prefect", "fastapi", "pydantic", "fsspec"))
        return
    yield _judge("python", platform.python_version(), Requirement(f"python{python}"))
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _version(requirement)
    for extra in ("s3", "postgres", "plot", "examples"):
        yield _extra(extra, [r for r in wanted if r.marker and r.marker.evaluate({"extra": extra})])


def _version(requirement: Requirement) -> Line:
    try:
        return _judge(requirement.name, metadata.version(requirement.name), requirement)
    except metadata.PackageNotFoundError:
        return Line("fail", requirement.name, "not installed", f"pip install '{requirement}'")


def _judge(name: str, found: str, requirement: Requirement) -> Line:
    if requirement.specifier.contains(found, prereleases=True):
        return Line("ok", name, found)
    fix = f"use Python {requirement.specifier}" if name == "python" else f"pip install '{requirement}'"
    return Line("fail", name, f"{found}, expected {requirement.specifier}", fix)


def _extra(extra: str, requirements: list[Requirement]) -> Line:
    needed = [r for r in requirements if not r.marker or not r.marker.evaluate({"extra": ""})]
    missing = [r.name for r in needed if _version(r).state == "fail"]
    if missing:
        return Line(
            "ok", f"extra {extra}", f"without {', '.join(missing)}; pip install 'fedflow[{extra}]' if you need it"
        )
    return Line("ok", f"extra {extra}", ", ".join(f"{r.name} {metadata.version(r.name)}" for r in needed))


# -- recipe ------------------------------------------------------------------------------------------------------------
def _read_federation(path: Path | None, recipe: Path | None) -> tuple[Federation, str]:
    from fedflow.cli.runs import load_federation

    found = load_federation(path, recipe or Path())
    return found, f"{found.name}: {len(found.sites)} sites"


def _read_recipe(path: Path, federation: Federation | None) -> tuple[Recipe, str]:
    from fedflow.cli.recipes import check_recipe
    from fedflow.cli.runs import load_recipe

    recipe = load_recipe(path)
    return recipe, "; ".join(
        " ".join(line.split()) for line in check_recipe(recipe, federation.names if federation else None)
    )


def _timeouts(recipe: Recipe) -> Iterator[Line]:
    for name, value in recipe.durations:
        given = "" if getattr(recipe.timeouts, name) is not None else "  (follows from round_deadline)"
        found = "none" if value is None else f"{duration(value.total_seconds())}{given}"
        yield Line("ok", name, found)


# -- keys --------------------------------------------------------------------------------------------------------------
def _keys(federation: Federation | None) -> Iterator[Line]:
    """Who signs, and whether this machine can."""
    from fedflow.store.signing import Keys

    def coordinator() -> tuple[None, str]:
        public = Keys.here(federation.coordinator_key if federation else None).public
        return None, f"signs as {public}" if public else "signs nothing: no coordinator_key in the federation"

    yield from _attempt("coordinator's key", coordinator)[1]
    if federation is not None:
        keys, everywhere = federation.public_keys, sorted(workplace.name for workplace in federation.workplaces)
        without = [name for name in everywhere if name not in keys]
        found = f"of {len(keys)} of {len(everywhere)} sites; updates of the others count unsigned"
        yield Line("ok", "sites' keys", found, f"`fedflow site enroll` at {', '.join(without)}" if without else "")


# -- store and server --------------------------------------------------------------------------------------------------
def _store(url: str | None, federation: Federation | None) -> Iterator[Line]:
    from fedflow.store.objects import ObjectStore

    chosen = url or (federation.store if federation else None)
    if chosen is None:
        yield Line("warn", "store", "not checked: none was given", "name it with --store, or in the federation")
        return

    def probe() -> tuple[None, str]:
        store = ObjectStore(chosen, federation.store_options if federation and not url else None)
        store.probe()
        return None, f"{store.url}: writes, reads and creates exclusively"

    yield from _attempt("store", probe)[1]


def _server(federation: Federation | None) -> Iterator[Line]:
    from prefect.settings import (
        PREFECT_API_REQUEST_TIMEOUT,
        PREFECT_API_URL,
        PREFECT_CLIENT_MAX_RETRIES,
        temporary_settings,
    )

    from fedflow.prefect.api import connect

    if PREFECT_API_URL.value() is None:
        fix = "nothing for sim and poc; for prod: prefect config set PREFECT_API_URL=http://HOST:4200/api"
        yield Line("warn", "Prefect server", "no PREFECT_API_URL is set", fix)
        return
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: _ANSWER}),
            connect() as client,
        ):
            yield _server_version(str(client.api_url), client.api_version())
            yield from _workers(client, federation)
    except FedflowError as error:
        yield Line("fail", "Prefect server", "no answer", str(error))
    except Exception as error:  # whatever an HTTP client may raise: no access, a proxy's page
        fix = "check PREFECT_API_URL and PREFECT_API_AUTH_STRING"
        yield Line("fail", "Prefect server", f"{PREFECT_API_URL.value()}: {error!r}"[:300], fix)


def _server_version(url: str, found: str) -> Line:
    here = metadata.version("prefect")
    if found.split(".")[:2] == here.split(".")[:2]:
        return Line("ok", "Prefect server", f"{url}: {found}")
    return Line(
        "warn", "Prefect server", f"{url}: {found}, here {here}", "use one version at the server and everywhere else"
    )


def _workers(client: Any, federation: Federation | None) -> Iterator[Line]:
    """Each site's worker; without a federation, each pool's."""
    from fedflow.prefect.api import absent_sites
    from fedflow.recipe import Federation, FederationSite

    if federation is None:
        pools = sorted(pool.name for pool in client.read_work_pools(limit=200))
        if not pools:
            yield Line("warn", "work pools", "none", "deploy the flows with a federation, or name it with --federation")
            return
        federation = Federation(sites=[FederationSite(name=pool) for pool in pools])
    absent = absent_sites(client, federation, regional=[region.name for region in federation.regions])
    for site in federation.workplaces:
        if site.name in absent:
            fix = f"at the site: fedflow site start --config <its configuration with pool {site.work_pool}>"
            yield Line("warn", f"worker of {site.name}", absent[site.name], fix)
        else:
            yield Line("ok", f"worker of {site.name}", f"online on work pool {site.work_pool}")
    yield _requests(len(federation.workplaces))


def _requests(workers: int) -> Line:
    """What asking for work costs the API, by `Pace`: a question takes a Prefect server some ten milliseconds."""
    from fedflow.prefect.pace import CROWDED, IDLE, WORKING

    rates = f"{workers / WORKING:.1f} times a second after a round, {workers / IDLE:.1f} when idle"
    found = f"{workers} workers ask {rates}, {workers / CROWDED:.1f} of a slow API"
    return Line("ok", "requests", found)
