"""Lloyd's k-means over the sites' flowers. `fedflow run examples/tasks/kmeans.yaml`"""

import numpy as np
import torch

from fedflow.local.arrays import ArrayModel


class Start(ArrayModel):
    """Three guesses, (3, 4) in cm: a small, a middling and a large flower."""

    def __init__(self) -> None:
        super().__init__(centres=[3, 4])
        with torch.no_grad():
            self.centres.copy_(torch.tensor([[5.0, 3, 1, 0], [6.0, 3, 4, 1], [7.0, 3, 6, 2]]))


def assigned(data, centres):
    """At a site: how many rows are nearest to each centre, and their sum."""
    distances = ((data[:, None] - centres) ** 2).sum(axis=2)  # (N, K)
    nearest = distances.argmin(axis=1)
    sums = np.zeros_like(centres)
    np.add.at(sums, nearest, data)
    counts = np.bincount(nearest, minlength=len(centres))
    return {"sums": sums, "counts": counts, "inertia": distances.min(axis=1).sum(), "examples": len(data)}


def moved(answers, centres):
    """At the server: each centre is the mean of its rows; one without rows stays."""
    sums, counts, inertia = (sum(a[name] for a in answers.values()) for name in ("sums", "counts", "inertia"))
    means = sums / np.maximum(counts, 1)[:, None]
    return {"centres": np.where(counts[:, None] > 0, means, centres), "counts": counts, "inertia": inertia}
