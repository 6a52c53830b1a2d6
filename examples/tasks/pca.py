"""Principal components of the sites' wines, in one round. `fedflow run examples/tasks/pca.yaml`"""

import numpy as np


def moments(data):
    """At a site: N, Σ x and Σ x xᵀ."""
    return {"examples": len(data), "sum": data.sum(axis=0), "products": data.T @ data}


def components(answers, wanted):
    """At the server: the eigenvectors of the pooled covariance with the largest eigenvalues."""
    count, total, products = (sum(a[name] for a in answers.values()) for name in ("examples", "sum", "products"))
    mean = total / count
    covariance = (products - count * np.outer(mean, mean)) / (count - 1)
    variances, vectors = np.linalg.eigh(covariance)
    return {"mean": mean, "components": vectors[:, ::-1][:, :wanted].T, "variances": variances[::-1][:wanted]}
