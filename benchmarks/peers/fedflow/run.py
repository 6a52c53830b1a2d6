"""fedflow: a recipe in its simulator. `run.py fast` or `run.py bitwise`: the numerics."""

from __future__ import annotations

import sys

from benchmarks.peers import common
from benchmarks.peers.common import SETTING
from fedflow import __version__
from fedflow.engine import read_model
from fedflow.local import load_groups
from fedflow.recipe import Recipe
from fedflow.simulation.engine import simulate


def recipe(deterministic: str) -> Recipe:
    return Recipe.load(
        {
            "name": "benchmark",
            "model": "benchmarks.peers.fedflow.sites:model",
            "workload": "benchmarks.peers.fedflow.sites:site",
            "rounds": SETTING.rounds,
            "seed": SETTING.seed,
            "schedule": {"kind": "sampled", "sites_per_round": SETTING.cohort},
            "training": {"epochs": SETTING.epochs, "batch_size": SETTING.batch, "optimizer": {"lr": SETTING.lr}},
            "numerics": {"deterministic": deterministic},
        }
    )


def main(deterministic: str) -> None:
    sites = [f"site-{number:06}" for number in range(SETTING.sites)]
    started, ends = common.now(), []
    journal = simulate(
        recipe(deterministic), sites, workers=SETTING.workers, on_commit=lambda manifest: ends.append(common.now())
    )
    head = journal.manifest(SETTING.rounds - 1, "train")
    assert head
    model = common.make_model()
    load_groups(model, read_model(journal, head))
    common.report(f"fedflow, {deterministic}", started, ends, model, __version__)


if __name__ == "__main__":
    main(sys.argv[1])
