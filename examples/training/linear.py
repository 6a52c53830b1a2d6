"""scikit-learn's SGDClassifier on breast cancer data. `fedflow run examples/training/linear.yaml`"""

from sites import breast_cancer
from sklearn.linear_model import SGDClassifier
from torch import nn

from fedflow.local.sklearn import LinearWorkload


def site(site: str | None = None, sites: list[str] | None = None) -> LinearWorkload:
    inputs, labels = breast_cancer(site, sites)
    estimator = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.01)
    return LinearWorkload(estimator, inputs, labels, classes=[0, 1], held_out=breast_cancer())


class HeldOut:
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return dict(site().evaluate(model))
