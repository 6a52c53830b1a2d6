"""One algorithm, one file, read top to bottom as the paper's pseudocode."""

from fedflow.algorithms.diloco import DiLoCo
from fedflow.algorithms.fedavg import FedAvg
from fedflow.algorithms.feddyn import FedDyn
from fedflow.algorithms.fednova import FedNova
from fedflow.algorithms.fedopt import FedOpt
from fedflow.algorithms.fedprox import FedProx
from fedflow.algorithms.qfedavg import QFedAvg
from fedflow.algorithms.scaffold import Scaffold
from fedflow.algorithms.streaming import StreamingDiLoCo

__all__ = ["DiLoCo", "FedAvg", "FedDyn", "FedNova", "FedOpt", "FedProx", "QFedAvg", "Scaffold", "StreamingDiLoCo"]
