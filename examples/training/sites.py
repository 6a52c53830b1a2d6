"""Real data for the examples, split over the sites: handwritten digits, and breast cancer. Both come with scikit-learn."""

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.preprocessing import StandardScaler

from fedflow.data import dirichlet, iid

HELD_OUT = 300  # digits that no site trains on


def digits(site: str | None = None, sites: list[str] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 64) pixels in 0..1 and (N,) labels: one site's, by a skewed partition, or those that nobody trains on."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order] / 16, labels[order]
    rows = np.arange(HELD_OUT)
    if site is not None and sites is not None:
        rows = HELD_OUT + dirichlet(labels[HELD_OUT:], len(sites), alpha=1.0)[sites.index(site)]
    return torch.tensor(images[rows], dtype=torch.float32), torch.tensor(labels[rows])


def breast_cancer(site: str | None = None, sites: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(N, 30) standardised features and (N,) labels 0, 1; the first 100 are those that nobody trains on."""
    features, labels = load_breast_cancer(return_X_y=True)
    features = StandardScaler().fit_transform(features)
    order = np.random.default_rng(0).permutation(len(labels))
    rows = order[:100]
    if site is not None and sites is not None:
        rows = order[100:][iid(len(order) - 100, len(sites))[sites.index(site)]]
    return features[rows], labels[rows]
