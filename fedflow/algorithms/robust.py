"""Robust reductions: what a few sites can do to the mean of the model, bounded. An option of every averaging algorithm.

n updates yᵢ with weights wᵢ, f of them from attackers. All but clipping do the same to yᵢ as to yᵢ − x. Distances run over
trainable parameters; who is left out by them is left out of buffers too. What an algorithm sends besides the model (control
variates, scalars) takes the plain weighted mean.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from fedflow.algorithm import weighted_mean
from fedflow.described import Described
from fedflow.tensors import squared_norm
from fedflow.types import Aggregate, Tensors, Update

__all__ = [
    "AnyReduction",
    "Bulyan",
    "GeometricMedian",
    "Krum",
    "Mean",
    "Median",
    "MultiKrum",
    "NormClip",
    "Reduction",
    "TrimmedMean",
    "figures",
    "reduced",
]

MODEL = ("params", "delta", "frozen", "buffers")
"""Groups that are reduced robustly."""

Attackers = Annotated[int, Field(ge=0, strict=True)]


class Reduction(Described, ABC):
    """n updates -> one. By default the weighted mean; a subclass chooses who counts, or how values are combined."""

    kind: str
    measured: ClassVar[Literal["nothing", "distances", "norms"]] = "nothing"
    """The figure over all tensors that it needs first: (n, n) squared distances, or (n,) squared norms of yᵢ − x."""

    def least(self) -> int:
        """The smallest n for which it keeps its promise."""
        return 1

    def shares(self, figure: Tensor, weights: Tensor) -> Tensor:
        """(n,) what each update counts; 0: it is left out."""
        return weights

    def factors(self, figure: Tensor) -> Tensor:
        """(n,) what yᵢ − x is multiplied by."""
        return torch.ones(len(figure), dtype=torch.float64)

    def combine(self, values: Tensor, shares: Tensor) -> Tensor:
        """(k, ...) values of those that count, and their (k,) shares -> (...)"""
        total = shares[0] * values[0]
        for share, value in zip(shares[1:], values[1:], strict=True):
            total = total + share * value
        return total / shares.sum()


class Mean(Reduction):
    """Σ wᵢ yᵢ / Σ wᵢ: what the algorithms' papers do. One attacker decides it."""

    kind: Literal["mean"] = "mean"


class Median(Reduction):
    """Coordinate-wise median, unweighted (Yin et al., arXiv:1803.01498, Definition 1)."""

    kind: Literal["median"] = "median"

    def combine(self, values: Tensor, shares: Tensor) -> Tensor:
        return _median(values)


class TrimmedMean(Reduction):
    """Coordinate-wise mean without the f largest and the f smallest values, unweighted (Yin et al., arXiv:1803.01498,
    Definition 2, with f = βn)."""

    kind: Literal["trimmed_mean"] = "trimmed_mean"
    byzantine: Attackers
    """f: attackers to withstand."""

    def least(self) -> int:
        return 2 * self.byzantine + 1

    def combine(self, values: Tensor, shares: Tensor) -> Tensor:
        ordered = values.sort(dim=0).values
        return _mean(ordered[self.byzantine : len(ordered) - self.byzantine])


class GeometricMedian(Reduction):
    """The z that minimises Σ wᵢ ‖z − yᵢ‖, by smoothed Weiszfeld steps (Pillutla et al., "Robust Aggregation for Federated
    Learning", arXiv:1912.13445, Algorithm 2): z ← Σ βᵢ yᵢ / Σ βᵢ with βᵢ = wᵢ / max(ν, ‖z − yᵢ‖)."""

    kind: Literal["geometric_median"] = "geometric_median"
    measured: ClassVar[Literal["nothing", "distances", "norms"]] = "distances"
    iterations: Annotated[int, Field(ge=1, strict=True)] = 100
    """Steps. The paper takes 3, where each is an exchange with the sites; here they cost nothing."""
    smoothing: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6
    """ν; 1e-6 in the paper."""

    def shares(self, figure: Tensor, weights: Tensor) -> Tensor:
        """z is a mean with shares s, and ‖z − yⱼ‖² = Σ sᵢ Dᵢⱼ − ½ Σ sᵢ Dᵢₖ sₖ."""
        s = weights / weights.sum()
        for _ in range(self.iterations):
            row = (figure * s).sum(dim=1)
            distances = (row - (row * s).sum() / 2).clamp(min=0).sqrt()
            s = weights / distances.clamp(min=self.smoothing)
            s = s / s.sum()
        return s


class Krum(Reduction):
    """The update with the smallest sum of squared distances to its n − f − 2 nearest (Blanchard et al., "Machine Learning
    with Adversaries", NeurIPS 2017, arXiv:1703.02757, section 4)."""

    kind: Literal["krum"] = "krum"
    measured: ClassVar[Literal["nothing", "distances", "norms"]] = "distances"
    byzantine: Attackers
    """f: attackers to withstand; n ≥ 2f + 3."""

    def least(self) -> int:
        return 2 * self.byzantine + 3

    def shares(self, figure: Tensor, weights: Tensor) -> Tensor:
        return _among(krum_order(figure, self.byzantine)[:1], len(figure))


class MultiKrum(Krum):
    """The mean of the `select` updates with the smallest Krum scores (Blanchard et al., arXiv:1703.02757, section 5)."""

    kind: Literal["multi_krum"] = "multi_krum"  # type: ignore[assignment]
    select: Annotated[int, Field(ge=1, strict=True)] | None = None
    """m; default n − f: ours."""

    def least(self) -> int:
        return max(super().least(), self.select or 0)

    def shares(self, figure: Tensor, weights: Tensor) -> Tensor:
        n = len(figure)
        return _among(krum_order(figure, self.byzantine)[: self.select or n - self.byzantine], n)


