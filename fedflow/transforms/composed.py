"""An algorithm with its transforms, as one algorithm: what the engine runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, make_dataclass
from functools import cache
from typing import Any, Literal

from fedflow.algorithm import Algorithm
from fedflow.types import Aggregate, Groups, Result, RoundContext, Spec, Tensors, Update

__all__ = ["Transformed"]


class Transformed(Algorithm):
    """`algorithm`, whose broadcasts and updates go through `transforms`. Its sites' state has the transforms' beside it."""

    kind: Literal["transformed"] = "transformed"
    algorithm: Any
    transforms: tuple[Any, ...]

    # -- what it takes over
    @property
    def trains(self) -> bool:  # type: ignore[override]
        return bool(self.algorithm.trains)

    @property
    def needs_all(self) -> bool:  # type: ignore[override]
        return bool(self.algorithm.needs_all)

    @property
    def phases(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.algorithm.phases)

    @property
    def partitionable(self) -> bool:  # type: ignore[override]
        return bool(self.algorithm.partitionable)

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        return bool(self.algorithm.by_rows and all(t.by_rows for t in self.transforms))

    @property
    def partial_updates(self) -> bool:  # type: ignore[override]
        return bool(self.algorithm.partial_updates)

    @property
    def State(self) -> type[Any]:  # type: ignore[override]
        found: type[Any] = self.algorithm.State
        return found

    @property
    def SiteState(self) -> type[Any]:  # type: ignore[override]
        return _joined_type(self.algorithm.SiteState, *(t.SiteState for t in self.transforms))

    @property
    def renewable(self) -> bool:  # type: ignore[override]
        return bool(self.algorithm.renewable)

    @property
    def least_updates(self) -> int:
        return int(self.algorithm.least_updates)

    @property
    def most_updates(self) -> int | None:
        found: int | None = self.algorithm.most_updates
        return found

    def enough(self, phase: str, quorum: int) -> int:
        return int(self.algorithm.enough(phase, quorum))

    @property
    def together(self) -> bool:
        return bool(self.algorithm.together)

    @property
    def local_steps(self) -> int | None:
        found: int | None = self.algorithm.local_steps
        return found

    @property
    def gathers(self) -> bool:
        return bool(self.algorithm.gathers)

    @property
    def measures(self) -> bool:
        return bool(self.algorithm.measures)

    def objections(self, training: Any) -> list[str]:
        return list(self.algorithm.objections(training))

    def init(self, model: Groups) -> Any:
        state = self.algorithm.init(model)
        for phase in self.phases:
            self.expects(state, phase)  # whether everything can be transformed
        return state

    def with_models(self, state: Any, models: Mapping[str, Groups]) -> Any:
        return self.algorithm.with_models(state, models)

    def model(self, state: Any) -> Groups:
        found: Groups = self.algorithm.model(state)
        return found

    @property
    def finds(self) -> bool:
        return bool(self.algorithm.finds)

    def result(self, state: Any) -> Result:
        found: Result = self.algorithm.result(state)
        return found

    def weight(self, update: Update) -> float:
        return float(self.algorithm.weight(update))

    def measure(self, updates: Iterable[Update], ctx: RoundContext) -> Tensors:
        found: Tensors = self.algorithm.measure(updates, ctx)
        return found

    def aggregate(self, updates: Iterable[Update], ctx: RoundContext) -> Aggregate:
        found: Aggregate = self.algorithm.aggregate(updates, ctx)
        return found

    def server_update(self, state: Any, aggregate: Aggregate, ctx: RoundContext) -> Any:
        return self.algorithm.server_update(state, aggregate, ctx)

    def report(self, state: Any, updates: int) -> str | None:
        found: str | None = self.algorithm.report(state, updates)
        return found

    # -- what it adds
    def broadcast(self, state: Any, phase: str) -> Groups:
        groups: Groups = self.algorithm.broadcast(state, phase)
        for transform in self.transforms:
            groups = transform.at_broadcast(groups)
        return groups

    def expects(self, state: Any, phase: str) -> Spec:
        return self._specs(state, phase)[-1]

    def _specs(self, state: Any, phase: str) -> list[Spec]:
        """What an update looks like before the first transform, after it, after the second, ..."""
        specs: list[Spec] = [self.algorithm.expects(state, phase)]
        for transform in self.transforms:
            specs.append(transform.encoded(specs[-1]))
        return specs

    def decode(self, update: Update, state: Any, phase: str) -> Update:
        specs = self._specs(state, phase)
        for transform, spec in zip(reversed(self.transforms), reversed(specs[:-1]), strict=True):
            update = transform.decode(update, spec)
        found: Update = self.algorithm.decode(update, state, phase)
        return found

    def init_site(self, broadcast: Groups, work: Any, ctx: RoundContext) -> Any:
        arrived = self._arrived(broadcast)
        states = [self.algorithm.init_site(arrived, work, ctx), *(t.init_site(arrived) for t in self.transforms)]
        return _joined(self.SiteState, states)

    def site_update(self, broadcast: Groups, site_state: Any, work: Any, ctx: RoundContext) -> tuple[Update, Any]:
        types = [self.algorithm.SiteState, *(t.SiteState for t in self.transforms)]
        state, *states = _parted(site_state, types)
        update, state = self.algorithm.site_update(self._arrived(broadcast), state, work, ctx)
        for i, transform in enumerate(self.transforms):
            update, states[i] = transform.at_site(update, states[i], ctx)
        return update, _joined(self.SiteState, [state, *states])

    def _arrived(self, broadcast: Groups) -> Groups:
        for transform in reversed(self.transforms):
            broadcast = transform.at_arrival(broadcast)
        return broadcast


# -- several states as one ---------------------------------------------------------------------------------------------
def _field(i: int, name: str) -> str:
    """The algorithm's own fields keep their names; those of transform i = 1, 2, ... are told apart by it."""
    return name if i == 0 else f"{name}_{i}"


@cache
def _joined_type(*types: type[Any]) -> type[Any]:
    """One frozen dataclass with the fields of all."""
    names = [(_field(i, f.name), f.type) for i, cls in enumerate(types) for f in fields(cls)]
    return make_dataclass("SiteState", names, frozen=True)


def _joined(cls: type[Any], states: Sequence[Any]) -> Any:
    values: Mapping[str, Any] = {_field(i, f.name): getattr(s, f.name) for i, s in enumerate(states) for f in fields(s)}
    return cls(**values)


def _parted(state: Any, types: Sequence[type[Any]]) -> list[Any]:
    return [cls(**{f.name: getattr(state, _field(i, f.name)) for f in fields(cls)}) for i, cls in enumerate(types)]
