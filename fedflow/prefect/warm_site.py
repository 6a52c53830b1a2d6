"""Imported by the fork server of a site's worker: what every trainer needs, imported and used once.

Nothing here may leave a thread behind: a fork copies only the thread that forks.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator

import torch
from pydantic import BaseModel

import fedflow.flows.aggregation
import fedflow.flows.site  # noqa: F401
from fedflow.engine.forks import threads
from fedflow.errors import FedflowError
from fedflow.prefect import private
from fedflow.recipe import SiteConfig


def _first_use() -> None:
    """What a process does once: torch's first pass backwards, and the validators of what is read and written."""
    torch.set_num_threads(1)
    torch.nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()
    for model in _models(BaseModel):
        model.model_rebuild()


def _models(base: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for model in base.__subclasses__():
        if model.__module__.startswith("fedflow."):
            yield model
        yield from _models(model)


def _preload() -> None:
    """What this site's configuration asks for; what is wrong with it is reported by the flow run, not here."""
    try:
        config = SiteConfig.here()
        own = [config.flow.partition(":")[0]] if config.flow else []
        for module in (*own, *config.preload):
            if _leaves_threads(module):
                print(f"{module} starts threads when it is imported: each training imports it itself", file=sys.stderr)
            else:
                importlib.import_module(module)
    except (FedflowError, ImportError) as error:
        print(error, file=sys.stderr)


def _leaves_threads(module: str) -> bool:
    """Whether a process that imports `module` has more than one thread afterwards: tried in a fork of this one."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            importlib.import_module(module)
        os._exit(threads() > 1)
    return os.waitpid(child, 0)[1] != 0


_first_use()
_preload()
private.site_client()
