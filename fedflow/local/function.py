"""Anybody's training function: `train(model, data, config) -> metrics`, unmodified."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from fedflow.errors import ResolveError, field_error
from fedflow.local.session import Session
from fedflow.local.trainer import Request, SessionTrainer
from fedflow.local.workload import Setup
from fedflow.recipe import LocalTraining
from fedflow.types import RoundContext

__all__ = ["Config", "FunctionWorkload", "config_for", "examples_in", "numbers"]


class Config(dict[str, Any]):
    """What the training code is told: a dict whose entries can be read as attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"config: found no {name!r}, expected one of {sorted(self)}") from None


class FunctionWorkload:
    """One site's training function with its data.

    train:    called as `train(model, data, config)` with the received model; what it returns are metrics, if it is a mapping
    data:     whatever the function takes. A DataLoader is handed over as a stream that goes on where the site stopped
              reading, where a round has a number of steps or the algorithm preserves the training's state
    examples: examples in the training data (the FedAvg weight); default: those of the loader's dataset, or `len(data)`
    evaluate: `evaluate(model) -> metrics`, on this site's evaluation data; default: none
    config:   entries of `config` besides the recipe's
    """

    def __init__(
        self,
        train: Callable[[Any, Any, Config], Any],
        data: Any,
        *,
        examples: int | None = None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.train, self.data, self.config = train, data, dict(config or {})
        found = examples_in(data) if examples is None else examples
        if found is None:
            raise ResolveError(field_error("examples", None, "their number", "give it: this data has no length"))
        self._examples = found
        self._evaluate = evaluate

    def __len__(self) -> int:
        return self._examples

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        return {} if self._evaluate is None else self._evaluate(model)

    def training(self, setup: Setup) -> FunctionTrainer:
        return FunctionTrainer(**setup.options(self))


class FunctionTrainer(SessionTrainer):
    """Calls the function in a session."""

    workload: FunctionWorkload

    def run(self, session: Session, request: Request) -> dict[str, float]:
        data: Any = self.workload.data
        if isinstance(data, DataLoader) and (request.steps is not None or request.memory is not None):
            data = session.data(data)
        config = config_for(self.settings, request.ctx, request.steps, self.workload.config)
        return numbers(self.workload.train(session.model, data, config))


def examples_in(data: Any) -> int | None:
    """Those of the loader's dataset, or the data's own; None where it has no length."""
    try:
        return len(getattr(data, "dataset", data))
    except TypeError:
        return None


def config_for(
    settings: LocalTraining, ctx: RoundContext, steps: int | None, more: Mapping[str, Any] | None = None
) -> Config:
    """What training code is told: the recipe's `training`, its `config` in front, and where in the run it is."""
    optimizer = settings.optimizer.model_dump(mode="json")
    return Config(
        {
            **{name: value for name, value in optimizer.items() if name != "kind"},
            "optimizer": optimizer["kind"],
            "epochs": settings.epochs or 1,
            "batch_size": settings.batch_size,
            **settings.config,
            **(more or {}),
            "steps": steps,
            "seed": ctx.seed,
            "round": ctx.round,
            "site": ctx.site,
        }
    )


def numbers(returned: Any) -> dict[str, float]:
    """The numbers in what training code returned, if that is a mapping."""
    if not isinstance(returned, Mapping):
        return {}
    found: dict[str, float] = {}
    for name, value in returned.items():
        if isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0:
            with suppress(TypeError, ValueError, RuntimeError):  # a text, a date, a complex number
                found[str(name)] = float(value)
    return found
