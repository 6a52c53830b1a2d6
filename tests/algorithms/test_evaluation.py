"""Models on the data of every site: the means of the pooled examples, the matrix of all models, who is not there."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedflow.algorithms.matrix import Matrix
from fedflow.engine import simulate, start_run
from fedflow.engine.aggregation import read_model
from fedflow.engine.best import best_round, key_metrics
from fedflow.engine.evaluation import evaluation_of, matrix_of, write_matrix
from fedflow.engine.results import read_result
from fedflow.errors import CheckpointError, QuorumLost, RecipeError, UserError
from fedflow.local import TensorWorkload, load_groups
from fedflow.plot import plot_matrix
from fedflow.recipe import Recipe
from fedflow.simulation.engine import simulate as simulate_on
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.testing.faults import fail_at
from fedflow.types import Result
from tests.builders import blobs, in_child, outcome

HERE = __name__
SITES = ["site-1", "site-2", "site-3"]


class Line(nn.Linear):
    """Four numbers in, three classes out, in float64: the rows of a batch do not see each other."""

    def __init__(self) -> None:
        super().__init__(4, 3, dtype=torch.float64)


class Parts(TensorWorkload):
    """20 examples to train on; 5, 14 or 23 that are held out, by the last digit of the site's name. without: it holds out none"""

    def __init__(self, site: str, without: str = "") -> None:
        number = int(site[-1])
        inputs, targets = blobs(20, seed=number)
        super().__init__(inputs.double(), targets, held_out=None if site == without else held_out(site))


def held_out(site: str) -> tuple[torch.Tensor, torch.Tensor]:
    number = int(site[-1])
    inputs, targets = blobs(9 * number - 4, seed=10 + number)
    return inputs.double(), targets


def training(**changes: Any) -> Recipe:
    """Three rounds, in each one step on all of a site's examples."""
    fields = {
        "name": "line",
        "model": f"{HERE}:Line",
        "workload": f"{HERE}:Parts",
        "rounds": 3,
        "training": {"batch_size": 20, "optimizer": {"lr": 0.5}},
    }
    return Recipe.load(fields | changes)


@pytest.fixture(scope="module")
def trained() -> Journal:
    return simulate(training(), SITES, run="trained")


def models(journal: Journal) -> dict[str, dict[str, Any]]:
    """The last and the best model of a run, by group."""
    best = best_round(key_metrics(journal, journal.recipe()), journal.recipe())
    found = {}
    for name, round in (("server:last", 2), ("server:best", best)):
        manifest = journal.manifest(round, "train")  # type: ignore[arg-type]
        assert manifest is not None
        found[name] = read_model(journal, manifest)
    return found


