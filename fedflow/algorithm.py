"""The contracts: what an algorithm and a schedule are. Anything that fulfils them runs in every environment.

A run is Algorithm × Schedule × Workload. Nothing in the engine asks which one it runs. All three are *pure*: what an
algorithm needs next round lives in its state S (server) or C (site), frozen dataclasses of tensor mappings and scalars,
never in `self`, a closure or a process; the engine stores them and commits them with the round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from fedflow.described import Described
from fedflow.errors import RecipeError, field_error
from fedflow.tensors import Packed, WeightedMean, cast, interpolate
from fedflow.types import (
    Aggregate,
    FederationView,
    Groups,
    Result,
    RoundContext,
    RoundPlan,
    SiteId,
    Spec,
    Tensors,
    Update,
)

__all__ = [
    "NO_CORRECTION",
    "NO_MERGE",
    "SMALL",
    "Algorithm",
    "Averager",
    "Correction",
    "Evaluated",
    "LocalResult",
    "Merge",
    "NoState",
    "Own",
    "Partial",
    "Schedule",
    "Training",
    "Transform",
    "weighted_mean",
    "weighted_metrics",
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
class Evaluated:
    """What a site's evaluation of a model gives. examples: that the metrics are means over"""

    metrics: Mapping[str, float]
    examples: int
    numerics: Mapping[str, Any] = field(default_factory=dict)

    def update(self, ctx: RoundContext, tensors: Groups, scalars: Mapping[str, float] | None = None) -> Update:
        """This as the update of `ctx.site`, which trained nothing, with `tensors` as its payload."""
        untrained = LocalResult({}, {}, {}, self.examples, 0, 0.0, self.metrics, self.numerics)
        return untrained.update(ctx, tensors, scalars)


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

    def evaluate(self, broadcast: Groups, ctx: RoundContext) -> Evaluated:
        """The metrics of `broadcast` on the site's held-out data. Raises SiteError where it has none."""
        ...


class Own(Protocol):
    """The work that algorithms are given that train nothing: what the site has, and functions that it offers. One that needs more of
    a site says what in a protocol of its own, and in `Algorithm.work` who does it.

    data: what the recipe's workload made, of whatever kind
    """

    @property
    def data(self) -> Any: ...

    def recorded(self) -> Mapping[str, Any]:
        """What decides the bits of what is computed here, for `Update.numerics`."""
        ...

    def apply(self, function: str, args: Mapping[str, Any], given: Mapping[str, Any], ctx: RoundContext) -> Any:
        """What `function(**args, data=..., **given)` returns: found in the site's registry, of `data` and `given` passed only what
        its signature asks for; under the recipe's numerics and `ctx.seed`, so with the same bits everywhere.

        Raises ResolveError where there is no such function here, or it takes other arguments.
        """
        ...


