"""Logistic regression in NumPy. `fedflow run examples/training/numpy.yaml`"""

from typing import Any

import numpy as np
from sites import breast_cancer

from fedflow.local.arrays import ArrayModel, Arrays, ArrayWorkload


def model() -> ArrayModel:
    return ArrayModel(w=[30], b=[1])


def predict(arrays: Arrays, inputs: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-(inputs @ arrays["w"] + arrays["b"])))


def fit(arrays: Arrays, data: Any, config: Any) -> Arrays:
    inputs, labels = data
    for _ in range(config.epochs):
        error = predict(arrays, inputs) - labels
        arrays["w"] -= config.lr * inputs.T @ error / len(labels)
        arrays["b"] -= config.lr * error.mean(keepdims=True)
    return arrays


def accuracy(arrays: Arrays) -> dict[str, float]:
    inputs, labels = breast_cancer()
    return {"accuracy": float(((predict(arrays, inputs) > 0.5) == labels).mean())}


def site(site: str, sites: list[str]) -> ArrayWorkload:
    inputs, labels = breast_cancer(site, sites)
    return ArrayWorkload(fit, (inputs, labels), examples=len(labels))


class HeldOut:
    def evaluate(self, model: ArrayModel) -> dict[str, float]:
        return accuracy(model.arrays())
