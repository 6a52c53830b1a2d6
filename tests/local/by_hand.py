"""FedAvg, FedProx, SCAFFOLD and DiLoCo written out with plain torch: what fedflow's results are compared with."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedflow.types import derive_seed

Named = dict[str, Tensor]

MU, OUTER_LR, OUTER_MOMENTUM = 0.5, 0.7, 0.9


@dataclass
class Descent:
    """One site's SGD in one round: v ← βv + ∇loss + term(w), w ← w − lr·v. H: at most so many steps; None = any number.

    memory: what the site knows in its next round; only under DiLoCo is it what it knew in its last one
    """

    model: nn.Module
    term: Callable[[str, Tensor], Tensor]
    memory: dict[str, Any]
    H: int | None
    done: int = 0
    lr_sum: float = 0.0

    def step(self, loss: Tensor, lr: float, momentum: float = 0.0) -> bool:
        """Whether the round is over."""
        names, parameters = zip(*((n, p) for n, p in self.model.named_parameters() if p.requires_grad), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        velocity: Named = self.memory.setdefault("velocity", {})
        with torch.no_grad():
            for name, p, gradient in zip(names, parameters, gradients, strict=True):
                g = gradient + self.term(name, p)
                velocity[name] = momentum * velocity[name] + g if name in velocity else g
                p -= lr * velocity[name]
        self.done += 1
        self.lr_sum += lr
        self.memory["generators"] = torch.get_rng_state()
        return self.done == self.H


@dataclass
class Site:
    """local(descent) takes the steps of a round. examples: its weight in FedAvg."""

    local: Callable[[Descent], None]
    examples: int
    control: Named = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)


def federated(
    kind: str, model: nn.Module, sites: Mapping[str, Site], *, rounds: int, seed: int, H: int | None = None
) -> Named:
    """The model after `rounds` rounds from the values that `model` has. seed: the recipe's."""
    x = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    buffers = {n: b for n, b in model.state_dict().items() if n not in dict(model.named_parameters())}
    buffers = {n: b.clone() for n, b in buffers.items()}
    outer: Named = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for site in sites.values():
        site.control = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in x.items()}
    for number in range(rounds):
        ys, bs, controls = {}, {}, {}
        c = {n: mean([s.control[n] for s in sites.values()]) for n in x}
        for name, site in sites.items():
            model.load_state_dict({**x, **buffers}, strict=False)
            model.train()
            seed_all(derive_seed(seed, number, "train", name))
            if kind != "diloco":
                site.memory = {}
            elif site.memory:
                torch.set_rng_state(site.memory["generators"])
            descent = Descent(model, term(kind, x, c, site.control), site.memory, H)
            site.local(descent)
            y = {n: p.detach().clone() for n, p in model.named_parameters() if n in x}
            ys[name], bs[name] = y, {n: model.state_dict()[n].clone() for n in buffers}
            if kind == "scaffold":
                moved = {n: (x[n].double() - y[n].double()) / descent.lr_sum for n in x}
                controls[name] = {n: site.control[n] - c[n] + moved[n] for n in x}
        for name, control in controls.items():
            sites[name].control = control
        p = {n: s.examples if kind in ("fedavg", "fedprox") else 1 for n, s in sites.items()}
        weights = [p[n] / sum(p.values()) for n in sites]
        centre = {n: mean([y[n].double() for y in ys.values()], weights) for n in x}
        if kind == "diloco":
            g = {n: x[n].double() - centre[n] for n in x}
            outer = {n: OUTER_MOMENTUM * outer[n] + g[n] if outer else g[n] for n in x}
            centre = {n: x[n].double() - OUTER_LR * (g[n] + OUTER_MOMENTUM * outer[n]) for n in x}
        x = {n: t.to(x[n].dtype) for n, t in centre.items()}
        means = {n: mean([b[n].double() for b in bs.values()], weights) for n in buffers}
        buffers = {n: (means[n] if b.is_floating_point() else means[n].round()).to(b.dtype) for n, b in buffers.items()}
    torch.set_num_threads(threads)
    return {**x, **buffers}


def term(kind: str, x: Named, c: Named, c_i: Named) -> Callable[[str, Tensor], Tensor]:
    """What the algorithm adds to the gradient of w."""
    return {
        "fedprox": lambda name, w: MU * (w - x[name]),
        "scaffold": lambda name, w: (c[name] - c_i[name]).to(w.dtype),
    }.get(kind, lambda name, w: torch.zeros_like(w))


def mean(tensors: list[Tensor], weights: list[float] | None = None) -> Tensor:
    weights = weights or [1 / len(tensors)] * len(tensors)
    return torch.stack([w * t for w, t in zip(weights, tensors, strict=True)]).sum(dim=0)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader
