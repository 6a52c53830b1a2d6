"""Around the user's training at a site."""

from fedflow.local.function import Config, FunctionWorkload
from fedflow.local.model import build_model, load_groups, model_groups
from fedflow.local.script import ScriptWorkload
from fedflow.local.session import Session, current
from fedflow.local.training import LocalTrainer, training_of
from fedflow.local.workload import Setup, TensorWorkload, TorchWorkload

__all__ = [
    "Config",
    "FunctionWorkload",
    "LocalTrainer",
    "ScriptWorkload",
    "Session",
    "Setup",
    "TensorWorkload",
    "TorchWorkload",
    "build_model",
    "current",
    "load_groups",
    "model_groups",
    "training_of",
]
