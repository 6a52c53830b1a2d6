"""Sweeps: which runs a grid has, what they are called, what is refused before anything starts; that they go on."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from fedflow.environments import SimEnv
from fedflow.errors import RecipeError, RunExists, UserError
from fedflow.recipe import Federation
from fedflow.store.journal import list_runs
from fedflow.sweep import Sweep
from tests.builders import bits, recipe, run

PROX = {"algorithm": {"kind": "fedprox", "mu": 0.5}}


def names(*args: Any, **options: Any) -> list[str]:
    return [trial.run for trial in Sweep(*args, **options).trials]


# -- the grid ----------------------------------------------------------------------------------------------------------
def test_every_combination_with_every_seed_is_a_run() -> None:
    sweep = Sweep(recipe(**PROX), {"algorithm.mu": [0, 0.01], "rounds": [1, 2]}, seeds=[3, 4], name="s")
    assert [(t.recipe.algorithm.mu, t.recipe.rounds, t.recipe.seed) for t in sweep.trials] == [
        (mu, rounds, seed) for mu in (0.0, 0.01) for rounds in (1, 2) for seed in (3, 4)
    ]
    assert sweep.trials[0].recipe == recipe(**{**PROX, "algorithm": {"kind": "fedprox", "mu": 0.0}}, rounds=1, seed=3)
    assert [t.run for t in sweep.trials][:3] == [
        "s-mu-0.0-rounds-1-seed-3",
        "s-mu-0.0-rounds-1-seed-4",
        "s-mu-0.0-rounds-2-seed-3",
    ]


def test_a_run_s_name_does_not_depend_on_the_rest_of_the_grid_or_on_how_a_value_is_written() -> None:
    small = names(recipe(**PROX), {"algorithm.mu": [0.01]})
    large = names(recipe(**PROX), {"algorithm.mu": ["1e-2", 0.1, 1]}, seeds=[4, 5])
    assert small == ["tiny-mu-0.01-seed-5"] and set(small) < set(large)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"algorithm": ["fedavg", "scaffold"]}, ["tiny-algorithm-fedavg-seed-5", "tiny-algorithm-scaffold-seed-5"]),
        ({"evaluation": [None]}, ["tiny-evaluation-null-seed-5"]),
        ({"early_stop.target": [-1]}, [r"tiny-target-1.0-seed-5-[0-9a-f]{8}"]),
        (
            {"algorithm": ["fedopt"], "algorithm.server_optimizer.lr": [1.0], "training.optimizer.lr": [0.5]},
            [r"tiny-algorithm-fedopt-algorithm.server_optimizer.lr-1.-[0-9a-f]{8}"],
        ),
        ({"model": ["tests.builders:Tiny"]}, [r"tiny-model-tests.builders-Tiny-seed-5-[0-9a-f]{8}"]),
        ({"workload.args.log": ["x" * 80]}, [r"tiny-log-x{45}-[0-9a-f]{8}"]),
    ],
)
def test_names_are_short_and_plain(fields: dict[str, list[Any]], wanted: list[str]) -> None:
    found = names(recipe(), fields)
    assert len(found) == len(wanted)
    for name, pattern in zip(found, wanted, strict=True):
        assert re.fullmatch(pattern, name) and len(name) <= 63, name


def test_values_that_are_cut_off_in_a_name_are_told_apart() -> None:
    assert len(set(names(recipe(), {"workload.args.log": ["x" * 80, "x" * 81]}))) == 2


def test_another_algorithm_takes_only_the_fields_that_were_written() -> None:
    """FedAvg's defaults are no fields of SCAFFOLD's; what is set below it is."""
    base = recipe(algorithm={"kind": "fedavg", "transfer": "delta"})
    (trial,) = Sweep(base, {"algorithm.kind": ["fedprox"], "algorithm.mu": [2]}).trials
    assert (trial.recipe.algorithm.kind, trial.recipe.algorithm.mu, trial.recipe.algorithm.transfer) == (
        "fedprox",
        2.0,
        "delta",
    )
    (trial,) = Sweep(recipe(algorithm="scaffold"), {"algorithm": ["fedprox"], "algorithm.mu": [2]}).trials
    assert trial.recipe.algorithm.mu == 2.0


def test_an_entry_of_a_list_is_a_field() -> None:
    base = recipe(algorithm={"kind": "fedavg", "transfer": "delta"}, transforms=[{"kind": "quantise", "bits": 8}])
    assert [t.recipe.transforms[0].bits for t in Sweep(base, {"transforms.0.bits": [8, 4]}).trials] == [8, 4]


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "unknown field": ({"algorithm.muh": [1]}, {}, ["algorithm.muh: unknown field", "algorithm.muh=1"]),
    "unknown part": ({"algorithmus.mu": [1]}, {}, ["algorithmus: unknown field"]),
    "no such value": ({"algorithm.mu": [0, -1]}, {}, ["algorithm.mu: found -1", "greater than or equal to 0"]),
    "wrong type": ({"rounds": [1, "many"]}, {}, ["rounds: found 'many'", "integer", "rounds=many"]),
    "another's field": ({"algorithm": ["fedavg", "fedprox"], "algorithm.mu": [1]}, {}, ["algorithm.mu", "unknown field"]),
    "contradiction": ({"quorum": [1], "min_sites": [2]}, {}, ["min_sites (2)", "quorum (1)"]),
    "below a number": ({"rounds.first": [1]}, {}, ["rounds.first", "'first' is looked for in 2"]),
    "no such entry": ({"transforms.1.bits": [4]}, {}, ["transforms.1.bits"]),
    "no value": ({"algorithm.mu": []}, {}, ["algorithm.mu: found 'no value', expected at least one"]),
    "empty": ({}, {}, ["empty grid", "--set or --seeds"]),
    "twice": ({"algorithm.mu": [1, 1]}, {}, ["algorithm.mu: found 1, expected each value once"]),
    "the same twice": ({"algorithm.mu": [0.1, "1e-1"]}, {}, ["algorithm.mu: found [0.1, '1e-1']", "different recipes"]),
    "a seed twice": ({}, {"seeds": [1, 1]}, ["seed: found 1, expected each value once"]),
    "seeds as a field too": ({"seed": [1]}, {"seeds": [1]}, ["seed", "one of the two"]),
    "the recipe's name": ({"name": ["a", "b"]}, {}, ["name", "--name"]),
    "a name that is none": ({"algorithm.mu": [1]}, {"name": "a/b"}, ["--name: found 'a/b'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    fields, options, words = MISTAKES[case]
    with pytest.raises(UserError) as caught:
        Sweep(recipe(**PROX), fields, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# -- before anything starts --------------------------------------------------------------------------------------------
def test_what_cannot_start_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    env = SimEnv(Federation.of(3), home=tmp_path)
    wrong = {
        "model.args.width": (["1"], "tiny-width-1-seed-5: .*model.args"),
        "workload": (["tests.builders:Nowhere"], "workload.*tests.builders:Nowhere"),
        "evaluation": (["tests.builders:Nowhere"], "evaluation.*tests.builders:Nowhere"),
        "quorum": ([2, 9], "tiny-quorum-9-seed-5: .*quorum: found 9, expected at most 3"),
    }
    for path, (values, text) in wrong.items():
        with pytest.raises(UserError, match=text):
            Sweep(recipe(), {path: values}).execute(env)
    with pytest.raises(UserError, match="parallel: found 0"):
        Sweep(recipe(), seeds=[1]).execute(env, parallel=0)
    assert list_runs(env.store) == []


def test_runs_of_another_recipe_or_of_more_rounds_are_not_taken_for_this_sweep_s(tmp_path: Path) -> None:
    env = SimEnv(Federation.of(3), home=tmp_path)
    run(recipe(rounds=2, seed=1), env.store.url, name="tiny-seed-1")
    with pytest.raises(RunExists, match="--name: found 'tiny-seed-1'"):
        Sweep(recipe(rounds=2, **PROX), seeds=[0, 1]).execute(env)
    with pytest.raises(RecipeError, match="rounds: found 1, expected at least the 2 that tiny-seed-1 has committed"):
        Sweep(recipe(rounds=1), seeds=[0, 1]).execute(env)
    assert list_runs(env.store) == ["tiny-seed-1"]


# -- running -----------------------------------------------------------------------------------------------------------
def test_runs_that_are_there_are_found_and_the_others_trained(tmp_path: Path) -> None:
    """Each has the bits of the reference run of its recipe; a sweep of more rounds goes on with the same runs."""
    sweep = Sweep(recipe(rounds=1, evaluation="tests.builders:HeldOut"), {"training.optimizer.lr": [0.1, 0.2]})
    seen: list[int] = []
    with SimEnv(Federation.of(3), home=tmp_path, backend="debug") as env:
        assert [row.status for row in sweep.result(env).rows] == ["interrupted", "interrupted"]
        result = sweep.execute(env, parallel=2, on_tick=lambda active, done: seen.append(len(done)))
        again = sweep.execute(env, on_tick=lambda active, done: seen.append(-len(active)))
        assert 0 in seen and seen[-1] == 0  # the second time nothing was started
        longer = Sweep(recipe(rounds=2, evaluation="tests.builders:HeldOut"), sweep.fields).execute(env)
        for trial in longer.rows:
            assert bits(env.attach(trial.trial.run).journal) == bits(run(trial.trial.recipe))
    assert result.unfinished == [] and again.table() == result.table()
    first, second = result.table()
    assert (first["run"], first["training.optimizer.lr"], first["seed"]) == ("tiny-lr-0.1-seed-5", 0.1, 5)
    evaluated = run(sweep.trials[0].recipe).evaluation(0)
    assert evaluated is not None
    assert first["final"] == first["best"] == evaluated.metrics["accuracy"]
    assert (second["rounds"], second["status"], second["best_round"]) == (1, "finished", 0)
    assert [row["rounds"] for row in longer.table()] == [2, 2]
    with result.write(tmp_path / "table.csv").open() as file:
        assert [row["model_digest"] for row in csv.DictReader(file)] == [row["model_digest"] for row in result.table()]
    read = pyarrow.parquet.read_table(result.write(tmp_path / "table.parquet")).to_pylist()
    assert read == result.table()
    assert "lr 0.2: " in result.plot(tmp_path / "sweep.svg").read_text()


def test_a_run_that_fails_stops_none_of_the_others(tmp_path: Path) -> None:
    """site-1 to site-3 train; a quorum of 4 is never reached among sites of which one is not there."""
    workload = {"path": "tests.simulation.test_simulation:Failing", "args": {"broken": str(tmp_path / "broken")}}
    (tmp_path / "broken").write_text("raises")
    with SimEnv(Federation.of(3), home=tmp_path, backend="debug") as env:
        result = Sweep(recipe(rounds=1, workload=workload), {"quorum": [3, 2]}).execute(env)
        assert [(row.status, len(row.summary.rounds) if row.summary else None) for row in result.rows] == [
            ("failed", 0),
            ("finished", 1),
        ]
        assert [row.trial.run for row in result.unfinished] == ["tiny-quorum-3-seed-5"]
        (tmp_path / "broken").unlink()
        assert Sweep(recipe(rounds=1, workload=workload), {"quorum": [3, 2]}).execute(env).unfinished == []
