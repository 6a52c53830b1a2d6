"""Rounds of an algorithm over functions of a point, without an engine: what tests of the mathematics are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedflow.algorithm import Algorithm, LocalResult
from fedflow.local import LocalTrainer, TorchWorkload, model_groups
from fedflow.recipe import LocalTraining, Numerics, Optimizer
from fedflow.tensors import raw_bytes
from fedflow.types import Groups, RoundContext, Tensors, Update, derive_seed

SERVER = RoundContext("run", 0, "train", None, num_sites=2, seed=0)


def vectors(name: str) -> list[dict[str, Any]]:
    """Cases computed independently of this code."""
    found: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / f"vectors/{name}.json").read_text())
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and bytes(raw_bytes(a)) == bytes(raw_bytes(b))


class Point(nn.Module):
    """A model that is one parameter."""

    def __init__(self, x: Sequence[float] | float, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([x] if isinstance(x, float) else x, dtype=dtype))


class Function(TorchWorkload):
    """f(x), differentiated by torch; one batch, always the same."""

    def __init__(self, f: Callable[[Tensor], Tensor], examples: int = 1) -> None:
        self.f, self.examples = f, examples

    def __len__(self) -> int:
        return self.examples

    def batches(self, batch_size: int, generator: torch.Generator) -> list[None]:
        return [None]

    def loss(self, model: nn.Module, batch: None) -> Tensor:
        return self.f(model.x).sum()  # type: ignore[arg-type]


def quadratic(a: float, b: float, examples: int = 1) -> Function:
    """a/2 (x − b)²"""
    return Function(lambda x: a / 2 * (x - b) ** 2, examples)


class Returns:
    """A training that ends at given parameters, after so many steps."""

    def __init__(self, y: Tensors, examples: int = 1, steps: int = 1, lr: float = 0.1, loss: float = 1.0) -> None:
        self.y, self.examples, self.steps, self.lr, self.at_start = y, examples, steps, lr, loss

    def train(self, broadcast: Groups, ctx: RoundContext, **wishes: object) -> LocalResult:
        return LocalResult(self.y, {}, {}, self.examples, self.steps, self.lr * self.steps)

    def loss(self, broadcast: Groups, ctx: RoundContext) -> float:
        return self.at_start


@dataclass
class Game:
    """A federation in memory. works: site -> its work; steps, lr: of every site's SGD unless `trainings` has another."""

    algorithm: Algorithm
    works: Mapping[str, Any]
    start: nn.Module
    steps: int = 1
    lr: float = 0.1
    trainings: Mapping[str, LocalTraining] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = self.algorithm.init(model_groups(self.start))
        self.site_states: dict[str, Any] = {}
        self.round = 0
        self.sent: dict[str, Update] = {}

    @property
    def x(self) -> Tensor:
        found: Tensor = self.state.params["x"]
        return found

    def play(self, contributors: Sequence[str] | None = None, *, lost: Sequence[str] = ()) -> None:
        """One round. lost: sites that train in vain: neither their update nor their new state counts."""
        broadcast, updates = self.algorithm.broadcast(self.state, "train"), []
        for site in sorted({*(self.works if contributors is None else contributors), *lost}):
            update, kept = self._train(site, broadcast)
            if site not in lost:
                updates.append(update)
                self.site_states[site] = kept
        self.sent = {u.site: u for u in updates}
        self.state = aggregated(self.algorithm, self.state, updates, self._context(None))
        self.round += 1

    def _train(self, site: str, broadcast: Groups) -> tuple[Update, Any]:
        context, work = self._context(site), self.works[site]
        if isinstance(work, TorchWorkload):
            default = LocalTraining(steps=self.steps, optimizer=Optimizer(lr=self.lr))
            work = LocalTrainer(self._model, work, self.trainings.get(site, default), Numerics())
        state = self.site_states.get(site) or self.algorithm.init_site(broadcast, work, context)
        return self.algorithm.site_update(broadcast, state, work, context)

    def _model(self) -> nn.Module:
        return Point(self.x.tolist(), self.x.dtype)

    def _context(self, site: str | None) -> RoundContext:
        return RoundContext("run", self.round, "train", site, len(self.works), derive_seed(self.round, site))


def aggregated(algorithm: Algorithm, state: Any, updates: Sequence[Update], context: RoundContext = SERVER) -> Any:
    """The server's part of a round."""
    measured = algorithm.measure(iter(updates), context) if algorithm.measures else {}
    known = replace(context, measured=measured)
    return algorithm.server_update(state, algorithm.aggregate(iter(updates), known), known)
