"""`fedflow site`: at a site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedflow.cli.options import AsJson, RecipeFile
from fedflow.cli.text import complain, digest, duration, metrics, size
from fedflow.errors import FedflowError, UserError, field_error, one_line

if TYPE_CHECKING:
    from fedflow.recipe import Recipe, SiteConfig

__all__ = ["app", "made_or_kept"]

app = typer.Typer(help="At a site: its worker, its key, what it allows and what left it.", no_args_is_help=True)

ConfigFile = Annotated[Path, typer.Option("--config", metavar="FILE", help="The site's configuration, YAML or JSON.")]


@app.command()
def enroll(config: ConfigFile) -> None:
    """Make this site's key pair, and print its public key.

    It is printed as the federation file wants it. The private key goes into the file that the configuration names as `key`, and never leaves the site. One that is there stays.
    """
    from fedflow.recipe import SiteConfig

    site = SiteConfig.load(config)
    if site.key is None:
        fix = f"add `key: {config.absolute().with_suffix('.key')}` to {config}"
        raise UserError(field_error("key", None, "the path of the private key's file", fix))
    typer.echo(f'- {{name: {site.name}, key: "{made_or_kept(Path(site.key))}"}}')
    typer.echo("next: the coordinator puts this line under `sites` in the federation file", err=True)


def made_or_kept(path: Path) -> str:
    """The public key of a new private key in `path`, or of the one that is there."""
    from fedflow.store.signing import PrivateKey

    if path.exists():
        typer.echo(f"kept  {path}, which was there", err=True)
        return PrivateKey.load(path).public
    public = PrivateKey.create(path).public
    typer.echo(f"wrote {path}", err=True)
    return public


@app.command("try")
def try_(
    recipe: RecipeFile,
    config: ConfigFile,
    sites: Annotated[
        list[str] | None,
        typer.Option("--site", metavar="NAME", help="A site that the workload is told of; several times."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """One local round of RECIPE on this site's own data. Nothing is sent, and nothing is left.

    It begins with the model as it is made: checkpoints are the server's. What would have been sent is shown.
    """
    import json
    import tempfile

    from fedflow.engine.trying import try_recipe
    from fedflow.recipe import Recipe, SiteConfig

    site = SiteConfig.load(config).in_force()
    spec = Recipe.load(recipe, site.context)
    with tempfile.TemporaryDirectory(prefix="fedflow-try-") as folder:
        tried = try_recipe(spec, site, folder, sites or [])
    rows = [{"recipe": spec.digest(), **phase.row()} for phase in tried]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        typer.echo(f"{row['phase']}: {row['steps']} steps on {row['examples']} examples in {duration(row['seconds'])}")
        typer.echo(f"  metrics     {metrics(row['metrics'])}")
        for group, sent in row["would_send"].items():
            typer.echo(f"  would send  {group}: {size(sent['bytes'])}, {sent['digest']}")
        typer.echo(f"  counts      {'yes' if row['objection'] is None else row['objection']}")
    typer.echo(f"recipe {spec.digest()}: nothing was sent")


@app.command()
def review(
    config: ConfigFile,
    what: Annotated[
        str | None, typer.Argument(metavar="[RECIPE|RUN]", help="A recipe's file, or a run in the federation's store.")
    ] = None,
    approve: Annotated[bool, typer.Option("--approve", help="Train this recipe here from now on.")] = False,
    revoke: Annotated[bool, typer.Option("--revoke", help="Do not train it here any more.")] = False,
) -> None:
    """Show which runs this site trains; approve recipes.

    With a recipe's file or a run: the recipe in full. An approval is of the recipe's digest: of all in it but rounds, timeouts, quorums and the like, which a resume may change.
    """
    import yaml

    from fedflow.engine.review import decide, verdict
    from fedflow.recipe import SiteConfig

    site = SiteConfig.load(config).in_force()
    if what is None:
        return _list_runs(site)
    recipe = _recipe_of(what, site)
    if approve or revoke:
        if approve and revoke:
            raise UserError(field_error("--approve, --revoke", True, "one of the two", "leave one out"))
        if site.review is None:
            fix = f"add `review: {{approved: {config.absolute().with_name('approved.jsonl')}}}` to {config}"
            raise UserError(field_error("review", None, "where approvals are kept", fix))
        decide(recipe, site.review, approve)
    else:
        typer.echo(yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False), nl=False)
    typer.echo(f"recipe {recipe.digest()}: {verdict(recipe, site)}")


def _recipe_of(what: str, site: SiteConfig) -> Recipe:
    """The recipe in that file, or of that run, as the coordinator signed it."""
    from fedflow.recipe import Recipe
    from fedflow.store.journal import Journal
    from fedflow.store.objects import ObjectStore
    from fedflow.store.signing import Keys

    if Path(what).is_file():
        return Recipe.load(Path(what), site.context)
    journal = Journal(ObjectStore(site.store, site.store_options), what, Keys.at(site))
    return journal.recipe(site.context)


def _list_runs(site: SiteConfig) -> None:
    from rich.table import Table

    from fedflow.cli.tables import output
    from fedflow.engine.review import verdict
    from fedflow.store.journal import list_runs
    from fedflow.store.objects import ObjectStore

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "recipe", "algorithm", "model", "workload", "here"):
        table.add_column(column, overflow="fold")
    for run in list_runs(ObjectStore(site.store, site.store_options)):
        try:
            recipe = _recipe_of(run, site)
        except (FedflowError, ValueError) as error:
            table.add_row(run, "", "", "", "", one_line(f"refused: {error}"))
            continue
        named = (digest(recipe.digest()), recipe.algorithm.kind, recipe.model.path, recipe.workload.path)
        table.add_row(run, *named, verdict(recipe, site))
    output().print(table)


@app.command()
def audit(
    config: ConfigFile,
    run: Annotated[str | None, typer.Option("--run", metavar="RUN", help="Only what left for this run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what left this site: run, round, object, bytes, digest."""
    import json

    from fedflow.engine.audit import read_audit
    from fedflow.recipe import SiteConfig

    site = SiteConfig.load(config)
    if site.audit is None:
        fix = f"add `audit: {config.absolute().with_name('audit.jsonl')}` to {config}"
        raise UserError(field_error("audit", None, "the file that is written to", fix))
    lines = list(read_audit(Path(site.audit), run))
    if as_json:
        typer.echo(json.dumps(lines))
        return
    from rich.table import Table

    from fedflow.cli.tables import output

    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("at", "run", "round", "phase", "object", "bytes", "digest")
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in ("round", "bytes") else "left")
    for line in lines:
        shown = line | {"digest": line["digest"] or "not made yet"}
        table.add_row(*(str(shown[column]) for column in columns))
    output().print(table)
    sent = [line for line in lines if line["digest"]]
    typer.echo(f"{len(sent)} objects, {size(sum(line['bytes'] for line in sent))}")


