"""A run's global model as a file that other programs read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedflow.engine.aggregation import read_model
from fedflow.errors import ResolveError, UserError, check_suffix, field_error
from fedflow.local.model import build_model, load_groups
from fedflow.recipe import Recipe
from fedflow.store.journal import Journal
from fedflow.store.records import Manifest
from fedflow.types import Groups

__all__ = ["SUFFIXES", "check_target", "export_model", "state_dict", "write_file"]

SUFFIXES = (".safetensors", ".pt", ".pth")


def check_target(out: Path, more: Sequence[str] = ()) -> None:
    """Raises UserError where a model cannot be written to `out`. more: suffixes of the algorithm's own kinds of file"""
    check_suffix("OUT", out, (*SUFFIXES, *more))
    if not out.absolute().parent.is_dir():
        raise UserError(field_error("OUT", str(out), "a folder that exists", f"make {out.parent}"))


def export_model(journal: Journal, round: int, out: Path) -> list[str]:
    """Write the model that `round` committed, verified, to `out`; whole or not at all. Returns notes for the user.

    .safetensors: each tensor once, under the name it is trained by
    whatever the algorithm writes itself (xgboost: .json, .ubj)
    .pt, .pth: a plain PyTorch state dict, which loads with weights_only=True; tied tensors under all their names
    Raises UserError for another suffix, a round that is not committed, or a file that cannot be written.
    """
    recipe = journal.recipe()
    check_target(out, recipe.algorithm.model_files)
    manifest = journal.manifest(round, recipe.phases[-1])
    if manifest is None:
        raise UserError(field_error("--round", round, "a committed round", "see `fedflow runs show`"))
    groups = read_model(journal, manifest)
    if out.suffix in recipe.algorithm.model_files:
        content = recipe.algorithm.as_file(groups, out.suffix)
        write_file(out, lambda path: path.write_bytes(content))
        return []
    if out.suffix == ".safetensors":
        write_file(out, lambda path: save_file(_flat(groups), path, metadata=_origin(manifest)))
        return []
    tensors, notes = state_dict(recipe, groups)
    write_file(out, lambda path: torch.save(tensors, path))
    return notes


def state_dict(recipe: Recipe, groups: Groups) -> tuple[dict[str, Tensor], list[str]]:
    """`groups` as the recipe's model names them, and notes: where the model cannot be built, as they were committed."""
    try:
        model = build_model(recipe.model.path, recipe.model.args, seed=recipe.seed)
    except ResolveError as error:
        return _flat(groups), [
            f"the names are as committed, without those of tied tensors, for the model is not here: {error}"
        ]
    load_groups(model, groups)
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}, []


def _flat(groups: Groups) -> dict[str, Tensor]:
    return {name: tensor for tensors in groups.values() for name, tensor in tensors.items()}


def _origin(manifest: Manifest) -> dict[str, str]:
    """What the file says about itself. format: what other readers of safetensors look for."""
    return {"format": "pt", "run": manifest.run, "round": str(manifest.round), "model_digest": manifest.model_digest}


def write_file(out: Path, save: Callable[[Path], object], field: str = "OUT") -> None:
    """Write beside `out`, then rename, so that `out` is never half a file. Raises UserError about `field`."""
    try:
        handle, name = tempfile.mkstemp(dir=out.absolute().parent, prefix=f".{out.name}-")
    except OSError as error:
        raise UserError(field_error(field, str(out), "a place that can be written", f"{error.strerror}")) from error
    os.close(handle)
    temporary = Path(name)
    try:
        save(temporary)
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(out)
    except OSError as error:
        raise UserError(field_error(field, str(out), "a place that can be written", f"{error.strerror}")) from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    value = os.umask(0o022)
    os.umask(value)
    return value