def figures(groups: dict[str, Any], examples: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Loss and accuracy, by their formulas."""
    model = Line()
    load_groups(model, groups)
    inputs, targets = examples
    with torch.no_grad():
        output = model(inputs)
    loss = -torch.log_softmax(output, dim=1)[torch.arange(len(targets)), targets].mean()
    return {"loss": float(loss), "accuracy": int((output.argmax(1) == targets).sum()) / len(targets)}


def evaluated(journal: Journal, cross_site: bool = False, **changes: Any) -> Journal:
    recipe = evaluation_of(journal, cross_site=cross_site)
    return simulate(
        Recipe.load(recipe.model_dump(mode="json") | changes),
        SITES,
        store=journal.store.url,
        run=changes.get("name", recipe.name),
    )


def test_the_weighted_mean_is_the_metric_of_the_pooled_examples(trained: Journal) -> None:
    found = read_result(evaluated(trained)).values
    parts = [held_out(site) for site in SITES]
    pooled = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    assert found["examples"] == {"site-1": 5, "site-2": 14, "site-3": 23}
    for name, groups in models(trained).items():
        assert found["models"][name]["metrics"] == pytest.approx(figures(groups, pooled), rel=1e-9, abs=1e-9)


def test_the_rounds_metrics_are_those_of_the_last_model(trained: Journal) -> None:
    journal = evaluated(trained)
    manifest = journal.manifest(0, "evaluate")
    assert manifest is not None
    assert manifest.metrics == pytest.approx(read_result(journal).values["models"]["server:last"]["metrics"], rel=1e-12)
    assert {s: c.weight for s, c in manifest.contributors.items()} == {"site-1": 5, "site-2": 14, "site-3": 23}


def test_metrics_are_bound_to_the_digest_of_the_model_that_was_committed(trained: Journal) -> None:
    found = read_result(evaluated(trained)).values["models"]
    best = best_round(key_metrics(trained, trained.recipe()), trained.recipe())
    for name, round in (("server:last", 2), ("server:best", best)):
        manifest = trained.manifest(round, "train")  # type: ignore[arg-type]
        assert manifest is not None and found[name]["digest"] == manifest.model_digest


def test_across_sites_every_model_is_evaluated_on_every_site(trained: Journal) -> None:
    """A site's own model: one step of gradient descent from the last one, y = x − 0.5·∇ of the mean loss on its 20 examples."""
    matrix = matrix_of(evaluated(trained, cross_site=True), "loss")
    assert matrix.rows == ["server:last", "server:best", *SITES] and matrix.columns == SITES
    expected = list(models(trained).values())
    for site in SITES:
        model = Line()
        load_groups(model, expected[0])
        work = Parts(site)
        nn.functional.cross_entropy(model(work.inputs), work.targets).backward()  # type: ignore[no-untyped-call]
        moved = {n: (p - 0.5 * p.grad).detach() for n, p in model.named_parameters() if p.grad is not None}
        expected.append({"params": moved, "frozen": {}, "buffers": {}})
    for row, groups in zip(matrix.cells, expected, strict=True):
        assert row == pytest.approx([figures(groups, held_out(site))["loss"] for site in SITES], rel=1e-9)
    assert len(set(matrix.digests)) >= 4


def test_an_absent_site_leaves_marked_cells(trained: Journal) -> None:
    recipe = evaluation_of(trained, cross_site=True)
    without = Recipe.load(
        recipe.model_dump(mode="json")
        | {"name": "without", "workload": {"path": f"{HERE}:Parts", "args": {"without": "site-2"}}, "attempts": 1}
    )
    journal = simulate(without, SITES, store=trained.store.url, run="without")
    matrix = matrix_of(journal)
    assert matrix.rows == ["server:last", "server:best", *SITES]
    assert [row[1] for row in matrix.cells] == [None] * 5
    assert all(v is not None for row in matrix.cells for v in (row[0], row[2])) and matrix.examples[1] is None
    assert "found nothing to evaluate on" in matrix.absent["site-2"]
    assert "site-2 is not there: " in matrix.as_markdown() and "| – |" in matrix.as_markdown()


def test_a_site_that_was_not_asked_has_a_row_and_a_column_of_marks(trained: Journal) -> None:
    recipe = evaluation_of(trained, cross_site=True)
    start_run(trained.store, "gone", recipe, SITES)
    matrix = matrix_of(simulate(recipe, SITES[:2], store=trained.store.url, run="gone"))
    assert matrix.rows == ["server:last", "server:best", *SITES] and matrix.columns == SITES
    assert [row[2] for row in matrix.cells] == [None] * 5 and matrix.cells[4] == [None] * 3
    assert "not among the workloads" in matrix.absent["site-3"]


def test_nobody_with_held_out_data_is_an_error(trained: Journal) -> None:
    with pytest.raises(QuorumLost, match="found nothing to evaluate on"):
        evaluated(
            trained,
            name="none",
            workload="tests.builders:Blobs",
            model="tests.builders:Tiny",
            checkpoint=None,
            checkpoints={},
            attempts=1,
        )


def test_bits_are_those_of_worker_processes(trained: Journal, tmp_path: Path) -> None:
    store = ObjectStore(str(tmp_path / "store"))
    simulate(training(), SITES, store=store.url, run="trained")
    recipe = evaluation_of(Journal(store, "trained"), cross_site=True)
    found = simulate_on(recipe, SITES, store=store.url, run="workers", workers=2)
    assert read_result(found).values == read_result(evaluated(Journal(store, "trained"), cross_site=True)).values


def run_evaluation(store: str, fault: Any = None) -> None:
    if fault is not None:
        fault.arm()
    simulate(
        evaluation_of(Journal(ObjectStore(store), "trained"), cross_site=True), SITES, store=store, run="evaluation"
    )


def test_killed_between_its_phases_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    stores = [str(tmp_path / name) for name in ("killed", "undisturbed")]
    for store in stores:
        simulate(training(), SITES, store=store, run="trained")
    fault = fail_at("manifest", round=0, when="after", token=tmp_path / "token")
    assert in_child(run_evaluation, stores[0], fault) == -signal.SIGKILL and fault.struck
    assert Journal(ObjectStore(stores[0]), "evaluation").committed() == [(0, "train")]
    for store in stores:
        run_evaluation(store)
    killed, undisturbed = (Journal(ObjectStore(store), "evaluation") for store in stores)
    assert outcome(killed)["state"] == outcome(undisturbed)["state"]


# -- checkpoints -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("which", ["", "@last", "@best", "@1"])
def test_a_run_begins_with_the_model_of_another(trained: Journal, which: str) -> None:
    best = best_round(key_metrics(trained, trained.recipe()), trained.recipe())
    round = {"": 2, "@last": 2, "@best": best, "@1": 1}[which]
    journal = simulate(training(rounds=1, checkpoint=f"run:trained{which}"), SITES, store=trained.store.url)
    initial, expected = journal.manifest(-1, "initial"), trained.manifest(round, "train")  # type: ignore[arg-type]
    assert initial and expected and initial.model_digest == expected.model_digest


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"checkpoint": "run:nobody"}, CheckpointError, "checkpoint: found 'run:nobody', expected a run in this store"),
        ({"checkpoint": "run:trained@7"}, CheckpointError, "checkpoint: found 'run:trained@7'"),
        (
            {"checkpoint": "run:trained", "model": "tests.builders:Tiny"},
            CheckpointError,
            "checkpoint run:trained: the tensors do not fit",
        ),
        (
            {"checkpoints": {"other": "run:trained"}},
            RecipeError,
            "checkpoints: found ['other'], expected none with algorithm fedavg",
        ),
        ({"checkpoints": {"last": "run:trained"}}, RecipeError, "checkpoints: found ['last']"),
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_fit_is_told(
    trained: Journal, changes: dict[str, Any], error: Any, told: str
) -> None:
    with pytest.raises(error) as found:
        simulate(training(**changes), SITES, store=trained.store.url)
    assert told in str(found.value)


