"""One algorithm, one file, read top to bottom as the paper's pseudocode."""

from fedflow.algorithms.fedavg import FedAvg

__all__ = ["FedAvg"]
