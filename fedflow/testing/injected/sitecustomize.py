"""Python imports this at the start of every process that has this folder first in PYTHONPATH: see fedflow.testing.faults.

It costs such a process nothing until fedflow's engine is imported; then the fault of the environment is armed.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

ENGINE = "fedflow.engine"


class _ArmWithEngine(importlib.abc.MetaPathFinder):
    """Finds the engine as everybody else would, and arms the fault when it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != ENGINE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_arm(module: ModuleType) -> None:
                run(module)
                from fedflow.testing.faults import arm_from_environment

                arm_from_environment()

            spec.loader.exec_module = run_and_arm  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _ArmWithEngine())
