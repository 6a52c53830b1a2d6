"""`fedflow ui`, `fedflow deploy`, `fedflow gate`: what needs a Prefect server."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedflow.cli.options import HOME, Home, RunId, StoreUrl
from fedflow.errors import UserError

if TYPE_CHECKING:
    from fedflow.environments import Run

__all__ = ["deploy", "enroll", "gate", "hold", "ui"]


def ui(run_id: RunId, home: Home = HOME) -> None:
    """Open the Prefect UI on RUN.

    A run of the environment poc gets its server started again; it stops with Ctrl-C.
    """
    from fedflow.cli.following import ui_of
    from fedflow.environments import recall

    with recall(run_id, home) as environment:
        handle = environment.attach(run_id)
        url = ui_of(handle)
        if url is None:
            raise UserError(
                f"{run_id}: found no UI for the environment {environment.kind}; `fedflow runs show {run_id}` shows its rounds"
            )
        _open(url)
        if environment.kind == "poc":
            hold(handle)
        else:
            typer.echo(url)


def _open(url: str) -> None:
    """Open a browser window, where there is a desktop to have one."""
    if sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ:
        webbrowser.open(url)


def hold(run: Run) -> None:
    """Keep this process, and so the server that it started, until Ctrl-C or SIGTERM."""
    from fedflow.cli.following import interruptible, ui_of

    typer.echo(f"{ui_of(run)}  (Ctrl-C stops the server)", err=True)
    with interruptible(), contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


def deploy(
    federation: Annotated[Path, typer.Argument(metavar="FEDERATION", help="The sites, YAML or JSON.")],
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="What the form for a new run is filled with.")
    ] = None,
    store: StoreUrl = None,
    home: Home = HOME,
) -> None:
    """Create or update work pools and deployments of a federation.

    On the Prefect server that PREFECT_API_URL names: a pool and a deployment per site, and the training's own.
    """
    from fedflow.cli.runs import load_recipe
    from fedflow.environments import make
    from fedflow.recipe import Federation

    spec = None if recipe is None else load_recipe(recipe)
    with make("prod", federation=Federation.load(federation), store=store, home=home) as environment:
        for name in environment.deploy(spec):
            typer.echo(name)


def gate(
    host: Annotated[str, typer.Option("--host", help="Where to listen; the proxy alone may reach it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="The port.")] = 4300,
) -> None:
    """Answer the proxy whether what a site asks for is its own.

    Of the Prefect server that PREFECT_API_URL names, with its credential; deployments/nginx.conf asks.
    """
    from fedflow.prefect.gate import serve

    serve(host, port)


def enroll(
    key: Annotated[Path, typer.Argument(metavar="KEY", help="The file for the private key; one that is there stays.")],
) -> None:
    """Make the coordinator's key pair, and print its public key.

    Whatever the coordinator writes for the sites is signed where FEDFLOW_COORDINATOR_KEY names the file: where its worker runs,
    and where runs are started.
    """
    from fedflow.cli.sites import made_or_kept
    from fedflow.store.signing import COORDINATOR_KEY

    public = made_or_kept(key.absolute())
    typer.echo(f"coordinator_key: {public}")
    typer.echo(
        f"next: this line into the federation file and every site's configuration; {COORDINATOR_KEY}={key.absolute()}",
        err=True,
    )
