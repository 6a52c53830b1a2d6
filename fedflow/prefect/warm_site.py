"""Imported by the fork server of a site's worker: what every trainer needs, imported and used once.

Nothing here may leave a thread behind: a fork copies only the thread that forks. numpy's OpenBLAS would start its pool
when it is imported, so it is told not to; a trainer has the threads that the recipe's numerics give it (torch's own).
"""

import importlib
import os
import sys
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import torch

import fedflow.flows.site  # noqa: F401
from fedflow.errors import FedflowError
from fedflow.recipe import SiteConfig


def _first_use() -> None:
    """The first step of the first optimizer of a process imports for a second."""
    torch.set_num_threads(1)
    model = torch.nn.Linear(2, 2)
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.optim.AdamW(model.parameters())):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()


def _preload() -> None:
    """What this site's configuration asks for; what is wrong with it is reported by the flow run, not here."""
    try:
        for module in SiteConfig.here().preload:
            importlib.import_module(module)
    except (FedflowError, ImportError) as error:
        print(error, file=sys.stderr)


_first_use()
_preload()

if (tasks := Path("/proc/self/task")).exists() and len(list(tasks.iterdir())) > 1:
    raise RuntimeError("the fork server has more than one thread; a fork of it could hang")
