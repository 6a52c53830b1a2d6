"""What a run found that is no model: read from its journal, and as a file that other programs read."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from fedflow.algorithm import Algorithm
from fedflow.engine.export import write_file
from fedflow.errors import UserError, check_suffix, field_error
from fedflow.store.journal import Journal
from fedflow.store.records import Manifest
from fedflow.store.state import read_state
from fedflow.types import Result, SiteId, canonical_json, spec_of

__all__ = ["SUFFIXES", "excluded_in", "outlined", "read_result", "result_of", "write_result"]

SUFFIXES = (".json", ".safetensors")


def read_result(journal: Journal, round: int | None = None) -> Result:
    """The result that `round` committed, verified; default: the newest.

    Raises UserError where that round is not committed, or the run's algorithm finds nothing but a model.
    """
    recipe = journal.recipe()
    last = recipe.phases[-1]
    rounds = journal.rounds(last)
    if not rounds:
        raise UserError(f"{journal.run}: found no committed round, expected at least one; resume the run")
    wanted = rounds[-1] if round is None else round
    if wanted not in rounds:
        raise UserError(field_error("--round", round, f"a round from 0 to {rounds[-1]}", "choose one of them"))
    manifest = journal.manifest(wanted, last)
    assert manifest is not None
    found = result_of(journal, manifest)
    if found is None:
        raise UserError(
            f"{journal.run}: found a run of {recipe.algorithm.kind}, expected one with a result that is no model; "
            "`fedflow export` writes models"
        )
    return found


def result_of(journal: Journal, manifest: Manifest) -> Result | None:
    """The result that `manifest` committed; None where its algorithm finds nothing but a model."""
    algorithm: Algorithm = journal.recipe().algorithm
    if not algorithm.finds:
        return None
    return algorithm.result(read_state(journal.store, algorithm.State, manifest.state))


def excluded_in(journal: Journal) -> dict[SiteId, str]:
    """Site -> why it last did not count in a committed phase."""
    found: dict[SiteId, str] = {}
    for round, phase in journal.committed():
        manifest = journal.manifest(round, phase)
        assert manifest is not None
        found |= manifest.excluded
    return found


def outlined(result: Result) -> dict[str, object]:
    """The values, and the shapes of the arrays, as one JSON object."""
    return {**result.values, **{name: str(spec) for name, spec in spec_of({"": result.tensors})[""].items()}}


def write_result(result: Result, out: Path) -> Path:
    """Write it, whole or not at all; returns `out`. .json: values, and arrays as lists. .safetensors: arrays, with the values as
    JSON in the file's metadata. Raises UserError for another suffix, or a place that cannot be written."""
    check_suffix("--out", out, SUFFIXES)
    if out.suffix == ".json":
        found = {**result.values, **{name: tensor.tolist() for name, tensor in result.tensors.items()}}
        write_file(out, lambda path: path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8"), "--out")
    else:
        tensors, values = dict(result.tensors), canonical_json(result.values).decode()
        write_file(out, lambda path: save_file(tensors, path, metadata={"format": "pt", "values": values}), "--out")
    return out
