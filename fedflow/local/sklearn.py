"""Linear models of scikit-learn, fitted on from the received coefficients. Needs scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from fedflow.errors import ResolveError, field_error
from fedflow.local.arrays import ArrayModel, Arrays, ArrayWorkload, Fitted
from fedflow.local.function import Config

__all__ = ["LinearModel", "LinearWorkload"]


class LinearModel(ArrayModel):
    """Coefficients and intercepts of a linear model over `features`, zero at first.

    outputs: rows of the coefficients: 1 for two classes and for regression, else the number of classes
    """

    def __init__(self, features: int, outputs: int = 1) -> None:
        super().__init__(coef=[outputs, features], intercept=[outputs])


class LinearWorkload(ArrayWorkload):
    """One site's estimator and data, for a recipe whose model is a `LinearModel`.

    estimator: `SGDClassifier` or `SGDRegressor` (passes of `partial_fit`: the recipe's epochs), or one with `warm_start`
               such as `LogisticRegression` (as many iterations of its solver)
    inputs, targets: the training data; classes: all that any site has; default: those here
    held_out:  inputs and targets for `evaluate`, which reports the estimator's score
    """

    def __init__(
        self,
        estimator: Any,
        inputs: Any,
        targets: Any,
        *,
        classes: Sequence[Any] | None = None,
        held_out: tuple[Any, Any] | None = None,
    ) -> None:
        if not hasattr(estimator, "partial_fit") and not hasattr(estimator, "warm_start"):
            raise ResolveError(
                field_error(
                    "workload", type(estimator).__name__, "an estimator with partial_fit or warm_start", "use one"
                )
            )
        self.estimator, self.held_out = estimator, held_out
        self.classes = np.unique(targets) if classes is None else np.asarray(classes)
        super().__init__(self._fit, (inputs, targets), examples=len(inputs), evaluate=self._score if held_out else None)

    def _load(self, arrays: Arrays, seed: int | None = None) -> None:
        one = self.estimator
        regression = getattr(one, "_estimator_type", None) == "regressor" and arrays["coef"].shape[0] == 1
        one.coef_ = arrays["coef"][0].copy() if regression else arrays["coef"].copy()
        one.intercept_ = arrays["intercept"].copy()
        one.n_features_in_ = arrays["coef"].shape[1]
        if not regression:
            one.classes_ = self.classes
        if seed is not None and "random_state" in one.get_params():
            one.set_params(random_state=seed % 2**31)

    def _fit(self, arrays: Arrays, data: Any, config: Config) -> Fitted:
        self._load(arrays, config.seed)
        inputs, targets = data
        if hasattr(self.estimator, "partial_fit"):
            known = {"classes": self.classes} if hasattr(self.estimator, "classes_") else {}
            for _ in range(config.epochs):
                self.estimator.partial_fit(inputs, targets, **known)
        else:
            self.estimator.set_params(warm_start=True, max_iter=config.epochs)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # a round is a part of the way
                self.estimator.fit(inputs, targets)
        coef = np.atleast_2d(self.estimator.coef_)
        return Fitted({"coef": coef, "intercept": np.atleast_1d(self.estimator.intercept_)}, steps=config.epochs)

    def _score(self, arrays: Arrays) -> dict[str, float]:
        assert self.held_out is not None
        self._load(arrays)
        return {
            "accuracy" if hasattr(self.estimator, "classes_") else "r2": float(self.estimator.score(*self.held_out))
        }
