"""Federated support vector machine: the union of the sites' support vectors (Caragea et al., "Support vector machines in
distributed data sets", 2005; NVFlare's `SVMAssembler`).

    site i:  the support vectors of a machine fitted to its data and the received vectors
    server:  a machine fitted to the union of them; its support vectors are the model

Recipe: model `fedflow.local.svm:SupportVectors`, algorithm `fedflow.local.svm:UnionOfVectors`, workload an `SVMWorkload`. What
travels are rows of the sites' data: that is this algorithm's idea, and who takes part in it should know. Needs scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.svm import SVC
from torch import nn

from fedflow.algorithm import Algorithm, NoState, Training
from fedflow.errors import FedflowError, field_error
from fedflow.local.arrays import ArrayModel, Arrays, ArrayWorkload, Fitted
from fedflow.local.function import Config
from fedflow.types import Aggregate, Groups, RoundContext, Spec, Tensors, Update, spec_of

__all__ = ["SVMState", "SVMWorkload", "SupportVectors", "UnionOfVectors", "machine"]

Kernel = Literal["linear", "poly", "rbf", "sigmoid"]


class SupportVectors(ArrayModel):
    """Room for `most` support vectors and their labels; `used` says how many there are. The rest is zero."""

    def __init__(self, features: int, most: int) -> None:
        super().__init__(vectors=[most, features], labels=[most], used=[1])


def machine(arrays: Arrays, kernel: Kernel = "rbf") -> SVC:
    """The machine that these support vectors make."""
    vectors, labels = _unpacked(arrays)
    return SVC(kernel=kernel, gamma="scale").fit(vectors, labels)


class SVMWorkload(ArrayWorkload):
    """One site's data. kernel: of its machine, the same as the algorithm's; held_out: for `evaluate`, the accuracy."""

    def __init__(
        self, inputs: Any, targets: Any, *, kernel: Kernel = "rbf", held_out: tuple[Any, Any] | None = None
    ) -> None:
        self.kernel, self.held_out = kernel, held_out
        super().__init__(self._fit, (np.asarray(inputs), np.asarray(targets)), examples=len(inputs))

    def _fit(self, arrays: Arrays, data: Any, config: Config) -> Fitted:
        vectors, labels = _unpacked(arrays)
        inputs, targets = np.concatenate([vectors, data[0]]), np.concatenate([labels, data[1]])
        return Fitted(_support(inputs, targets, self.kernel, arrays))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        if self.held_out is None:
            return {}
        arrays = {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}
        several = len(np.unique(_unpacked(arrays)[1])) > 1
        return {"accuracy": float(machine(arrays, self.kernel).score(*self.held_out))} if several else {}


def _unpacked(arrays: Arrays) -> tuple[NDArray[Any], NDArray[Any]]:
    used = int(arrays["used"][0])
    return arrays["vectors"][:used], arrays["labels"][:used]


def _support(inputs: NDArray[Any], targets: NDArray[Any], kernel: Kernel, room: Arrays) -> Arrays:
    """The support vectors of a machine fitted to these rows, in as much room as the model has."""
    fitted = SVC(kernel=kernel, gamma="scale").fit(inputs, targets)
    rows, most = np.sort(fitted.support_), len(room["labels"])
    if len(rows) > most:
        raise FedflowError(field_error("model.args.most", most, f"room for {len(rows)} support vectors", "raise it"))
    found = {name: np.zeros_like(array) for name, array in room.items()}
    found["vectors"][: len(rows)], found["labels"][: len(rows)] = inputs[rows], targets[rows]
    found["used"][0] = len(rows)
    return found


@dataclass(frozen=True)
class SVMState:
    """params: "vectors", "labels", "used"."""

    params: Tensors


class UnionOfVectors(Algorithm):
    """The server's part: one round is enough; further ones let every site see what the others sent."""

    kind: Literal["svm"] = "svm"
    State: ClassVar[type[Any]] = SVMState
    partitionable: ClassVar[bool] = False

    kernel: Kernel = "rbf"
    """Of the machine."""

    def init(self, model: Groups) -> SVMState:
        return SVMState(model["params"])

    def model(self, state: SVMState) -> Groups:
        return {"params": state.params, "frozen": {}, "buffers": {}}

    def expects(self, state: SVMState, phase: str) -> Spec:
        return spec_of({"params": state.params})

    def weight(self, update: Update) -> float:
        return update.examples

    def aggregate(self, updates: Iterable[Update], ctx: RoundContext) -> Aggregate:
        """All sites' vectors and labels, each once."""
        rows: list[Any] = []
        weight, metrics = 0.0, {}
        for update in updates:
            vectors, labels = _unpacked({n: t.numpy() for n, t in update.tensors["params"].items()})
            rows.append(np.column_stack([vectors, labels]))
            weight += self.weight(update)
            metrics[update.site] = dict(update.metrics)
        union = torch.from_numpy(np.unique(np.concatenate(rows), axis=0))
        return Aggregate({"union": {"vectors": union[:, :-1], "labels": union[:, -1]}}, weight, len(metrics), metrics)

    def server_update(self, state: SVMState, aggregate: Aggregate, ctx: RoundContext) -> SVMState:
        union = aggregate.tensors["union"]
        room = {name: t.numpy() for name, t in state.params.items()}
        found = _support(union["vectors"].numpy(), union["labels"].numpy(), self.kernel, room)
        return SVMState({name: torch.from_numpy(array) for name, array in found.items()})

    def site_update(
        self, broadcast: Groups, site_state: NoState, work: Training, ctx: RoundContext
    ) -> tuple[Update, NoState]:
        local = work.train(broadcast, ctx)
        return local.update(ctx, {"params": local.params}), site_state
