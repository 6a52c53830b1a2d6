"""The sites evaluate the model that a round has made: metric and digest belong together, for the last round and the best."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from fedflow.engine import simulate
from fedflow.engine.aggregation import read_model
from fedflow.engine.best import best_round, key_metrics
from fedflow.engine.summary import glance, summarize
from fedflow.errors import RecipeError
from fedflow.simulation.engine import simulate as simulate_on
from fedflow.store.journal import Journal
from fedflow.testing.faults import fail_at
from tests.algorithms.test_evaluation import SITES, figures, held_out, training
from tests.builders import bits, in_child, outcome, recipe, run, run_with

FIELDS: dict[str, Any] = {"federated_evaluation": True, "key_metric": {"name": "loss", "mode": "min"}}


def pooled(journal: Journal, round: int) -> float:
    """The loss of a round's model over all held-out examples, by its formula."""
    manifest = journal.manifest(round, "train")
    assert manifest is not None
    losses = [(figures(read_model(journal, manifest), held_out(s))["loss"], len(held_out(s)[1])) for s in SITES]
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


@pytest.mark.parametrize("lr", [0.5, 60.0])
def test_the_key_metric_is_that_of_the_model_whose_digest_stands_beside_it(lr: float) -> None:
    """With steps that are too large the best model is not the last."""
    fields = {**FIELDS, "training": {"batch_size": 20, "optimizer": {"lr": lr}}}
    journal = simulate(training(**fields), SITES)
    expected = [pooled(journal, round) for round in range(3)]
    assert key_metrics(journal, journal.recipe()) == pytest.approx(expected, rel=1e-9)
    summary = summarize(journal)
    assert summary.best == expected.index(min(expected)) == best_round(expected, journal.recipe())
    for round in range(3):
        trained, validated = (journal.manifest(round, phase) for phase in ("train", "validate"))
        assert trained and validated and trained.model_digest == validated.model_digest
        assert trained.state == validated.state and trained.model == validated.model
        assert summary.rounds[round].model_digest == trained.model_digest
        assert summary.rounds[round].evaluation == validated.metrics
        seen = glance(journal, journal.recipe(), round)
        assert seen is not None and seen.shown == validated.metrics
    assert summary.model_digest == summary.rounds[-1].model_digest


def test_the_last_round_may_be_the_best_and_patience_counts_its_models() -> None:
    journal = simulate(training(**FIELDS), SITES)
    assert summarize(journal).best == 2
    worse = {"training": {"batch_size": 20, "optimizer": {"lr": 60.0}}, "rounds": 9, "early_stop": {"patience": 1}}
    stopped = simulate(training(**FIELDS | worse), SITES)
    values = key_metrics(stopped, stopped.recipe())
    assert len(values) < 9 and values[-1] >= min(v for v in values[:-1] if v is not None)  # type: ignore[operator]


MEMORIES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "scaffold": {"algorithm": "scaffold"},
    "diloco": {"algorithm": {"kind": "diloco", "local_steps_per_round": 3}},
    "geometric median": {"algorithm": {"kind": "fedavg", "reduction": {"kind": "geometric_median"}}},
    "quantised": {"algorithm": {"kind": "fedavg", "transfer": "delta"}, "transforms": ["quantise"]},
}


@pytest.mark.parametrize("fields", MEMORIES.values(), ids=MEMORIES)
def test_it_changes_no_bit_of_the_training(fields: dict[str, Any]) -> None:
    """Nor what the sites remember: control variates, optimizers, places in the data."""
    work = {"workload": "tests.builders:HeldOut", "rounds": 3, **fields}
    plain, validated = run(recipe(**work)), run(recipe(**work, federated_evaluation=True))
    assert bits(validated) == bits(plain)
    crew = simulate_on(recipe(**work, federated_evaluation=True), ["site-1", "site-2", "site-3"], workers=2)
    assert bits(crew) == bits(plain)


def test_killed_before_the_evaluation_it_goes_on_with_it(tmp_path: Path) -> None:
    fields = {"workload": "tests.builders:HeldOut", "federated_evaluation": True, "algorithm": "scaffold"}
    expected = outcome(run(recipe(**fields), str(tmp_path / "undisturbed")))
    fault = fail_at("manifest", round=0, when="after", token=tmp_path / "token")
    assert in_child(run_with, fault, fields, str(tmp_path / "store"), {}) == -signal.SIGKILL and fault.struck
    found = outcome(run(recipe(**fields), str(tmp_path / "store")))
    assert (found["model"], found["state"]) == (expected["model"], expected["state"])


def test_what_trains_nothing_has_nothing_to_evaluate() -> None:
    with pytest.raises(RecipeError, match="federated_evaluation: found true"):
        recipe(algorithm="statistics", federated_evaluation=True)
