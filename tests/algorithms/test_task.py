"""Tasks: what sites answer, what the server makes of it, and who is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from fedflow.algorithms.answers import Answer, added
from fedflow.engine import simulate
from fedflow.engine.aggregation import read_model
from fedflow.engine.results import outlined, read_result, write_result
from fedflow.errors import FedflowError, QuorumLost, RecipeError, ResolveError, UpdateInvalid, UserError
from fedflow.recipe import Recipe
from fedflow.simulation.engine import simulate as simulate_on
from fedflow.store.journal import Journal
from fedflow.types import Update

DATA = {f"site-{i}": np.arange(3.0 * i).reshape(i, 3) for i in (1, 2, 3)}
"""(i, 3) rows at site i."""
HERE = __name__


# -- what sites offer --------------------------------------------------------------------------------------------------
def rows(site: str) -> Any:
    return DATA[site]


def totals(data: Any, power: int = 1) -> dict[str, Any]:
    return {"examples": len(data), "sum": (data**power).sum(axis=0), "largest": np.float64(data.max()), "unit": "cm"}


def above(data: Any, threshold: Any = 0.0, factor: float = 1.0) -> dict[str, Any]:
    return {"count": int((data > threshold).sum()), "told": float(threshold)}


def raised(answers: Mapping[str, Any], round: int, by: float) -> dict[str, Any]:
    return {
        "threshold": by * (round + 1),
        "counts": np.array([a["count"] for a in answers.values()]),
        "by_site": answers,
    }


def seeded(data: Any, seed: int, site: str, round: int) -> dict[str, Any]:
    return {"drawn": np.random.rand(2), "torch": torch.rand(1), "place": f"{site} in round {round}"}


def broken(data: Any, kind: str) -> Any:
    found = {"nan": {"x": np.array([1.0, np.nan])}, "object": {"x": np.array([{}])}, "complex": {"x": np.ones(2) * 1j}}
    return {
        **found,
        "infinite": {"x": float("inf")},
        "a set": {"x": {1, 2}},
        "no mapping": [1],
        "large": {"x": np.ones(999)},
    }[kind]


def only_site_1(data: Any, site: str) -> dict[str, Any]:
    if site != "site-1":
        raise RuntimeError(f"no scanner at {site}")
    return {"x": 1}


def task(**changes: Any) -> Recipe:
    algorithm = {"kind": "task", "function": f"{HERE}:totals", **changes.pop("algorithm", {})}
    fields = {"name": "task", "workload": f"{HERE}:rows", "rounds": 1, "attempts": 1}
    return Recipe.load({**fields, "algorithm": algorithm, **changes})


def run(**changes: Any) -> Journal:
    return simulate(task(**changes), list(DATA))


# -- reductions --------------------------------------------------------------------------------------------------------
def test_collected_answers_are_those_of_every_site() -> None:
    found = read_result(run())
    expected = {s: {"examples": len(d), "largest": d.max(), "unit": "cm"} for s, d in DATA.items()}
    assert found.values == {"sites": expected}
    assert {n: t.tolist() for n, t in found.tensors.items()} == {f"{s}/sum": d.sum(0).tolist() for s, d in DATA.items()}


def test_a_sum_is_that_of_the_pooled_rows() -> None:
    pooled = np.concatenate(list(DATA.values()))
    found = read_result(run(algorithm={"reduction": "sum", "args": {"power": 2}}))
    assert found.tensors["sum"].tolist() == (pooled**2).sum(axis=0).tolist()
    assert found.values == {"examples": 6, "largest": 2.0 + 5.0 + 8.0}


def test_a_mean_is_weighted_by_examples() -> None:
    """Rows' sums weighted by rows: (1·Σ₁ + 2·Σ₂ + 3·Σ₃) / 6."""
    found = read_result(run(algorithm={"reduction": "mean"}))
    expected = sum(len(d) * d.sum(axis=0) for d in DATA.values()) / 6
    assert np.allclose(found.tensors["sum"].numpy(), expected, rtol=1e-15)
    assert found.values["largest"] == pytest.approx((1 * 2 + 2 * 5 + 3 * 8) / 6, rel=1e-15)