class Bulyan(Krum):
    """Krum picks θ = n − 2f updates one after the other; of these, per coordinate, the mean of the θ − 2f values next to
    the median (El Mhamdi et al., "The Hidden Vulnerability of Distributed Learning in Byzantium", arXiv:1802.07927, section 4)."""

    kind: Literal["bulyan"] = "bulyan"  # type: ignore[assignment]
    byzantine: Attackers
    """f: attackers to withstand; n ≥ 4f + 3."""

    def least(self) -> int:
        return 4 * self.byzantine + 3

    def shares(self, figure: Tensor, weights: Tensor) -> Tensor:
        left = list(range(len(figure)))
        picked: list[int] = []
        while len(picked) < len(figure) - 2 * self.byzantine:
            best = krum_order(figure[left][:, left], self.byzantine)[0]
            picked.append(left.pop(best))
        return _among(picked, len(figure))

    def combine(self, values: Tensor, shares: Tensor) -> Tensor:
        near = (values - _median(values)).abs().sort(dim=0, stable=True).indices
        return _mean(values.gather(0, near[: len(values) - 2 * self.byzantine]))


class NormClip(Reduction):
    """The weighted mean of differences yᵢ − x scaled down to norm `max_norm` where they are longer (Sun et al., "Can You
    Really Backdoor Federated Learning?", arXiv:1911.07963, section 4)."""

    kind: Literal["norm_clip"] = "norm_clip"
    measured: ClassVar[Literal["nothing", "distances", "norms"]] = "norms"
    max_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """M, over all trainable parameters."""

    def factors(self, figure: Tensor) -> Tensor:
        return (self.max_norm / figure.sqrt()).clamp(max=1.0)


def _named(value: Any) -> Any:
    """A bare name stands for its defaults."""
    return {"kind": value} if isinstance(value, str) else value


AnyReduction = Annotated[
    Mean | Median | TrimmedMean | GeometricMedian | Krum | MultiKrum | Bulyan | NormClip,
    Field(discriminator="kind"),
    BeforeValidator(_named),
]


# -- the two passes over the updates -----------------------------------------------------------------------------------
def figures(reduction: Reduction, updates: Iterable[Update]) -> dict[str, Tensor]:
    """What `reduction` measures, by tensor name: to be summed over the names."""
    values: dict[str, list[Tensor]] = {}
    for update in updates:
        for name, tensor in update.tensors.get("delta", update.tensors.get("params", {})).items():
            values.setdefault(name, []).append(tensor.double())
    if reduction.measured == "norms":
        return {n: torch.tensor([squared_norm(v) for v in vs], dtype=torch.float64) for n, vs in values.items()}
    return {name: _distances(vs) for name, vs in values.items()}


def reduced(
    reduction: Reduction, updates: Iterable[Update], weight: Callable[[Update], float], measured: Tensors
) -> Aggregate:
    """Like `weighted_mean`, with the model's groups by `reduction`. measured: its `figures`, of all names."""
    given = list(updates)
    plain = weighted_mean(iter(given), weight)
    weights = torch.tensor([weight(u) for u in given], dtype=torch.float64)
    figure = _total(measured, weights)
    shares, factors = reduction.shares(figure, weights), reduction.factors(figure)
    groups = dict(plain.tensors)
    for group in set(MODEL) & groups.keys():
        scale = factors if group == "delta" else torch.ones_like(factors)
        combined: dict[str, Tensor] = {}
        for name in plain.tensors[group]:
            of = [i for i, u in enumerate(given) if name in u.tensors[group] and shares[i] > 0]
            if of:  # else those that count sent none, and it stays
                values = torch.stack([given[i].tensors[group][name].double() * scale[i] for i in of])
                combined[name] = reduction.combine(values, shares[of])
        groups[group] = combined
    return replace(plain, tensors=groups)


def _total(measured: Tensors, weights: Tensor) -> Tensor:
    """Σ over the names, in their order."""
    total = torch.zeros_like(weights)
    for name in sorted(measured):
        total = total + measured[name]
    return total


def _distances(values: Sequence[Tensor]) -> Tensor:
    """(n, n) squared distances."""
    found = torch.zeros(len(values), len(values), dtype=torch.float64)
    for i, a in enumerate(values):
        for j, b in enumerate(values[:i]):
            found[i, j] = found[j, i] = squared_norm(a - b)
    return found


def krum_order(distances: Tensor, f: int) -> list[int]:
    """Updates by Krum score, best first, ties in site order: Σ of squared distances to the n − f − 2 nearest others."""
    n = len(distances)
    nearest = distances.sort(dim=1).values[:, 1 : 1 + max(n - f - 2, 1)]  # the first is the update itself
    return sorted(range(n), key=lambda i: (math.fsum(nearest[i].tolist()), i))


def _mean(values: Tensor) -> Tensor:
    """Over the first dimension, one row after the other: torch's own order of a sum depends on how many columns there are, and
    so on how the names are partitioned."""
    total = values[0].clone()
    for row in values[1:]:
        total += row
    return total / len(values)


def _among(picked: Sequence[int], n: int) -> Tensor:
    shares = torch.zeros(n, dtype=torch.float64)
    shares[list(picked)] = 1.0
    return shares


def _median(values: Tensor) -> Tensor:
    """Along the first axis; of an even number the mean of the two in the middle."""
    ordered, n = values.sort(dim=0).values, len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
