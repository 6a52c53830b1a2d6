"""What SCAFFOLD's mathematics do not allow of a site's training, seen from the recipe: the round fails and says why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedflow.algorithm import Training
from fedflow.algorithms.scaffold import Scaffold, ScaffoldSite
from fedflow.engine import simulate
from fedflow.errors import QuorumLost
from fedflow.local import FunctionWorkload
from fedflow.local.session import current
from fedflow.types import Groups, RoundContext
from tests.builders import Blobs, blobs, head, recipe


class Kept(Scaffold):
    """SCAFFOLD whose sites come with a control variate from elsewhere."""

    kind: Literal["kept"] = "kept"  # type: ignore[assignment]
    shape: list[int] = [6]
    finite: bool = True

    def init_site(self, broadcast: Groups, work: Training, ctx: RoundContext) -> ScaffoldSite:
        site = super().init_site(broadcast, work, ctx)
        return replace(
            site, control={**site.control, "0.bias": torch.full(self.shape, 0.0 if self.finite else torch.nan)}
        )


def trained(code: Callable[[nn.Module, Any], None], algorithm: Any = "scaffold") -> Any:
    def train(model: nn.Module, data: Any, config: Any) -> None:
        code(model, data)

    data = DataLoader(TensorDataset(*blobs(12, seed=1)), batch_size=4)
    work = {"site-1": FunctionWorkload(train, data)}
    return simulate(recipe(algorithm=algorithm, rounds=2), work)


def descend(model: nn.Module, data: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, targets in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def adaptive(model: nn.Module, data: Any) -> None:
    descend(model, data, torch.optim.AdamW(model.parameters(), lr=0.01))


def no_step(model: nn.Module, data: Any) -> None:
    for inputs, _ in data:
        model(inputs)


def freezing(model: nn.Module, data: Any) -> None:
    descend(model, data)
    model[0].requires_grad_(False)  # type: ignore[index]


def uneven(model: nn.Module, data: Any) -> None:
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": list(model.parameters())[2:], "lr": 0.2}]  # type: ignore[index]
    descend(model, data, torch.optim.SGD(groups))


def standing(model: nn.Module, data: Any) -> None:
    descend(model, data, torch.optim.SGD(model.parameters(), lr=0.0))


def both_ways(model: nn.Module, data: Any) -> None:
    descend(model, data)
    session = current()
    assert session is not None
    session.correct(model, 0.1)


def jumping(model: nn.Module, data: Any) -> None:
    """A finite distance at a learning rate next to none: K η_l divides it into infinity."""
    descend(model, data, torch.optim.SGD(model.parameters(), lr=1e-43))
    with torch.no_grad():
        model[0].bias.add_(1.0)  # type: ignore[index,operator]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (adaptive, "optimizer: found 'AdamW', expected SGD.*allow_adaptive: true"),
        (no_step, "no optimizer step was taken"),
        (freezing, "0.weight: found 'frozen during the training'"),
        (uneven, r"lr: found \[0.1, 0.2\], expected the same in all parameter groups"),
        (standing, "lr: found 0.0, expected a positive sum over the steps"),
        (both_ways, "session.correct: found 'steps of a torch optimizer too'"),
        (jumping, "the control variate is not finite: control/0.bias .6 of 6 elements"),
    ],
)
def test_a_training_that_has_no_control_variate(code: Any, says: str) -> None:
    with pytest.raises(QuorumLost, match=f"site-1.*{says}"):
        trained(code)


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ({"shape": [5]}, r"control variate of 0.bias: found \(5,\), expected \(6,\)"),
        ({"shape": [1]}, r"control variate of 0.bias: found \(1,\), expected \(6,\)"),
        ({"finite": False}, "control variate is not finite: control/0.bias"),
    ],
    ids=["another shape", "a shape that broadcasts", "not finite"],
)
def test_a_control_variate_of_something_else(kept: Any, says: str) -> None:
    with pytest.raises(QuorumLost, match=f"site-1.*{says}"):
        trained(descend, {"kind": f"{__name__}:Kept", **kept})


def test_an_adaptive_optimizer_where_it_is_allowed() -> None:
    journal = trained(adaptive, {"kind": "scaffold", "allow_adaptive": True})
    assert head(journal).round == 1


def test_momentum_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """In a function, and in the built-in loop."""

    def momentum(model: nn.Module, data: Any) -> None:
        descend(model, data, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5))

    with caplog.at_level(logging.WARNING, "fedflow"):
        trained(momentum)
    assert "with momentum 0.5 its estimate inflates by up to 2" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fedflow"):
        simulate(recipe(algorithm="scaffold", rounds=1), {"site-1": Blobs("site-1")})
    assert "with momentum 0.9 its estimate inflates by up to 10" in caplog.text
