"""A support vector machine on breast cancer data. `fedflow run examples/training/svm.yaml`"""

from sites import breast_cancer

from fedflow.local.svm import SVMWorkload


def site(site: str | None = None, sites: list[str] | None = None) -> SVMWorkload:
    return SVMWorkload(*breast_cancer(site, sites), held_out=breast_cancer())
