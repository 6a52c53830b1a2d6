"""Real data for the examples, split over the sites; all of it comes with scikit-learn. Without a site: all rows, for comparison."""

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from sklearn.preprocessing import StandardScaler

from fedflow.data import by_size, dirichlet, iid


def iris(site: str | None = None, sites: list[str] | None = None) -> NDArray[np.float64]:
    """(N, 4) lengths and widths in cm; sites have the three kinds of flower in different shares."""
    rows, kinds = load_iris(return_X_y=True)
    return rows if site is None else rows[dirichlet(kinds, len(sites), alpha=0.5)[sites.index(site)]]


def wine(site: str | None = None, sites: list[str] | None = None) -> NDArray[np.float64]:
    """(N, 13) measurements in their own units; sites of different sizes."""
    rows, _ = load_wine(return_X_y=True)
    return rows if site is None else rows[by_size(len(rows), range(1, len(sites) + 1))[sites.index(site)]]


def breast_cancer(
    site: str | None = None, sites: list[str] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(N, 30) standardised features and (N,) labels 0, 1."""
    rows, labels = load_breast_cancer(return_X_y=True)
    rows = StandardScaler().fit_transform(rows)
    chosen = slice(None) if site is None else iid(len(rows), len(sites))[sites.index(site)]
    return rows[chosen], labels[chosen]
