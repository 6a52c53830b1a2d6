"""Where a recipe runs: SimEnv, PocEnv, ProdEnv. One recipe, three environments, one result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from fedflow.environments.base import DEFAULT_HOME, Environment, Run
from fedflow.environments.local import recalled
from fedflow.environments.sim import SimEnv
from fedflow.recipe import Federation

__all__ = ["DEFAULT_HOME", "Environment", "Kind", "Run", "SimEnv", "make", "recall"]

Kind = Literal["sim", "poc", "prod"]


def make(
    kind: Kind, *, federation: Federation, store: str | None = None, home: str | Path = DEFAULT_HOME, **options: Any
) -> Any:
    """The environment of that kind. Servers, where it needs them, are started when the first run is."""
    if kind == "sim":
        return SimEnv(federation, store=store, home=home, **options)
    if kind == "poc":
        from fedflow.environments.poc import PocEnv

        return PocEnv(federation, store=store, home=home, **options)
    from fedflow.environments.prod import ProdEnv

    return ProdEnv(federation, store=store, home=home, **options)


def recall(run_id: str, home: str | Path = DEFAULT_HOME) -> Any:
    """The environment that `run_id` was started in. Raises RunMissing."""
    fields = recalled(run_id, Path(home).resolve())
    sys.path += [p for p in fields["python_path"] if p not in sys.path]
    return make(
        fields["env"],
        federation=Federation.load(fields["federation"]),
        store=fields["store"],
        home=home,
        **fields["options"],
    )
