"""Clusters of handwritten digits, whose labels nobody looks at. `fedflow run examples/training/kmeans.yaml`"""

from sites import digits

from fedflow.local.kmeans import KMeansWorkload


def site(site: str | None = None, sites: list[str] | None = None) -> KMeansWorkload:
    return KMeansWorkload(digits(site, sites)[0].double().numpy(), held_out=digits()[0].double().numpy())
