"""What the algorithms that average have in common: which tensors travel, what a site keeps, and Σ pᵢ (yᵢ − x).

An algorithm's own file says what it does with them. x: the model at the server; yᵢ: the model after the training of
site i; S: the contributors; pᵢ = wᵢ / Σ w over S.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedflow.algorithm import Algorithm, LocalResult, NoState, Training, weighted_mean
from fedflow.algorithms.robust import AnyReduction, Mean, figures, reduced
from fedflow.errors import RecipeError, field_error
from fedflow.tensors import cast, interpolate
from fedflow.types import (
    MODEL_GROUPS,
    Aggregate,
    Groups,
    RoundContext,
    SiteId,
    Spec,
    Tensors,
    TensorSpec,
    Update,
    spec_of,
)

__all__ = [
    "Averaging",
    "ModelState",
    "Personal",
    "Rate",
    "WeightedAveraging",
    "averaged",
    "mean_delta",
    "model_groups",
    "moved",
    "wire",
]

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A learning rate: finite, not negative."""


@dataclass(frozen=True)
class ModelState:
    """x: trainable parameters, frozen parameters, and the persistent rest (BatchNorm statistics, counters)."""

    params: Tensors
    frozen: Tensors
    buffers: Tensors


@dataclass(frozen=True)
class Personal:
    """What a site remembers where tensors are personal: their values after its last training that counted."""

    personal: Tensors


class Averaging(Algorithm):
    """Sites train from the model, and the server takes a mean of what comes back; each site weighs 1.

    Buffers take the plain mean: floats in float64, rounded once; integers half to even; booleans by majority of weight.
    Frozen parameters go out, are held at their value, and do not come back.
    """

    State: ClassVar[type[Any]] = ModelState

    transfer: Literal["full", "delta"] = "full"
    """What travels back: y (one site at η_g = 1 gives back y to the bit), or y − x in float32 (float64 for float64
    parameters), where x + (y − x) can differ from y by a unit in the last place of the larger of the two."""
    frozen: Literal["hold", "average"] = "hold"
    """Whether parameters with requires_grad False are held or averaged like the rest."""
    personal: list[Annotated[str, Field(min_length=1)]] = []
    """Patterns of names ("head.*", "*.bn.*") of tensors that stay at their site: never sent, kept in its state. None in the
    papers of the algorithms; BatchNorm in FedBN (arXiv:2102.07623), the head in FedPer (1912.00818) and FedRep (2102.07078)."""

    reduction: AnyReduction = Mean()
    """How the model's tensors become one: the papers' mean, or a robust reduction against sites that send what harms."""

    @model_validator(mode="after")
    def _reducible(self) -> Self:
        if self.reduction.measured == "norms" and self.transfer != "delta":
            raise ValueError(
                f"reduction: {self.reduction.kind} needs differences; set transfer: delta (found {self.transfer})"
            )
        return self

    @property
    def SiteState(self) -> type[Any]:  # type: ignore[override]
        """Nothing is kept at a site unless something is personal."""
        return Personal if self.personal else NoState

    # -- server
    def init(self, model: Groups) -> Any:
        self.check(model)
        return ModelState(model["params"], model["frozen"], model["buffers"])

    def check(self, model: Groups) -> None:
        """Raises RecipeError where `personal` does not fit the model."""
        names = [name for tensors in model.values() for name in tensors]
        for pattern in self.personal:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise RecipeError(
                    field_error(
                        "algorithm.personal", pattern, f"a pattern of names such as {names[:4]}", "correct the pattern"
                    )
                )
        if model["params"] and not self.shared(model["params"]):
            raise RecipeError(
                field_error("algorithm.personal", self.personal, "something left to share", "name fewer tensors")
            )

    def model(self, state: Any) -> Groups:
        return {"params": state.params, "frozen": state.frozen, "buffers": state.buffers}

    def expects(self, state: Any, phase: str) -> Spec:
        spec = spec_of({"params": self.shared(state.params), "buffers": self.shared(state.buffers)})
        if self.transfer == "delta":
            spec["delta"] = {n: TensorSpec(s.shape, wire(s.dtype)) for n, s in spec.pop("params").items()}
        if self.frozen == "average":
            spec |= spec_of({"frozen": self.shared(state.frozen)})
        return spec

    def weight(self, update: Update) -> float:
        return 1.0

    @property
    def least_updates(self) -> int:
        return self.reduction.least()

    @property
    def gathers(self) -> bool:
        return not isinstance(self.reduction, Mean)

    @property
    def measures(self) -> bool:
        return self.reduction.measured != "nothing"

    def measure(self, updates: Iterable[Update], ctx: RoundContext) -> Tensors:
        return figures(self.reduction, updates)

    @property
    def averages(self) -> bool:
        return type(self).aggregate is Averaging.aggregate and isinstance(self.reduction, Mean)

    def aggregate(self, updates: Iterable[Update], ctx: RoundContext) -> Aggregate:
        if isinstance(self.reduction, Mean):
            return weighted_mean(updates, self.weight)
        return reduced(self.reduction, updates, self.weight, ctx.measured)

    # -- site
    def init_site(self, broadcast: Groups, work: Training, ctx: RoundContext) -> Any:
        return Personal(self.own(model_groups(broadcast))) if self.personal else NoState()

    def site_update(self, broadcast: Groups, site_state: Any, work: Training, ctx: RoundContext) -> tuple[Update, Any]:
        start = self.start(broadcast, site_state)
        local = work.train(start, ctx)
        return local.update(ctx, self.payload(start, local)), self.kept(local)

    def start(self, broadcast: Groups, site_state: Any) -> Groups:
        """The model that a site trains from: what it was sent, with what is its own in its place."""
        if not self.personal:
            return model_groups(broadcast)
        own: Tensors = site_state.personal
        return {g: {n: own.get(n, t) for n, t in tensors.items()} for g, tensors in model_groups(broadcast).items()}

    def payload(self, start: Groups, local: LocalResult) -> dict[str, Tensors]:
        """What travels back of the model after training: nothing personal, and frozen parameters only to be averaged."""
        sent: dict[str, Tensors] = {"buffers": self.shared(local.buffers)}
        if self.transfer == "delta":
            sent["delta"] = {n: cast(d, wire(local.params[n].dtype)) for n, d in self.delta(start, local).items()}
        else:
            sent["params"] = self.shared(local.params)
        if self.frozen == "average":
            sent["frozen"] = self.shared(local.frozen)
        return sent

    def delta(self, start: Groups, local: LocalResult) -> dict[str, Tensor]:
        """y − x in float64, of the shared parameters."""
        return {n: y.double() - start["params"][n].double() for n, y in self.shared(local.params).items()}

    def kept(self, local: LocalResult) -> Any:
        """The site's state after training."""
        return Personal(self.own(local.groups)) if self.personal else NoState()

    # -- both
    def shared(self, tensors: Tensors) -> Tensors:
        """Those of `tensors` that are not personal."""
        return {n: t for n, t in tensors.items() if not self._is_personal(n)} if self.personal else tensors

    def own(self, groups: Groups) -> dict[str, Tensor]:
        """Those of a model's tensors that are personal."""
        return {n: t for tensors in groups.values() for n, t in tensors.items() if self._is_personal(n)}

    def _is_personal(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.personal)


