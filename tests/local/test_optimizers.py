"""The built-in loop's optimizers are torch's: their bits, and their state, either way; and without the compiler."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedflow.local.optimizers import Plain, make_optimizer
from fedflow.recipe import Optimizer

TORCHS: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SHAPES = ((7, 30), (5,), (4, 2, 3, 3), ())

rates = st.sampled_from([0.0, 0.001, 0.07, 0.3])
sgd = st.builds(
    lambda lr, momentum, nesterov, decay: Optimizer(
        lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=decay
    ),
    rates,
    st.sampled_from([0.0, 0.5, 0.9]),
    st.booleans(),
    st.sampled_from([0.0, 0.01, 0.3]),
)
adams = st.builds(
    lambda kind, lr, decay, betas: Optimizer(kind=kind, lr=lr, weight_decay=decay, betas=betas),
    st.sampled_from(["adam", "adamw"]),
    rates,
    st.sampled_from([0.0, 0.01, 0.3]),
    st.sampled_from([(0.9, 0.999), (0.0, 0.5)]),
)


def parameters(dtype: torch.dtype, seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def torchs(spec: Optimizer, of: list[nn.Parameter]) -> torch.optim.Optimizer:
    more = {"momentum": spec.momentum, "nesterov": spec.nesterov} if spec.kind == "sgd" else {"betas": spec.betas}
    found: torch.optim.Optimizer = TORCHS[spec.kind](of, lr=spec.lr, weight_decay=spec.weight_decay, **more)
    return found


def step(optimizer: Plain | torch.optim.Optimizer, of: list[nn.Parameter], seed: int, clip: float | None) -> None:
    """With gradients of the seed; now and then a parameter has none."""
    generator = torch.Generator().manual_seed(seed)
    for number, p in enumerate(of):
        gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if (seed + number) % 5 == 0 else gradient
    if clip is not None:
        nn.utils.clip_grad_norm_(of, clip)
    optimizer.step()


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


@settings(deadline=None, max_examples=60)
@given(
    spec=st.one_of(sgd, adams),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    clip=st.sampled_from([None, 0.5]),
    handed_over=st.sampled_from([0, 2, 4]),
)
def test_bits_and_state_are_those_of_torch(
    spec: Optimizer, dtype: torch.dtype, clip: float | None, handed_over: int
) -> None:
    """Five steps each; after some of them the two go on with each other's state."""
    mine, torch_s = parameters(dtype, 1), parameters(dtype, 1)
    ours, theirs = make_optimizer(spec, mine), torchs(spec, torch_s)
    for number in range(5):
        if number == handed_over:
            states = copy.deepcopy((ours.state_dict(), theirs.state_dict()))
            ours, theirs = make_optimizer(Optimizer(kind=spec.kind, lr=9.0), mine), torchs(spec, torch_s)
            ours.load_state_dict(states[1])
            theirs.load_state_dict(states[0])
        step(ours, mine, number, clip)
        step(theirs, torch_s, number, clip)
    assert all(map(same, mine, torch_s))
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found["param_groups"] == expected["param_groups"] and found["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        assert found["state"][number].keys() == state.keys()
        assert all(same(found["state"][number][name], value) for name, value in state.items())


def test_a_state_of_other_groups_is_refused() -> None:
    two = torch.optim.SGD([{"params": [p]} for p in parameters(torch.float32, 1)[:2]], lr=0.1)
    ours = make_optimizer(Optimizer(), parameters(torch.float32, 1)[:2])
    with pytest.raises(ValueError, match=r"found parameter groups of \[1, 1\], expected \[2\]"):
        ours.load_state_dict(two.state_dict())


TRAINING = """
import sys
import torch
from fedflow.local import LocalTrainer, TensorWorkload, model_groups
from fedflow.recipe import LocalTraining, Numerics
from fedflow.types import RoundContext

data = TensorWorkload(torch.randn(20, 4), torch.randint(3, (20,)))
make = lambda: torch.nn.Linear(4, 3)
for numerics in (Numerics(), Numerics(deterministic="fast")):
    for kind in ("sgd", "adamw"):
        training = LocalTraining(clip_norm=1.0, optimizer={"kind": kind})
        ctx = RoundContext("run", 0, "train", "site-1", 1, seed=1)
        LocalTrainer(make, data, training, numerics).train(model_groups(make()), ctx, preserve=True)
print("torch._dynamo" in sys.modules, "torch._inductor" in sys.modules)
"""


def test_the_built_in_loop_imports_no_compiler() -> None:
    """It is what torch's first optimizer, and torch.use_deterministic_algorithms, take a second for."""
    done = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
