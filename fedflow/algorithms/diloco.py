"""DiLoCo: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", arXiv:2311.08105,
Algorithm 1.

    site i:  yᵢ ← H steps of the inner optimizer from x; it goes on where it stopped in its last round
    server:  g ← − Σ pᵢ (yᵢ − x)                         the outer gradient: it is subtracted
             m ← g in the first round, then β m + g
             x ← x − lr · direction                      g (sgd), m (sgdm), g + β m (nesterov)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from torch import Tensor

from fedflow.algorithm import Training
from fedflow.algorithms.averaging import Averaging, ModelState, Rate, averaged, mean_delta, wire
from fedflow.algorithms.sgd import sgd_step
from fedflow.types import Aggregate, Groups, RoundContext, Tensors, Update

__all__ = ["DiLoCo", "DiLoCoState"]


@dataclass(frozen=True)
class DiLoCoState(ModelState):
    """x, and the outer momentum by tensor name; no name has any before the first step."""

    momentum: Tensors


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


class DiLoCo(Averaging):
    """Few, long rounds: an inner optimizer that keeps its state, and Nesterov momentum at the server.

    An update of a site without examples does not count, whatever the weighting. Momentum is kept per tensor: it starts anew
    where a tensor's shape or dtype changed, and goes where the tensor is gone.
    """

    kind: Literal["diloco"] = "diloco"
    State: ClassVar[type[Any]] = DiLoCoState

    outer_optimizer: Annotated[Literal["sgd", "sgdm", "nesterov"], BeforeValidator(_lower)] = "nesterov"
    """As torch.optim.SGD: plain, with momentum, with Nesterov's; nesterov in the paper. Any case."""
    outer_learning_rate: Rate = 0.7
    """0.7 in the paper."""
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """β; 0.9 in the paper. Not used by sgd."""
    aggregation_weighting: Literal["uniform", "num_samples"] = "uniform"
    """pᵢ: 1/|S| as in the paper, or by examples."""
    apply_outer_optimizer_to: Literal["parameters", "all_floating"] = "parameters"
    """What the outer optimizer steps: trainable floating parameters, or every floating tensor; all else takes the plain
    mean."""
    local_steps_per_round: Annotated[int, Field(ge=1, strict=True)] | None = None
    """H, 500 in the paper. Default: as `training` says."""
    preserve_optimizer_state: bool = True
    """Whether a site's optimizer, learning rate schedule, random state and place in the data go on from round to round; they
    do in the paper."""

    @property
    def local_steps(self) -> int | None:
        return self.local_steps_per_round

    def objections(self, training: Any) -> list[str]:
        H = self.local_steps_per_round
        if H is None or training.steps in (None, H):
            return []
        return [
            f"training.steps ({training.steps}) contradicts algorithm.local_steps_per_round ({H}); give one of them"
        ]

    # -- server
    def init(self, model: Groups) -> DiLoCoState:
        self.check(model)
        return DiLoCoState(model["params"], model["frozen"], model["buffers"], momentum={})

    def weight(self, update: Update) -> float:
        if update.examples <= 0:
            return 0.0
        return update.examples if self.aggregation_weighting == "num_samples" else 1.0

    def server_update(self, state: DiLoCoState, aggregate: Aggregate, ctx: RoundContext) -> DiLoCoState:
        plain = averaged(state, aggregate)
        groups = {group: dict(tensors) for group, tensors in self.model(plain).items()}
        momentum = self._still_fitting(state)
        for group, name, g, y in self._outer_gradients(state, aggregate):
            groups[group][name], m = sgd_step(
                getattr(state, group)[name],
                g,
                momentum.get(name),
                lr=self.outer_learning_rate,
                momentum=0.0 if self.outer_optimizer == "sgd" else self.outer_momentum,
                nesterov=self.outer_optimizer == "nesterov",
                y=y,
            )
            momentum |= {} if m is None else {name: m}
        return replace(plain, **groups, momentum=momentum)

    def _outer_gradients(
        self, state: DiLoCoState, aggregate: Aggregate
    ) -> Iterator[tuple[str, str, Tensor, Tensor | None]]:
        """(group, name, g, mean of the yᵢ if they were sent) of every tensor that the outer optimizer steps."""
        ends = aggregate.tensors.get("params", {})
        for name, delta in mean_delta(state.params, aggregate).items():
            yield "params", name, -delta, ends.get(name)
        if self.apply_outer_optimizer_to == "all_floating":
            for group in ("frozen", "buffers"):
                x = getattr(state, group)
                for name, mean in aggregate.tensors.get(group, {}).items():
                    if x[name].is_floating_point():
                        yield group, name, x[name].double() - mean.double(), mean

    def _still_fitting(self, state: DiLoCoState) -> dict[str, Tensor]:
        """Momentum of tensors that are still there, in the shape and dtype that it was made for."""
        now = {n: (t.shape, wire(t.dtype)) for tensors in self.model(state).values() for n, t in tensors.items()}
        return {n: m for n, m in state.momentum.items() if now.get(n) == (m.shape, m.dtype)}

    def report(self, state: DiLoCoState, updates: int) -> str:
        stepped = dict(state.params)
        if self.apply_outer_optimizer_to == "all_floating":
            stepped |= {n: b for n, b in state.buffers.items() if b.is_floating_point()}
        return (
            f"outer step: {self.outer_optimizer}, learning rate {self.outer_learning_rate:g}, momentum {self.outer_momentum:g}, "
            f"weighting {self.aggregation_weighting}, on {self.apply_outer_optimizer_to}; {updates} updates, "
            f"{len(self.shared(stepped))} tensors"
        )

    # -- site
    def site_update(self, broadcast: Groups, site_state: Any, work: Training, ctx: RoundContext) -> tuple[Update, Any]:
        start = self.start(broadcast, site_state)
        local = work.train(start, ctx, steps=self.local_steps_per_round, preserve=self.preserve_optimizer_state)
        return local.update(ctx, self.payload(start, local)), self.kept(local)