@app.command()
def start(
    config: ConfigFile,
    wait: Annotated[
        float,
        typer.Option(
            "--wait", metavar="SECONDS", min=0, help="For a server that does not answer, or another worker that stops."
        ),
    ] = 120.0,
) -> None:
    """Start this site's worker.

    It takes part in the rounds that its work pool is asked for, until it is stopped. First it looks at its data, key, store, server and clock, and whether there is another one. What is wrong is said here, and
    left in the store for the coordinator's `fedflow sites`.
    """
    from fedflow.recipe import SiteConfig

    try:
        site = SiteConfig.load(config)
    except UserError as error:
        _report_unreadable(config, error)
        raise
    from fedflow.prefect import worker

    worker.start(site, config, patience=wait, say=complain)


def _report_unreadable(path: Path, error: UserError) -> None:
    """Let the coordinator know of a configuration that cannot be used, where it says at least who and where."""
    import contextlib
    import tempfile

    import yaml

    from fedflow.engine.starts import report_start
    from fedflow.recipe import SiteConfig

    with contextlib.suppress(OSError, ValueError, TypeError, yaml.YAMLError, FedflowError):
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        least = {name: given[name] for name in ("name", "store", "store_options", "audit") if name in given}
        report_start(SiteConfig.load({**least, "state": tempfile.gettempdir()}), [str(error)], starts=False)
