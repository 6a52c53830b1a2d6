"""Models that a run begins with: from the recipe's factory, from files, from other runs in the same store."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedflow.engine.aggregation import read_model
from fedflow.engine.best import best_round, key_metrics
from fedflow.errors import CheckpointError, RunMissing, field_error
from fedflow.local.model import build_model, load_checkpoint, load_groups, model_groups
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.types import Groups

__all__ = ["initial_models"]

OF_A_RUN = "run:"
"""What a checkpoint begins with that is no file: "run:<id>", "run:<id>@best", "run:<id>@<round>"."""


def initial_models(store: ObjectStore, recipe: Recipe) -> tuple[Groups, dict[str, Groups]]:
    """The recipe's model, and its further ones by name. Raises what is wrong with model or checkpoints."""
    others = {name: _model(store, recipe, source, f"checkpoints.{name}") for name, source in recipe.checkpoints.items()}
    return _model(store, recipe, recipe.checkpoint, "checkpoint"), others


def _model(store: ObjectStore, recipe: Recipe, source: str | None, field: str) -> Groups:
    model = build_model(recipe.model.path, recipe.model.args, seed=recipe.seed)
    if source is not None and source.startswith(OF_A_RUN):
        _load_run(store, model, source, field)
    elif source is not None:
        load_checkpoint(model, source)
    return model_groups(model)


def _load_run(store: ObjectStore, model: nn.Module, source: str, field: str) -> None:
    run, _, which = source.removeprefix(OF_A_RUN).partition("@")
    journal = Journal(store, run)
    try:
        recipe = journal.recipe()
    except RunMissing as error:
        raise CheckpointError(field_error(field, source, "a run in this store", "see `fedflow runs ls`")) from error
    last = recipe.phases[-1]
    rounds = _rounds(journal.rounds(last), key_metrics(journal, recipe), recipe)
    if which not in rounds:
        known = ", ".join(name for name in rounds if name and not name.isdigit()) or "none is committed"
        expected = f"{OF_A_RUN}{run}@ and a committed round's number or name ({known})"
        raise CheckpointError(field_error(field, source, expected, "correct it, or resume that run"))
    manifest = journal.manifest(rounds[which], last)
    assert manifest is not None
    try:
        load_groups(model, read_model(journal, manifest))
    except CheckpointError as error:
        raise CheckpointError(f"{field} {source}: {error}") from error


def _rounds(committed: Sequence[int], values: Sequence[float | None], recipe: Recipe) -> dict[str, int]:
    """What a round may be called -> its number. values: the key metric of each"""
    found = {str(round): round for round in committed}
    if committed:
        found |= {"": committed[-1], "last": committed[-1]}
    if (best := best_round(values, recipe)) is not None:
        found["best"] = committed[best]
    return found
