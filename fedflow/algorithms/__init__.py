"""One algorithm, one file, read top to bottom as the paper's pseudocode."""

from fedflow.algorithms.async_diloco import AsyncDiLoCo
from fedflow.algorithms.diloco import DiLoCo
from fedflow.algorithms.evaluation import Evaluation
from fedflow.algorithms.fedavg import FedAvg
from fedflow.algorithms.fedbuff import FedBuff
from fedflow.algorithms.feddyn import FedDyn
from fedflow.algorithms.fednova import FedNova
from fedflow.algorithms.fedopt import FedOpt
from fedflow.algorithms.fedprox import FedProx
from fedflow.algorithms.psi import PSI
from fedflow.algorithms.qfedavg import QFedAvg
from fedflow.algorithms.scaffold import Scaffold
from fedflow.algorithms.statistics import Statistics
from fedflow.algorithms.streaming import StreamingDiLoCo
from fedflow.algorithms.task import FederatedTask
from fedflow.algorithms.xgboost import XGBoost

__all__ = [
    "PSI",
    "AsyncDiLoCo",
    "DiLoCo",
    "Evaluation",
    "FedAvg",
    "FedBuff",
    "FedDyn",
    "FedNova",
    "FedOpt",
    "FedProx",
    "FederatedTask",
    "QFedAvg",
    "Scaffold",
    "Statistics",
    "StreamingDiLoCo",
    "XGBoost",
]
