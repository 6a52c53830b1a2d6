"""SGD, Adam and AdamW with the bits and the state of torch.optim's: what the built-in loop steps with.

The first torch optimizer of a process imports the compiler, which takes about a second, and each of its steps passes hooks
and profiler marks, which take longer than a small model's step does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedflow.recipe import Optimizer

__all__ = ["SGD", "Adam", "AdamW", "Plain", "make_optimizer"]

_SHARED: Mapping[str, Any] = {"maximize": False, "foreach": None, "differentiable": False, "fused": None}


class Plain(ABC):
    """One group of parameters, and what is remembered of each by its number: as torch.optim has them.

    Subclasses are named as torch's are: what is preserved of one is that of the other.
    """

    remembered: ClassVar[tuple[str, ...]]
    """Tensors of a parameter's size in its state, which is there from its first gradient on."""

    def __init__(self, parameters: Iterable[Tensor], options: Mapping[str, Any]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), **options}]
        self.state: dict[int, dict[str, Tensor]] = {}

    @property
    def parameters(self) -> list[Tensor]:
        found: list[Tensor] = self.param_groups[0]["params"]
        return found

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step of all parameters that have a gradient."""
        params, grads, numbers = [], [], []
        for number, p in enumerate(self.parameters):
            if p.grad is not None:
                params.append(p)
                grads.append(p.grad)
                numbers.append(number)
        if params:
            self._step(self.param_groups[0], params, grads, numbers)

    @abstractmethod
    def _step(self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], numbers: list[int]) -> None:
        """The same of those whose numbers are given."""

    def narrow(self, parameters: Iterable[Tensor], rows: Tensor | slice) -> None:
        """Go on with these parameters, `rows` along the first axis of what they were."""
        self.param_groups[0]["params"] = list(parameters)
        for state in self.state.values():
            state.update({name: state[name][rows] for name in self.remembered})

    def state_dict(self) -> dict[str, Any]:
        """In torch's form."""
        group = {name: value for name, value in self.param_groups[0].items() if name != "params"}
        group["params"] = list(range(len(self.parameters)))
        return {"state": {n: dict(self.state[n]) for n in sorted(self.state)}, "param_groups": [group]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where it is not that of one group of as many parameters."""
        sizes = [len(group["params"]) for group in state["param_groups"]]
        if sizes != [len(self.parameters)]:
            raise ValueError(f"found parameter groups of {sizes}, expected [{len(self.parameters)}]")
        options = {name: value for name, value in state["param_groups"][0].items() if name != "params"}
        self.param_groups[0].update(options)
        self.state = {
            n: {name: t.clone() if name == "step" else torch.empty_like(self.parameters[n]).copy_(t) for name, t in s.items()}
            for n, s in state["state"].items()
        }  # fmt: skip


class SGD(Plain):
    """torch.optim.SGD: plain, with momentum, with Nesterov's, with weight decay."""

    remembered = ("momentum_buffer",)

    def __init__(self, parameters: Iterable[Tensor], spec: Optimizer) -> None:
        options = {"lr": spec.lr, "momentum": spec.momentum, "dampening": 0}
        super().__init__(
            parameters, {**options, "weight_decay": spec.weight_decay, "nesterov": spec.nesterov, **_SHARED}
        )

    def _step(self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], numbers: list[int]) -> None:
        if decay := group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=decay))
        if momentum := group["momentum"]:
            buffers = self._accelerated(momentum, grads, numbers)
            grads = list(torch._foreach_add(grads, buffers, alpha=momentum)) if group["nesterov"] else buffers
        torch._foreach_add_(params, grads, alpha=-group["lr"])

    def _accelerated(self, momentum: float, grads: list[Tensor], numbers: list[int]) -> list[Tensor]:
        """The momentum buffers, with `grads` in them."""
        known = [(self.state[n]["momentum_buffer"], g) for n, g in zip(numbers, grads, strict=True) if n in self.state]
        if known:
            _scale([buffer for buffer, _ in known], momentum)
            torch._foreach_add_([buffer for buffer, _ in known], [g for _, g in known])
        for n, g in zip(numbers, grads, strict=True):
            if n not in self.state:
                self.state[n] = {"momentum_buffer": g.clone()}
        return [self.state[n]["momentum_buffer"] for n in numbers]


class Adam(Plain):
    """torch.optim.Adam as it is without `foreach`."""

    remembered = ("exp_avg", "exp_avg_sq")
    decoupled: ClassVar[bool] = False

    def __init__(self, parameters: Iterable[Tensor], spec: Optimizer) -> None:
        options = {"lr": spec.lr, "betas": spec.betas, "eps": 1e-8, "weight_decay": spec.weight_decay}
        more = {"amsgrad": False, **_SHARED, "capturable": False, "decoupled_weight_decay": self.decoupled}
        super().__init__(parameters, options | more)

    def _step(self, group: Mapping[str, Any], params: list[Tensor], grads: list[Tensor], numbers: list[int]) -> None:
        lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
        states = [self._of(n, p) for n, p in zip(numbers, params, strict=True)]
        if decay and self.decoupled:
            _scale(params, 1 - lr * decay)
        elif decay:
            grads = list(torch._foreach_add(grads, params, alpha=decay))
        means, squares = ([state[name] for state in states] for name in self.remembered)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        _scale(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        steps = [float(state["step"].add_(1)) for state in states]
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(params, means, denominators, [-(lr / (1 - beta1**step)) for step in steps])

    def _of(self, number: int, p: Tensor) -> dict[str, Tensor]:
        if number not in self.state:
            zeros = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in self.remembered}
            self.state[number] = {"step": torch.tensor(0.0), **zeros}
        return self.state[number]


class AdamW(Adam):
    """torch.optim.AdamW: the same with decoupled weight decay."""

    decoupled = True


def _scale(tensors: list[Tensor], factor: float) -> None:
    """`torch._foreach_mul_`, which on a CPU rounds 16-bit values otherwise than the optimizers' `mul_`."""
    if tensors[0].device.type != "cpu":
        torch._foreach_mul_(tensors, factor)
        return
    for tensor in tensors:
        tensor.mul_(factor)


def make_optimizer(spec: Optimizer, parameters: Iterable[Tensor]) -> Plain:
    """The optimizer that `spec` describes."""
    kinds: dict[str, type[SGD] | type[Adam]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
    return kinds[spec.kind](parameters, spec)