class Algorithm(Described):
    """The mathematics of one round. Subclasses are frozen pydantic models that hold hyperparameters only.

    A subclass sets `kind: Literal["..."] = "..."`, `State`, and where its sites remember something `SiteState`.
    """

    kind: str
    trains: ClassVar[bool] = True
    """Whether its sites' work is a `Training` of the recipe's model; otherwise it is `Own`, and the recipe may leave out a model."""
    work: ClassVar[str] = "fedflow.local.own:OwnData"
    """Where it trains nothing: the class, "module:attribute", whose instances its sites are given as `Own`, a kind of this one."""
    needs_all: ClassVar[bool] = False
    """Whether a round needs an answer of every site of its schedule, be it there or not: a quorum is then refused."""
    coordinator_only: ClassVar[bool] = False
    """Whether nobody but the coordinator may read all updates: a schedule that has sites aggregate is then refused."""
    phases: ClassVar[tuple[str, ...]] = ("train",)
    """Exchanges within a round, in order; each has its own openings, closing and commit."""
    partitionable: ClassVar[bool] = True
    """Whether tensor names may be aggregated in any partition (same bits for every one)."""
    by_rows: ClassVar[bool] = True
    """Whether that holds for the rows of a tensor too, which tensors larger than the memory budget are split by."""
    model_files: ClassVar[tuple[str, ...]] = ()
    """Suffixes of files of its own kind that a model can be written to, by `as_file`."""
    State: ClassVar[type[Any]]
    """S: frozen dataclass of `Tensors` and JSON scalars, the server's memory."""
    SiteState: ClassVar[type[Any]] = NoState
    """C: the same for a site's memory."""
    renewable: ClassVar[bool] = False
    """Whether a site that lost its state may begin anew, by `init_site`: nothing elsewhere was computed from what it held.
    Otherwise it is excluded until the state is there again."""

    # -- before a run
    @property
    def names(self) -> Mapping[str, SiteId]:
        """Sites that it names, by field: each must be one that may be asked."""
        return {}

    def objections(self, training: Any) -> list[str]:
        """What speaks against this local training (the recipe's, or a site's): each names the field and the fix."""
        return []

    # -- at the server
    def init(self, model: Groups) -> Any:
        """S before round 0, from the initial model's groups "params", "frozen", "buffers"."""
        raise NotImplementedError

    def with_models(self, state: Any, models: Mapping[str, Groups]) -> Any:
        """S with the recipe's further `checkpoints`, by name. Raises RecipeError where there is nothing to do with them."""
        found, fix = sorted(models), "leave them out; `checkpoint` is the initial model"
        raise RecipeError(field_error("checkpoints", found, f"none with algorithm {self.kind}", fix))

    def model(self, state: Any) -> Groups:
        """The global model in S: what is evaluated, exported and digested."""
        raise NotImplementedError

    def as_file(self, model: Groups, suffix: str) -> bytes:
        """A model as the content of such a file."""
        raise NotImplementedError

    @property
    def finds(self) -> bool:
        """Whether there is a `result`: what a run found besides a model."""
        return type(self).result is not Algorithm.result

    def result(self, state: Any) -> Result:
        """What S holds for people besides a model."""
        raise NotImplementedError

    def page(self, result: Result, sites: Sequence[SiteId], excluded: Mapping[SiteId, str]) -> str:
        """`result` as Markdown for people; nothing by default. sites: all of them; excluded: site -> why it did not take part"""
        return ""

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
    def most_updates(self) -> int | None:
        """The most updates that a round can be made of; a schedule that asks more sites is refused. None = any number."""
        return None

    def enough(self, phase: str, quorum: int) -> int:
        """How many updates close `phase`, which is not the first, of a round with that quorum."""
        return quorum

    @property
    def together(self) -> bool:
        """Whether its sites must be at work at the same time."""
        return False

    @property
    def local_steps(self) -> int | None:
        """The optimizer steps that it asks its sites for, whatever `training` says; None = as that says."""
        return None

    @property
    def gathers(self) -> bool:
        """Whether `measure` and `aggregate` hold all updates at once: they are then given smaller parts."""
        return False

    @property
    def measures(self) -> bool:
        """Whether `measure` is to be called: it reads every update once more."""
        return type(self).measure is not Algorithm.measure

    @property
    def averages(self) -> bool:
        """Whether `aggregate` is `weighted_mean` by `weight`: then updates may be summed where they are made."""
        return type(self).aggregate is Algorithm.aggregate

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
    @property
    def evaluates(self) -> bool:
        """Whether sites can evaluate its model."""
        return self.trains or type(self).evaluated is not Algorithm.evaluated

    def evaluated(self, broadcast: Groups, work: Any, ctx: RoundContext) -> Evaluated:
        """What a site finds of the model in `broadcast` on its held-out data. Raises SiteError where it has none."""
        found: Evaluated = work.evaluate(broadcast, ctx)
        return found

    def init_site(self, broadcast: Groups, work: Any, ctx: RoundContext) -> Any:
        """C at first participation."""
        return self.SiteState()

    def site_update(self, broadcast: Groups, site_state: Any, work: Any, ctx: RoundContext) -> tuple[Update, Any]:
        """The site's part of `ctx.phase`: its update, and C if that update is accepted."""
        raise NotImplementedError


class Transform(Described):
    """What happens to an update on its way out, undone at the server before the reduction; and to the broadcast.

    Subclasses are frozen pydantic models, as algorithms are. What a site must remember lives in C, and commits with the
    site's update. Transforms are applied in the recipe's order, and undone in the reverse one.
    """

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


