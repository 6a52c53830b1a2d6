"""A training script in a process of its own. `fedflow run examples/training/script.yaml`"""

from pathlib import Path

from function import HeldOut, Net

from fedflow.local import ScriptWorkload

__all__ = ["HeldOut", "Net", "site"]


def site() -> ScriptWorkload:
    folder = Path(__file__).parent
    return ScriptWorkload("python -u train.py", folder=folder)  # or: torchrun --nproc_per_node=2 train.py
