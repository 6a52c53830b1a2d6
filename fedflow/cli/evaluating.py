"""`fedflow evaluate`: a run's models on the data of every site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedflow.cli.options import HOME, AsJson, Home, Quiet, RunId
from fedflow.cli.view import View

__all__ = ["evaluate"]


def evaluate(
    run_id: RunId,
    cross_site: Annotated[
        bool,
        typer.Option(
            "--cross-site", help="Every site's own model too, trained there from the last one, at every site."
        ),
    ] = False,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="The one that is shown. Default: the key metric.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Write the matrix: .json, .md; or a heat map: .png, .svg, .pdf."
        ),
    ] = None,
    home: Home = HOME,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate RUN's last and best model at every site.

    On its held-out data: a run of its own, in RUN's environment: asked for again, it is shown again, or goes on. Whoever answers counts; the cells of the
    others are marked.
    """
    from fedflow.cli.following import committed_rounds, follow
    from fedflow.engine.evaluation import evaluation_of, matrix_of, write_matrix
    from fedflow.environments import recall
    from fedflow.plot import SUFFIXES, check_picture, plot_matrix
    from fedflow.store.journal import Journal

    drawn = out is not None and out.suffix in SUFFIXES
    if out is not None and drawn:
        check_picture(out, "--out")
    view = View(home, as_json, quiet)
    with recall(run_id, home) as environment:
        recipe = evaluation_of(Journal(environment.store, run_id), cross_site=cross_site)
        with view.starting(environment.kind):
            before = committed_rounds(environment.store, recipe.name)
            handle = environment.execute(recipe, run_id=recipe.name)
        if code := follow(environment, handle, before, view):
            raise typer.Exit(code)
        matrix = matrix_of(handle.journal, metric)
    if not as_json:
        typer.echo(matrix.as_markdown())
    if out is not None:
        typer.echo(plot_matrix(matrix, out) if drawn else write_matrix(matrix, out), err=as_json)