class Schedule(Described):
    """Who takes part in a round, and how many close it. Pure in its arguments."""

    kind: str

    @property
    def names(self) -> Collection[SiteId]:
        """Sites that it names: each must be one of the federation."""
        return ()

    @property
    def invited(self) -> Collection[SiteId]:
        """The sites that it may ask; none: all of the federation."""
        return self.names

    @property
    def regional(self) -> Collection[str]:
        """Regional aggregators that it names: each has a work pool, and none is a site."""
        return ()

    @property
    def closing(self) -> tuple[str, int] | None:
        """How many updates a round waits for, behind the field that says it; None where that depends on who is there."""
        return None

    def objections(self, recipe: Any) -> list[str]:
        """What speaks against this schedule in `recipe`: each names the field and the fix."""
        return []

    def absences(self, absent: Mapping[str, str]) -> Mapping[SiteId, str]:
        """Site -> why it is not asked. absent: site or regional aggregator -> why it is not there"""
        return absent

    def plan(self, round: int, view: FederationView, seed: int) -> RoundPlan:
        """The cohort of `round` among the sites that `view` shows online, how many updates close it, and where it is aggregated.

        Raises QuorumLost where nobody is there to aggregate it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Partial:
    """Updates of which only sums are left.

    sums:    group -> name -> Σ wᵢ·tᵢ in float64; weights: the same for Σ wᵢ
    updates: each without tensors, and its weight, in the order in which they were added
    """

    sums: Groups
    weights: Mapping[str, Mapping[str, float]]
    updates: Sequence[tuple[Update, float]]


class Averager:
    """`weighted_mean`, of updates that come one by one, or summed in whole blocks of `BLOCK`."""

    def __init__(self) -> None:
        self.means: dict[str, WeightedMean] = {}
        self._scalars: dict[str, float] = {}
        self._metrics: dict[SiteId, dict[str, float]] = {}
        self._weight = 0.0
        self._updates: list[tuple[Update, float]] = []

    @property
    def count(self) -> int:
        """How many updates came."""
        return len(self._metrics)

    def add(self, update: Update, weight: float) -> None:
        """Add one update."""
        for group, tensors in update.tensors.items():
            self.means.setdefault(group, WeightedMean()).add(tensors, weight)
        self._note(update, weight)

    def add_block(self, sums: Mapping[str, Packed], updates: Sequence[tuple[Update, float]]) -> None:
        """Add a block of updates, each with its weight and without tensors. sums: of these, as `WeightedMean.sums` gave them"""
        for group, packed in sums.items():
            self.means.setdefault(group, WeightedMean()).add_block(packed, [weight for _, weight in updates])
        for update, weight in updates:
            self._note(update, weight)

    def partial(self) -> Partial:
        """What was added, for `add_partial` of another averager. To be asked once."""
        found = {group: mean.partial() for group, mean in self.means.items()}
        sums, weights = ({group: pair[i] for group, pair in found.items()} for i in (0, 1))
        return Partial(sums, weights, self._updates)  # type: ignore[arg-type]

    def add_partial(self, partial: Partial) -> None:
        """Add what another averager summed, behind everything that was added one by one."""
        for group, sums in partial.sums.items():
            self.means.setdefault(group, WeightedMean()).add_partial(sums, partial.weights[group])
        for update, weight in partial.updates:
            self._note(update, weight)

    def _note(self, update: Update, weight: float) -> None:
        self._updates.append((replace(update, tensors={}) if update.tensors else update, weight))
        for name, value in update.scalars.items():
            self._scalars[name] = self._scalars.get(name, 0.0) + weight * value
        self._weight += weight
        self._metrics[update.site] = dict(update.metrics)

    def aggregate(self) -> Aggregate:
        """The means, not yet rounded. To be asked once."""
        reduced = {group: mean.means() for group, mean in self.means.items()}
        scalars = {name: total / self._weight for name, total in self._scalars.items()}
        return Aggregate(reduced, self._weight, self.count, self._metrics, scalars)


def weighted_mean(updates: Iterable[Update], weight: Callable[[Update], float]) -> Aggregate:
    """The weighted mean of every group over the fixed tree of `WeightedMean`, in float64, one update in memory."""
    averager = Averager()
    for update in updates:
        averager.add(update, weight(update))
    return averager.aggregate()


def weighted_metrics(reported: Sequence[tuple[float, Mapping[str, float | None]]]) -> dict[str, float | None]:
    """Weighted mean of every metric over the sites that have it; None where no site does. reported: each site's weight and metrics"""
    means: dict[str, float | None] = {}
    for name in sorted({name for _, metrics in reported for name in metrics}):
        known = [(weight, v) for weight, metrics in reported if (v := metrics.get(name)) is not None]
        mean = sum(w * v for w, v in known) / sum(w for w, _ in known) if known else math.nan
        means[name] = mean if math.isfinite(mean) else None
    return means