class WeightedAveraging(Averaging):
    """`Averaging` where pᵢ is a choice."""

    weight_by: Literal["examples", "steps", "uniform"] = "examples"
    """wᵢ: examples at the site (the paper's n_k), completed optimizer steps, or 1."""
    aggregation_weights: dict[SiteId, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    """A factor on wᵢ per site; 1 where a site is not named."""

    def weight(self, update: Update) -> float:
        by = {"examples": update.examples, "steps": update.steps, "uniform": 1}[self.weight_by]
        return by * self.aggregation_weights.get(update.site, 1.0)


def model_groups(broadcast: Groups) -> Groups:
    """The model in what a site was sent."""
    return {group: broadcast[group] for group in MODEL_GROUPS}


def wire(dtype: torch.dtype) -> torch.dtype:
    """What differences of a parameter of `dtype` travel in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mean_delta(x: Tensors, aggregate: Aggregate) -> dict[str, Tensor]:
    """Σ pᵢ (yᵢ − x) in float64, by the names that were sent."""
    if "delta" in aggregate.tensors:
        return {name: d.double() for name, d in aggregate.tensors["delta"].items()}
    return {name: y.double() - x[name].double() for name, y in aggregate.tensors.get("params", {}).items()}


def moved(x: Tensors, aggregate: Aggregate, rate: float = 1.0) -> dict[str, Tensor]:
    """x + rate·Σ pᵢ (yᵢ − x), rounded once; at rate 1 the mean of the yᵢ to the bit. What nobody sent stays."""
    if "delta" in aggregate.tensors:
        delta = aggregate.tensors["delta"]
        return {n: cast(t.double() + rate * delta[n].double(), t.dtype) if n in delta else t for n, t in x.items()}
    y = aggregate.tensors.get("params", {})
    return {n: cast(interpolate(t, y[n], rate), t.dtype) if n in y else t for n, t in x.items()}


S = TypeVar("S", bound=ModelState)


def averaged(state: S, aggregate: Aggregate, **changes: Any) -> S:
    """`state` with the plain means of buffers and, where they were sent, frozen parameters; and with `changes`."""
    mean = aggregate.tensors
    frozen, buffers = (
        _replaced(old, mean.get(g, {})) for g, old in (("frozen", state.frozen), ("buffers", state.buffers))
    )
    return replace(state, **{"frozen": frozen, "buffers": buffers, **changes})


def _replaced(old: Tensors, mean: Mapping[str, Tensor]) -> Tensors:
    """`mean` in the dtypes of `old`; tensors that nobody sent stay."""
    return {name: cast(mean[name], tensor.dtype) if name in mean else tensor for name, tensor in old.items()}