def test_a_run_without_a_round_cannot_be_evaluated() -> None:
    journal = start_run(ObjectStore("memory://evaluation-none"), "none", training(), SITES)
    with pytest.raises(UserError, match="found no committed round"):
        evaluation_of(journal)


# -- as files ----------------------------------------------------------------------------------------------------------
RESULT = Result(
    {
        "examples": {"a": 1, "b": 3},
        "models": {
            "server:last": {"digest": "x", "metrics": {"loss": 0.5}, "sites": {"a": {"loss": 2.0}, "b": {"loss": 0.0}}},
            "a": {"digest": "y", "metrics": {"loss": None}, "sites": {"a": {"loss": None}, "b": {}}},
        },
    }
)


def test_a_matrix_is_written_as_json_markdown_and_picture(tmp_path: Path) -> None:
    matrix = Matrix.of(RESULT, "loss", ["a", "b"], {})
    found = json.loads(write_matrix(matrix, tmp_path / "m.json").read_text())
    assert found["cells"] == [[2.0, 0.0], [None, None], [None, None]] and found["rows"] == ["server:last", "a", "b"]
    assert "| server:last | █ 2 | ▁ 0 | **0.5** |" in write_matrix(matrix, tmp_path / "m.md").read_text()
    picture = plot_matrix(matrix, tmp_path / "m.svg").read_text()
    assert picture.count(">×<") == 4 and "server:last" in picture
    with pytest.raises(UserError, match="--out"):
        write_matrix(matrix, tmp_path / "m.txt")
    with pytest.raises(UserError, match="--metric"):
        matrix_of(simulate(training(rounds=1, algorithm="evaluation"), SITES), "recall")
