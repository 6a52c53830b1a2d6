"""What the session costs a training step: the bare loop against the same loop in a session, alternately, in one process.

    python benchmarks/session_overhead.py [--steps 300] [--pairs 9]

The step is made to last about a millisecond on one thread. Prints the median ratio, with and without a correction and
preserved state; below 1.03 is what we ask of it.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from fedflow.algorithm import Correction
from fedflow.local import Session
from fedflow.local.state import Memory


def model(width: int) -> nn.Module:
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())))


def loop(net: nn.Module, batch: torch.Tensor, steps: int) -> float:
    """CPU seconds (others may use the machine) of the steps after the first, which is where a preserving session does its work of a round."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    for step in range(steps + 1):
        if step == 1:
            started = time.thread_time()
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()
    return time.thread_time() - started


def calibrated(steps: int) -> tuple[int, torch.Tensor]:
    """(width, batch) for a step of about 1 ms."""
    for width in range(64, 1025, 32):
        batch = torch.randn(32, width)
        loop(model(width), batch, 20)
        if loop(model(width), batch, steps) / steps >= 1e-3:
            break
    return width, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    width, batch = calibrated(options.steps)
    bare = [loop(model(width), batch, options.steps) for _ in range(3)]
    print(f"bare step: {min(bare) / options.steps * 1e3:.2f} ms, {width} wide, torch {torch.__version__}")

    def inside(net: nn.Module, **more: Any) -> Session:
        return Session(net, **more)

    kinds: dict[str, Any] = {
        "bare again": lambda net: nullcontext(),
        "session": inside,
        "session, preserving": lambda net: inside(net, memory=Memory()),
        "session, offset and proximal": lambda net: inside(
            net, correction=Correction(offset={n: torch.zeros_like(p) for n, p in net.named_parameters()}, proximal=0.1)
        ),
    }
    for name, around in kinds.items():
        ratios = []
        for _ in range(options.pairs):
            plain = loop(model(width), batch, options.steps)
            net = model(width)
            with around(net):
                seconds = loop(net, batch, options.steps)
            ratios.append(seconds / plain)
        print(f"{name:30} {statistics.median(ratios):.3f}  ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