def test_whole_numbers_are_added_exactly_and_what_is_no_number_is_left_out() -> None:
    big = 2**53 + 1
    answers = [(Answer.of({"n": big, "ok": True, "t": "x", "a": np.array([big, 1])}), None)] * 2
    found = added(answers, mean=False)
    assert found.values == {"n": 2 * big} and found.tensors["a"].tolist() == [2 * big, 2]


def test_a_name_is_averaged_over_those_that_sent_it() -> None:
    answers = [(Answer.of({"a": 1.0}), 1.0), (Answer.of({"a": 4.0, "b": 7.0}), 2.0)]
    assert added(answers, mean=True).values == {"a": 3.0, "b": 7.0}


def test_an_answer_that_cannot_be_added_to_the_others_excludes_its_site() -> None:
    recipe = task(algorithm={"reduction": "sum"}, quorum=1)
    algorithm, state = recipe.algorithm, recipe.algorithm.init({})
    updates = [Update(f"site-{i}", 0, 1, 1, 0.0, {"answer": Answer.of({"x": np.ones(i)}).encoded()}) for i in (1, 2)]
    with pytest.raises(
        UpdateInvalid, match=r"x: found an array of shape \[2\], expected an array of shape \[1\]"
    ) as error:
        algorithm.aggregate(iter(updates), None)
    assert error.value.site == "site-2" and state.values == "{}"


def test_bytes_that_are_no_answer_are_refused() -> None:
    algorithm = task().algorithm
    good = Answer.of({"x": 1, "y": np.ones(2)}).encoded()
    nan = Answer({}, {"y": torch.tensor([float("nan")])}).encoded()
    for bad in (
        {"arrays": good["arrays"][:-1]},
        {"values": good["values"][:-1]},
        {"arrays": nan["arrays"]},
        {"values": good["values"][:0]},
    ):
        with pytest.raises(UpdateInvalid) as error:
            algorithm.decode(Update("a", 0, 1, 1, 0.0, {"answer": {**good, **bad}}), None, "train")
        assert error.value.site == "a"


def test_what_is_shared_comes_back_in_the_next_round_and_nothing_else() -> None:
    journal = run(
        algorithm={
            "function": f"{HERE}:above",
            "reduction": f"{HERE}:raised",
            "reduction_args": {"by": 2.0},
            "shared": ["threshold"],
            "args": {"factor": 3},
        },
        rounds=3,
    )
    told = []
    for round in range(3):
        found = read_result(journal, round)
        threshold = 2.0 * round
        assert found.tensors["counts"].tolist() == [int((d > threshold).sum()) for d in DATA.values()]
        told.append({a["told"] for a in found.values["by_site"].values()})
    assert told == [{0.0}, {2.0}, {4.0}]
    head = journal.manifest(2, "train")
    assert head is not None
    sent = b"".join(journal.store.get(ref.key) for ref in head.broadcast.values())
    assert b"threshold" in sent and b"count" not in sent


def test_a_models_tensors_are_shared_from_the_beginning_and_keep_shape_and_dtype() -> None:
    changes: dict[str, Any] = {
        "model": {"path": "fedflow.local.arrays:ArrayModel", "args": {"sum": [3], "dtype": "float32"}}
    }
    journal = run(algorithm={"reduction": "sum"}, **changes)
    head = journal.manifest(0, "train")
    assert head is not None
    model = read_model(journal, head)["params"]["sum"]
    pooled = np.concatenate(list(DATA.values()))
    assert model.dtype == torch.float32 and model.tolist() == pooled.sum(axis=0).tolist()
    with pytest.raises(FedflowError, match=r"sum: found shape \[3\], expected the model's \[2\]"):
        run(algorithm={"reduction": "sum"}, model={"path": "fedflow.local.arrays:ArrayModel", "args": {"sum": [2]}})


# -- environments ------------------------------------------------------------------------------------------------------
def test_bits_are_those_of_worker_processes_whatever_the_sizes_of_answers() -> None:
    for algorithm in ({"function": f"{HERE}:seeded"}, {"reduction": "mean"}):
        recipe = task(algorithm=algorithm, rounds=2)
        expected, found = simulate(recipe, list(DATA)), simulate_on(recipe, list(DATA), workers=2)
        one, other = read_result(expected), read_result(found)
        assert one.values == other.values and one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())
        shares = [[c.bytes for c in j.manifest(1, "train").contributors.values()] for j in (expected, found)]  # type: ignore[union-attr]
        assert all(sent < 2000 for sent in shares[1]), shares


