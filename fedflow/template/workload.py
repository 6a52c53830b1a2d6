"""Handwritten digits (8×8 pixels, scikit-learn's copy of the UCI set), split over the sites by label."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedflow.local import TensorWorkload

TEST_EXAMPLES = 360  # of 1797, the same for everybody, seen by no site


def digits() -> tuple[Tensor, Tensor]:
    """(N, 1, 8, 8) images in 0..1 and (N,) labels, in a fixed random order."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order].reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)[order]


def dirichlet_shares(labels: Tensor, sites: int, alpha: float, seed: int = 0) -> list[Tensor]:
    """Row indices per site: of every label, shares drawn from Dirichlet(alpha); the smaller alpha, the more skewed."""
    random = np.random.default_rng(seed)
    rows: list[list[Tensor]] = [[] for _ in range(sites)]
    for label in range(10):
        members = (labels == label).nonzero().flatten()
        shares = random.dirichlet([alpha] * sites)
        cuts = (shares.cumsum()[:-1] * len(members)).astype(int).tolist()
        for site, part in enumerate(torch.tensor_split(members, cuts)):
            rows[site].append(part)
    return [torch.cat(parts) for parts in rows]


class Digits(TensorWorkload):
    """One site's share of the training images."""

    def __init__(self, site: str, sites: list[str], alpha: float = 0.3) -> None:
        images, labels = digits()
        images, labels = images[TEST_EXAMPLES:], labels[TEST_EXAMPLES:]
        mine = dirichlet_shares(labels, len(sites), alpha)[sites.index(site)]
        super().__init__(images[mine], labels[mine])


class HeldOut(TensorWorkload):
    """The test images, at the server."""

    def __init__(self) -> None:
        images, labels = digits()
        test = images[:TEST_EXAMPLES], labels[:TEST_EXAMPLES]
        super().__init__(*test, held_out=test)


class DigitsCNN(nn.Sequential):
    """Two convolutions and two dense layers: 38 thousand parameters."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * channels, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )
