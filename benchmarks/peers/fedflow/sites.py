"""What the recipe names."""

from __future__ import annotations

from torch import nn

from benchmarks.peers import common
from fedflow.local import TensorWorkload


def model() -> nn.Module:
    return common.make_model()


def site(site: str) -> TensorWorkload:
    return TensorWorkload(*common.site_data(int(site.rpartition("-")[2])))
