"""The contracts: what an algorithm and a schedule are. Anything that fulfils them runs in every environment.

A run is Algorithm × Schedule × Workload. Nothing in the engine asks which one it runs. All three are *pure*: what an
algorithm needs next round lives in its state S (server) or C (site), frozen dataclasses of tensor mappings and scalars,
never in `self`, a closure or a process; the engine stores them and commits them with the round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fedflow.tensors import WeightedMean, cast, interpolate
from fedflow.types import (
    Aggregate,
    FederationView,
    Groups,
    RoundContext,
    RoundPlan,
    Spec,
    Tensors,
    Update,
)

__all__ = [
    "NO_CORRECTION",
    "NO_MERGE",
    "SMALL",
    "Algorithm",
    "Correction",
    "LocalResult",
    "Merge",
    "NoState",
    "Schedule",
    "Training",
    "Transform",
    "weighted_mean",
]


@dataclass(frozen=True)
class NoState:
    """The state of an algorithm that remembers nothing at its sites."""


SMALL: Mapping[str, bool] = {"small": True}
"""`field(metadata=SMALL)`: a field of a state whose tensors are a few bytes a name, and are there with their values where
others have only shapes and dtypes."""


@dataclass(frozen=True)
class LocalResult:
    """What local training leaves behind.

    params, frozen, buffers: the model after training, by group
    examples: examples in the site's training data; steps: completed optimizer steps K; lr_sum: Σ lr over them
    metrics:  numbers for people, also of evaluations before and after the training
    """

    params: Tensors
    frozen: Tensors
    buffers: Tensors
    examples: int
    steps: int
    lr_sum: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    numerics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> Groups:
        """The model after training."""
        return {"params": self.params, "frozen": self.frozen, "buffers": self.buffers}

    def update(self, ctx: RoundContext, tensors: Groups, scalars: Mapping[str, float] | None = None) -> Update:
        """This result as the update of `ctx.site`, with `tensors` as its payload."""
        assert ctx.site is not None
        return Update(
            site=ctx.site,
            base_round=ctx.round,
            examples=self.examples,
            steps=self.steps,
            lr_sum=self.lr_sum,
            tensors=tensors,
            scalars=scalars or {},
            metrics=self.metrics,
            numerics=self.numerics,
        )


@dataclass(frozen=True)
class Correction:
    """What an algorithm adds to the gradient g of every trainable parameter w, x being the broadcast: g + offset + proximal·(w − x).

    Said, not done, so that whoever trains (a loop, hooks in foreign code, vectorised sites) can apply it.

    offset:     constant over the round, by parameter name; a name that is absent gets none
    proximal:   μ of a proximal term μ/2·‖w − x‖²
    apply:      "gradient": before the optimizer reads it; "after_step": w ← w − lr·(offset + proximal·(w − x)) afterwards
    assumes_sgd: whether the mathematics hold for plain SGD only: momentum is warned of, adaptive optimizers are refused
    """

    offset: Tensors = field(default_factory=dict)
    proximal: float = 0.0
    apply: Literal["gradient", "after_step"] = "gradient"
    assumes_sgd: bool = False

    def __bool__(self) -> bool:
        """Whether it changes anything: without, the training must be that of FedAvg to the bit."""
        return bool(self.offset) or self.proximal != 0.0


NO_CORRECTION = Correction()
"""Plain training: FedAvg's."""


@dataclass(frozen=True)
class Merge:
    """What an algorithm brings into the parameters in the middle of a training: w ← keep·w + (1 − keep)·value.

    Said, not done, as a correction is.

    values: by parameter name; a parameter that is absent stays
    after:  completed optimizer steps at which it happens; the training goes on for at least one more
    keep:   share of the parameter's own value, 0 … 1
    """

    values: Tensors = field(default_factory=dict)
    after: int = 0
    keep: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.values)

    def into(self, own: Tensors) -> dict[str, Tensor]:
        """`own` after it: in float64, rounded once; at keep 0 and 1 the values and `own` to the bit."""
        into = {n: v.to(own[n].device) for n, v in self.values.items()}
        return {n: cast(interpolate(into[n], w, self.keep), w.dtype) if n in into else w for n, w in own.items()}


