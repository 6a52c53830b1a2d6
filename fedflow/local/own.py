"""What a site gives to algorithms: a training of a model, or its own data and functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedflow.algorithm import Algorithm, Own, Training
from fedflow.local import numerics
from fedflow.local.training import training_of
from fedflow.local.workload import Setup, check_workload
from fedflow.recipe import Numerics, SiteConfig
from fedflow.registry import call, resolve
from fedflow.types import RoundContext

__all__ = ["OwnData", "Registry", "work_of"]

Registry = Callable[[str], Any]
"""Name -> the function that a site offers. Raises ResolveError."""


@dataclass(frozen=True)
class OwnData:
    """The `Own` of a site. data: what the recipe's workload made here; registry: its functions; config: its own, None in a simulation"""

    data: Any
    numerics: Numerics
    registry: Registry
    config: SiteConfig | None = None

    def recorded(self) -> Mapping[str, Any]:
        return numerics.recorded(self.numerics)

    def apply(self, function: str, args: Mapping[str, Any], given: Mapping[str, Any], ctx: RoundContext) -> Any:
        found = self.registry(function)
        with numerics.applied(self.numerics, ctx.seed):
            return call(found, args, field="algorithm.args", **{**given, "data": self.data})


def work_of(
    algorithm: Algorithm, found: Any, setup: Setup, registry: Registry, config: SiteConfig | None = None
) -> Training | Own:
    """What `algorithm` is given at a site whose workload is `found`. Raises ResolveError where it cannot be trained on."""
    if algorithm.trains:
        return training_of(check_workload(found, "workload"), setup)
    made: Own = resolve("work", algorithm.work, field="algorithm")(found, setup.numerics, registry, config)
    return made
