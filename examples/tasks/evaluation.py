"""Whose model is good for whom: every site trains one, and every site evaluates all. `fedflow run examples/tasks/evaluation.yaml`"""

import torch
from sites import breast_cancer
from torch import nn

from fedflow.local import TensorWorkload


def model() -> nn.Module:
    """A linear classifier, zero at first."""
    found = nn.Linear(30, 2, dtype=torch.float64)
    for parameter in found.parameters():
        nn.init.zeros_(parameter)
    return found


def site(site: str, sites: list[str]) -> TensorWorkload:
    """Three quarters of a site's rows to train on, the last quarter held out."""
    inputs, labels = (torch.from_numpy(part) for part in breast_cancer(site, sites))
    cut = len(inputs) * 3 // 4
    return TensorWorkload(inputs[:cut], labels[:cut], held_out=(inputs[cut:], labels[cut:]))