NO_MERGE = Merge()
"""Nothing is brought in."""


@runtime_checkable
class Training(Protocol):
    """The work that training algorithms are given at a site: the broadcast model (groups "params", "frozen", "buffers") and
    the site's data."""

    def train(
        self,
        broadcast: Groups,
        ctx: RoundContext,
        *,
        correction: Correction = NO_CORRECTION,
        steps: int | None = None,
        preserve: bool = False,
        merge: Merge = NO_MERGE,
    ) -> LocalResult:
        """Train from `broadcast` as the recipe says for `ctx.site`.

        steps:    exactly so many completed optimizer steps, in place of the recipe's epochs or steps
        preserve: go on with the optimizer, schedule, random state and place in the data of the site's last accepted update
        merge:    what the parameters take in on the way
        """
        ...

    def gradient(self, broadcast: Groups, ctx: RoundContext) -> Tensors:
        """The gradient of the mean loss over all of the site's data at `broadcast`, by parameter name.

        Raises SiteError where the site's code cannot be asked for it (a training function, a script).
        """
        ...

    def loss(self, broadcast: Groups, ctx: RoundContext) -> float:
        """The mean loss over all of the site's data at `broadcast`. Raises SiteError as `gradient` does."""
        ...


class Algorithm(BaseModel):
    """The mathematics of one round. Subclasses are frozen pydantic models that hold hyperparameters only.

    A subclass sets `kind: Literal["..."] = "..."`, `State`, and where its sites remember something `SiteState`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: str
    phases: ClassVar[tuple[str, ...]] = ("train",)
    """Exchanges within a round, in order; each has its own openings, closing and commit."""
    partitionable: ClassVar[bool] = True
    """Whether tensor names may be aggregated in any partition (same bits for every one)."""
    by_rows: ClassVar[bool] = True
    """Whether that holds for the rows of a tensor too, which tensors larger than the memory budget are split by."""
    State: ClassVar[type[Any]]
    """S: frozen dataclass of `Tensors` and JSON scalars, the server's memory."""
    SiteState: ClassVar[type[Any]] = NoState
    """C: the same for a site's memory."""
    renewable: ClassVar[bool] = False
    """Whether a site that lost its state may begin anew, by `init_site`: nothing elsewhere was computed from what it held.
    Otherwise it is excluded until the state is there again."""

    # -- before a run
    def objections(self, training: Any) -> list[str]:
        """What speaks against this local training (the recipe's, or a site's): each names the field and the fix."""
        return []

    # -- at the server
    def init(self, model: Groups) -> Any:
        """S before round 0, from the initial model's groups "params", "frozen", "buffers"."""
        raise NotImplementedError

    def model(self, state: Any) -> Groups:
        """The global model in S: what is evaluated, exported and digested."""
        raise NotImplementedError

    def broadcast(self, state: Any, phase: str) -> Groups:
        """The part of S that sites see in `phase`; by default the model."""
        return self.model(state)

    def expects(self, state: Any, phase: str) -> Spec:
        """Groups, names, shapes and dtypes of a valid update in `phase`. The tensors of `state` may have shapes and dtypes but
        no values, as those of a model would have to be read for nothing; fields that are `SMALL` have them."""
        raise NotImplementedError

    partial_updates: ClassVar[bool] = False
    """Whether an update may leave out tensors that `expects` names."""

    def weight(self, update: Update) -> float:
        """The weight of `update` (its tensors may be absent). Not finite or not positive: the update is excluded."""
        raise NotImplementedError

    def decode(self, update: Update, state: Any, phase: str) -> Update:
        """`update` as `measure` and `aggregate` read it, whatever part of it and of `state` is there."""
        return update

    @property
    def least_updates(self) -> int:
        """The fewest updates that a round can be made of; a smaller quorum is refused before any training."""
        return 1

    @property
    def gathers(self) -> bool:
        """Whether `measure` and `aggregate` hold all updates at once: they are then given smaller parts."""
        return False

    @property
    def measures(self) -> bool:
        """Whether `measure` is to be called: it reads every update once more."""
        return type(self).measure is not Algorithm.measure

    def measure(self, updates: Iterable[Update], ctx: RoundContext) -> Tensors:
        """A global figure over all updates before `aggregate`, additive over buckets of names; `ctx.measured` there."""
        return {}

    def aggregate(self, updates: Iterable[Update], ctx: RoundContext) -> Aggregate:
        """Reduce the contributors' updates, given in site order; by default the weighted mean of every group."""
        return weighted_mean(updates, self.weight)

    def server_update(self, state: Any, aggregate: Aggregate, ctx: RoundContext) -> Any:
        """S after this phase. Called on a part of the names at a time; scalars must come out equal from every part."""
        raise NotImplementedError

    def report(self, state: Any, updates: int) -> str | None:
        """A line for the log about the step that made `state` of so many updates; none by default. Of `state` as in `expects`."""
        return None

    # -- at a site
    def init_site(self, broadcast: Groups, work: Any, ctx: RoundContext) -> Any:
        """C at first participation."""
        return self.SiteState()

    def site_update(self, broadcast: Groups, site_state: Any, work: Any, ctx: RoundContext) -> tuple[Update, Any]:
        """The site's part of `ctx.phase`: its update, and C if that update is accepted."""
        raise NotImplementedError