def test_k_of_n_answers_close_a_round_and_the_others_are_excluded_with_their_reason() -> None:
    journal = run(algorithm={"function": f"{HERE}:only_site_1"}, quorum=1)
    manifest = journal.manifest(0, "train")
    assert manifest is not None and list(manifest.contributors) == ["site-1"]
    assert "no scanner at site-3" in manifest.excluded["site-3"]
    with pytest.raises(QuorumLost, match="found 1 valid updates, expected 2"):
        run(algorithm={"function": f"{HERE}:only_site_1"}, quorum=2)


def test_only_the_sites_that_are_named_are_asked() -> None:
    journal = run(schedule={"kind": "everyone", "sites": ["site-1", "site-3"]})
    assert set(read_result(journal).values["sites"]) == {"site-1", "site-3"}


# -- mistakes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("nan", "x: found NaN or infinite values"),
        ("object", "x: found an array of object"),
        ("complex", "x: found an array of complex numbers"),
        ("infinite", "x: found what JSON has not"),
        ("a set", "x: found what JSON has not"),
        ("no mapping", "found list, expected a mapping"),
        ("large", "found '8"),
    ],
)
def test_an_answer_that_cannot_travel_says_why(kind: str, told: str) -> None:
    with pytest.raises(QuorumLost) as error:
        run(algorithm={"function": f"{HERE}:broken", "args": {"kind": kind}, "answer_limit": 1024})
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"algorithm": {"reduction": "median"}}, RecipeError, "found 'median', expected one of collect, sum, mean"),
        ({"algorithm": {"reduction": f"{HERE}:nothing"}}, ResolveError, "algorithm.reduction: found"),
        ({"algorithm": {"shared": ["data"]}}, RecipeError, "algorithm.shared"),
        ({"transforms": ["float16"]}, RecipeError, "transforms"),
        ({"quorum": 4}, UserError, "quorum: found 4, expected at most 3"),
        (
            {"schedule": {"kind": "sampled", "sites_per_round": 4}},
            UserError,
            "schedule.sites_per_round: found 4, expected at most 3",
        ),
        (
            {"schedule": {"kind": "everyone", "sites": ["site-9"]}},
            UserError,
            "schedule: found ['site-9'], expected sites among ['site-1'",
        ),
        ({"algorithm": {"function": f"{HERE}:nothing"}}, QuorumLost, "algorithm.function: found"),
        ({"algorithm": {"args": {"powr": 2}}}, QuorumLost, "algorithm.args: found {'powr': 2}"),
        ({"algorithm": {"reduction": "sum", "shared": ["totl"]}}, FedflowError, "algorithm.shared: found ['totl']"),
    ],
    ids=str,
)
def test_a_mistake_names_its_field(changes: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error) as found:
        run(**changes)
    assert told in str(found.value)


def test_training_needs_a_model() -> None:
    fields = {"name": "r", "workload": f"{HERE}:rows", "rounds": 1}
    for algorithm in ({}, {"algorithm": "fedavg"}, {"algorithm": {"kind": "nothing"}}):
        with pytest.raises(RecipeError, match="model: missing"):
            Recipe.load({**fields, **algorithm})


# -- results as files --------------------------------------------------------------------------------------------------
def test_results_are_written_as_json_and_safetensors(tmp_path: Any) -> None:
    import json

    from safetensors import safe_open

    found = read_result(run(algorithm={"reduction": "sum"}))
    as_json = json.loads(write_result(found, tmp_path / "r.json").read_text())
    assert as_json == {"examples": 6, "largest": 15.0, "sum": found.tensors["sum"].tolist()}
    with safe_open(write_result(found, tmp_path / "r.safetensors"), "pt") as file:
        assert torch.equal(file.get_tensor("sum"), found.tensors["sum"])
        assert json.loads(file.metadata()["values"]) == dict(found.values)
    assert outlined(found)["sum"] == "float64[3]"
    with pytest.raises(UserError, match="--out"):
        write_result(found, tmp_path / "r.txt")


def test_a_run_that_trained_a_model_has_no_result() -> None:
    from tests.builders import SITES, recipe

    with pytest.raises(UserError, match="`fedflow export` writes models"):
        read_result(simulate(recipe(rounds=1), list(SITES)))
