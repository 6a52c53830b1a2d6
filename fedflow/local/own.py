"""What a site gives to algorithms: a training of a model, or its own data and functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedflow.algorithm import Algorithm, Own, Training
from fedflow.algorithms.statistics import Dataset, StatisticsPolicy
from fedflow.algorithms.xgboost import Tracker
from fedflow.local import numerics
from fedflow.local.matching import KeyedTable, items_of
from fedflow.local.tables import Tables, datasets_of
from fedflow.local.together import boosted_together
from fedflow.local.training import training_of
from fedflow.local.workload import Setup, check_workload
from fedflow.recipe import Numerics
from fedflow.registry import call
from fedflow.types import RoundContext

__all__ = ["OwnData", "Registry", "work_of"]

Registry = Callable[[str], Any]
"""Name -> the function that a site offers. Raises ResolveError."""


@dataclass(frozen=True)
class OwnData:
    """The `Own` of a site. data: what the recipe's workload made here; registry: its functions; configured: its own policy"""

    data: Any
    numerics: Numerics
    registry: Registry
    configured: StatisticsPolicy | None = None

    @property
    def policy(self) -> StatisticsPolicy:
        """The site's configuration's; else that of its `Tables`; else the default."""
        if self.configured is not None:
            return self.configured
        return self.data.policy if isinstance(self.data, Tables) else StatisticsPolicy()

    def datasets(self) -> dict[str, Dataset]:
        return datasets_of(self.data)

    def items(self, column: str | None) -> Iterable[Any]:
        return self.data.items() if isinstance(self.data, KeyedTable) else items_of(self.data, column)

    def matched(self, items: Sequence[str]) -> None:
        if callable(found := getattr(self.data, "matched", None)):
            found(items)

    def boosted(
        self,
        rows: Any,
        params: Mapping[str, Any],
        iterations: int,
        booster: bytes | None,
        meeting: Mapping[str, Any],
        tracker: Tracker | None,
        patience: float,
        ctx: RoundContext,
    ) -> bytes:
        assert ctx.site is not None
        sites = meeting["sites"]
        return boosted_together(
            ctx.site,
            sites,
            meeting["name"],
            leader=sites[0] if tracker is None else tracker.site,
            address=None if tracker is None else (tracker.host, tracker.port),
            patience=patience,
            rows=rows,
            job={"params": dict(params), "iterations": iterations},
            booster=booster,
        )

    def recorded(self) -> Mapping[str, Any]:
        return numerics.recorded(self.numerics)

    def apply(self, function: str, args: Mapping[str, Any], given: Mapping[str, Any], ctx: RoundContext) -> Any:
        found = self.registry(function)
        with numerics.applied(self.numerics, ctx.seed):
            return call(found, args, field="algorithm.args", **{**given, "data": self.data})


def work_of(
    algorithm: Algorithm, found: Any, setup: Setup, registry: Registry, policy: StatisticsPolicy | None = None
) -> Training | Own:
    """What `algorithm` is given at a site whose workload is `found`. Raises ResolveError where it cannot be trained on."""
    if algorithm.trains:
        return training_of(check_workload(found, "workload"), setup)
    return OwnData(found, setup.numerics, registry, policy)