class Transform(BaseModel):
    """What happens to an update on its way out, undone at the server before the reduction; and to the broadcast.

    Subclasses are frozen pydantic models, as algorithms are. What a site must remember lives in C, and commits with the
    site's update. Transforms are applied in the recipe's order, and undone in the reverse one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: str
    by_rows: ClassVar[bool] = False
    """Whether rows of an update can be decoded apart."""
    SiteState: ClassVar[type[Any]] = NoState
    """C: frozen dataclass of `Tensors` and JSON scalars, a site's memory."""

    def encoded(self, spec: Spec) -> Spec:
        """What an update of `spec` becomes. Raises RecipeError, before any training, where it cannot be transformed."""
        return spec

    def init_site(self, broadcast: Groups) -> Any:
        """C at first participation."""
        return self.SiteState()

    def at_site(self, update: Update, state: Any, ctx: RoundContext) -> tuple[Update, Any]:
        """`update` as it is sent, and C if it is accepted."""
        return update, state

    def decode(self, update: Update, spec: Spec) -> Update:
        """What was sent, by one site and as far as it is there, in `spec` again. Raises UpdateInvalid where it cannot be."""
        return update

    def at_broadcast(self, groups: Groups) -> Groups:
        """The broadcast as it is sent."""
        return groups

    def at_arrival(self, groups: Groups) -> Groups:
        """The broadcast as a site trains from it."""
        return groups


class Schedule(BaseModel):
    """Who takes part in a round, and how many close it. Pure in its arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: str

    def plan(self, round: int, view: FederationView, seed: int) -> RoundPlan:
        """The cohort of `round` among the sites that `view` shows online, and how many updates close it."""
        raise NotImplementedError


def weighted_mean(updates: Iterable[Update], weight: Callable[[Update], float]) -> Aggregate:
    """The weighted mean of every group over the fixed tree of `WeightedMean`, in float64, one update in memory."""
    means: dict[str, WeightedMean] = {}
    scalars: dict[str, float] = {}
    total, metrics = 0.0, {}
    for update in updates:
        w = weight(update)
        for group, tensors in update.tensors.items():
            means.setdefault(group, WeightedMean()).add(tensors, w)
        for name, value in update.scalars.items():
            scalars[name] = scalars.get(name, 0.0) + w * value
        total += w
        metrics[update.site] = dict(update.metrics)
    reduced = {group: mean.means() for group, mean in means.items()}
    return Aggregate(reduced, total, len(metrics), metrics, {name: s / total for name, s in scalars.items()})
