"""Around the user's training at a site."""

from fedflow.local.model import build_model, load_groups, model_groups
from fedflow.local.training import LocalTrainer
from fedflow.local.workload import TensorWorkload, TorchWorkload

__all__ = ["LocalTrainer", "TensorWorkload", "TorchWorkload", "build_model", "load_groups", "model_groups"]
