"""Federated mini-batch k-means: Sculley, "Web-scale k-means clustering", WWW 2010, with a site's data as the mini-batch.

    round 0:  site i: k-means++ centres of its data;  server: k-means over all of them
    later:    site i: cᵢ, nᵢ ← one step of mini-batch k-means from c, its data being the batch
              server: n' ← n + Σ nᵢ;  c ← (n c + Σ nᵢ cᵢ) / n'       per cluster, n the examples it ever had

The server's rule is NVFlare's (`KMeansAssembler`); its sites take many steps, whose counts then say more than they have. Recipe: model `fedflow.local.kmeans:Centres`, algorithm
`fedflow.local.kmeans:MiniBatchKMeans`, workload a `KMeansWorkload`. Needs scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.cluster import MiniBatchKMeans as SklearnMiniBatchKMeans
from sklearn.metrics import silhouette_score

from fedflow.algorithm import Algorithm, NoState, Training
from fedflow.local.arrays import ArrayModel, Arrays, ArrayWorkload, Fitted
from fedflow.local.function import Config
from fedflow.types import Aggregate, Groups, RoundContext, Spec, Tensors, Update, spec_of

__all__ = ["Centres", "KMeansState", "KMeansWorkload", "MiniBatchKMeans"]


class Centres(ArrayModel):
    """(clusters, features) centres, and (clusters,) how many examples each ever had: 0 before round 0."""

    def __init__(self, clusters: int, features: int) -> None:
        super().__init__(centres=[clusters, features], counts=[clusters])


class KMeansWorkload(ArrayWorkload):
    """One site's (N, features) data. `evaluate` reports the silhouette score over `held_out`, if there is any."""

    def __init__(self, data: Any, *, held_out: Any = None) -> None:
        super().__init__(_fit, np.asarray(data), evaluate=self._silhouette if held_out is not None else None)
        self.held_out = held_out

    def _silhouette(self, arrays: Arrays) -> dict[str, float]:
        distances = ((self.held_out[:, None, :] - arrays["centres"][None]) ** 2).sum(axis=2)
        clusters = distances.argmin(axis=1)
        several = len(np.unique(clusters)) > 1
        return {"silhouette": float(silhouette_score(self.held_out, clusters)) if several else -1.0}


def _fit(arrays: Arrays, data: Any, config: Config) -> Fitted:
    centres, seed = arrays["centres"], config.seed % 2**31
    if not arrays["counts"].any():
        found, _ = kmeans_plusplus(data, n_clusters=len(centres), random_state=seed)
        return Fitted({"centres": found.astype(centres.dtype), "counts": np.ones(len(centres))})
    model = SklearnMiniBatchKMeans(
        len(centres), init=centres, n_init=1, batch_size=len(data), reassignment_ratio=0, random_state=seed
    ).partial_fit(data)
    return Fitted({"centres": model.cluster_centers_.astype(centres.dtype), "counts": model._counts.astype(float)})


@dataclass(frozen=True)
class KMeansState:
    """params: "centres" and "counts"."""

    params: Tensors


class MiniBatchKMeans(Algorithm):
    """The server's part. Sites' centres weigh by the examples that they stand for, cluster by cluster."""

    kind: Literal["minibatch-kmeans"] = "minibatch-kmeans"
    State: ClassVar[type[Any]] = KMeansState
    partitionable: ClassVar[bool] = False

    def init(self, model: Groups) -> KMeansState:
        return KMeansState(model["params"])

    def model(self, state: KMeansState) -> Groups:
        return {"params": state.params, "frozen": {}, "buffers": {}}

    def expects(self, state: KMeansState, phase: str) -> Spec:
        return spec_of({"params": state.params})

    def weight(self, update: Update) -> float:
        return update.examples

    def aggregate(self, updates: Iterable[Update], ctx: RoundContext) -> Aggregate:
        """All sites' centres below each other, and the sums over the sites."""
        sent = list(updates)
        parts = [update.tensors["params"] for update in sent]
        weighted = torch.stack([p["counts"][:, None] * p["centres"] for p in parts]).sum(dim=0)
        tensors = {
            "all": {"centres": torch.cat([p["centres"] for p in parts])},
            "sum": {"centres": weighted, "counts": torch.stack([p["counts"] for p in parts]).sum(dim=0)},
        }
        weight = float(sum(self.weight(update) for update in sent))
        return Aggregate(tensors, weight, len(sent), {update.site: dict(update.metrics) for update in sent})

    def server_update(self, state: KMeansState, aggregate: Aggregate, ctx: RoundContext) -> KMeansState:
        centres, counts = state.params["centres"], state.params["counts"]
        if not bool(counts.any()):
            model = KMeans(len(centres), n_init=10, random_state=ctx.seed % 2**31)
            found = model.fit(aggregate.tensors["all"]["centres"].numpy()).cluster_centers_
            return KMeansState({"centres": torch.from_numpy(found).to(centres), "counts": torch.ones_like(counts)})
        new = counts + aggregate.tensors["sum"]["counts"]
        moved = (counts[:, None] * centres + aggregate.tensors["sum"]["centres"]) / new[:, None]
        return KMeansState({"centres": moved, "counts": new})

    def site_update(
        self, broadcast: Groups, site_state: NoState, work: Training, ctx: RoundContext
    ) -> tuple[Update, NoState]:
        local = work.train(broadcast, ctx)
        return local.update(ctx, {"params": local.params}), site_state
