"""The examples of tasks run as they are, and equal the computation on all rows at one place."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from fedflow.engine import simulate
from fedflow.engine.evaluation import matrix_of
from fedflow.engine.results import read_result
from fedflow.recipe import Federation, Recipe
from fedflow.store.journal import Journal

FOLDER = Path(__file__).parents[1] / "examples" / "tasks"
KNOWN = ("evaluation", "histogram", "kmeans", "newton", "pca", "psi", "tables", "trees")


@pytest.fixture(autouse=True)
def sites(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module with the data; the folder is on the import path as the command line has it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in [path.stem for path in FOLDER.glob("*.py")]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import sites  # type: ignore[import-not-found]

    found: ModuleType = sites
    return found


def run(name: str) -> Journal:
    return simulate(Recipe.load(FOLDER / f"{name}.yaml"), Federation.load(FOLDER / "federation.yaml").names)


def test_every_recipe_is_run_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"federation", *KNOWN}


def test_the_sites_have_all_rows_and_each_once(sites: ModuleType) -> None:
    names = Federation.load(FOLDER / "federation.yaml").names
    for load in (sites.iris, sites.wine, lambda *args: sites.breast_cancer(*args)[0]):
        together = np.concatenate([load(site, names) for site in names])
        assert np.array_equal(np.sort(together, axis=0), np.sort(load(), axis=0))


def test_kmeans_is_scikit_learns_on_all_rows(sites: ModuleType) -> None:
    """Lloyd's algorithm from the same start; 12 rounds are its 12 iterations, or more than it needs."""
    start = np.array([[5.0, 3, 1, 0], [6.0, 3, 4, 1], [7.0, 3, 6, 2]])
    pooled = KMeans(3, init=start, n_init=1, max_iter=12, tol=0, algorithm="lloyd").fit(sites.iris())
    found = read_result(run("kmeans"))
    assert np.allclose(found.tensors["centres"], pooled.cluster_centers_, rtol=1e-12)
    assert found.values["inertia"] == pytest.approx(pooled.inertia_, rel=1e-12)


def test_principal_components_are_scikit_learns_on_all_rows(sites: ModuleType) -> None:
    """Up to the sign of each; variances are of (N − 1)."""
    pooled, found = PCA(3, svd_solver="full").fit(sites.wine()), read_result(run("pca"))
    assert np.allclose(found.tensors["mean"], pooled.mean_, rtol=1e-12)
    assert np.allclose(found.tensors["variances"], pooled.explained_variance_, rtol=1e-9)
    ours = found.tensors["components"].numpy()
    signs = np.sign((ours * pooled.components_).sum(axis=1, keepdims=True))
    assert np.allclose(signs * ours, pooled.components_, atol=1e-8)


def test_newtons_logistic_regression_is_scikit_learns_on_all_rows(sites: ModuleType) -> None:
    """C = 1/penalty = 1; scikit-learn's intercept is not penalised either."""
    pooled = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-10, max_iter=100).fit(*sites.breast_cancer())
    found = read_result(run("newton")).tensors["coef"].numpy()
    assert np.allclose(found, np.append(pooled.coef_[0], pooled.intercept_), rtol=1e-6, atol=1e-8)


def test_every_sites_model_is_better_than_none_at_every_site() -> None:
    """The server's model is zero: it gives every row to the first class, the rarer one."""
    matrix = matrix_of(run("evaluation"))
    assert matrix.rows == ["server:last", *matrix.columns] and len(matrix.columns) == 4
    none, *own = matrix.means
    assert none is not None and none < 0.5 and all(mean is not None and mean > 0.85 for mean in own)


def test_statistics_are_numpys_on_all_rows(sites: ModuleType) -> None:
    features, labels = sites.breast_cancer()
    found = read_result(run("tables")).values["datasets"]["patients"]
    assert len(found) == 11
    for name, x in (("mean radius", features[:, 0]), ("label", labels.astype(float))):
        figures = found[name]["all"]
        assert figures["count"] == len(x) and figures["variance"] == pytest.approx(x.var(ddof=1), rel=1e-12)
        assert figures["mean"] == pytest.approx(x.mean(), rel=1e-12, abs=1e-14)
        assert sum(figures["histogram"]["counts"]) == len(x)


def test_the_patients_in_common_are_those_of_the_sets(sites: ModuleType) -> None:
    import psi  # type: ignore[import-not-found]

    known = [set(psi.patients(site)) for site in ("site-1", "site-2", "site-3")]
    found = read_result(run("psi")).values
    assert found["intersection"] == len(set.intersection(*known)) > 0
    assert list(found["sites"].values()) == [len(one) for one in known]


@pytest.mark.parametrize("name", ["trees", "histogram"])
def test_trees_tell_the_patients_apart(name: str) -> None:
    journal = run(name)
    manifest = journal.manifest(max(round for round, _ in journal.committed()), "validate")
    assert manifest is not None and (manifest.metrics["auc"] or 0) > 0.97
