"""Federated evaluation: models that are there, on the data of every site; and, cross-site, every site's own model too.

train, cross-site only:  site i: yᵢ ← local training from the model
evaluate:                site j: metrics of every model m on its held-out data, and nⱼ, the examples in them
server:                  cell (m, j);  of each model Σ nⱼ metricⱼ / Σ nⱼ over the sites, which is the metric of the pooled examples
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ByteSize, Field
from torch import Tensor

from fedflow.algorithm import Algorithm, NoState, Training, weighted_metrics
from fedflow.algorithms.answers import Answer, answer_spec
from fedflow.algorithms.matrix import LAST, Matrix, metrics_of
from fedflow.errors import UpdateInvalid
from fedflow.tensors import model_digest
from fedflow.types import (
    MODEL_GROUPS,
    Aggregate,
    Groups,
    Result,
    RoundContext,
    SiteId,
    Spec,
    Tensors,
    Update,
    canonical_json,
    spec_of,
)

__all__ = ["Evaluation", "EvaluationState"]


@dataclass(frozen=True)
class EvaluationState:
    """models: every model's tensors, "<model>/<group>/<name>"; names: of the models; found: canonical JSON of the result"""

    models: Tensors
    names: tuple[str, ...]
    found: str


class Evaluation(Algorithm):
    """Metrics of the recipe's model, and of its further `checkpoints`, on every site's held-out data. Needs one round."""

    kind: Literal["evaluation"] = "evaluation"
    State: ClassVar[type[Any]] = EvaluationState
    partitionable: ClassVar[bool] = False

    cross_site: bool = False
    """Whether every site first trains from the model, as the recipe says, and its model is evaluated at every site too: for n sites
    a matrix of n × (n + 1 + further checkpoints)."""
    answer_limit: Annotated[ByteSize, Field(ge=1024)] = ByteSize(1 << 20)
    """The most that a site's metrics may take. Ours."""

    @property
    def phases(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("train", "evaluate") if self.cross_site else ("evaluate",)

    @property
    def gathers(self) -> bool:
        return True

    # -- server
    def init(self, model: Groups) -> EvaluationState:
        return EvaluationState(_flat(LAST, model), (LAST,), "{}")

    def with_models(self, state: EvaluationState, models: Mapping[str, Groups]) -> EvaluationState:
        named = {f"server:{name}": groups for name, groups in models.items()}
        tensors = {n: t for name, groups in named.items() for n, t in _flat(name, groups).items()}
        return replace(state, models={**state.models, **tensors}, names=(*state.names, *named))

    def model(self, state: EvaluationState) -> Groups:
        return _groups(_of(state.models, LAST))

    def result(self, state: EvaluationState) -> Result:
        return Result(json.loads(state.found))

    def page(self, result: Result, sites: Sequence[SiteId], excluded: Mapping[SiteId, str]) -> str:
        """A table of models and sites for each metric."""
        return "\n\n".join(Matrix.of(result, name, sites, excluded).as_markdown() for name in metrics_of(result))

    def broadcast(self, state: EvaluationState, phase: str) -> Groups:
        if phase == "train":
            return self.model(state)
        return {name: _of(state.models, name) for name in state.names}

    def expects(self, state: EvaluationState, phase: str) -> Spec:
        if phase == "evaluate":
            return answer_spec(self.answer_limit)
        model = self.model(state)
        return spec_of({group: model[group] for group in ("params", "buffers")})

    def weight(self, update: Update) -> float:
        return update.examples

    def decode(self, update: Update, state: EvaluationState, phase: str) -> Update:
        if phase == "evaluate":
            _cells(update, state.names)
        return update

    def aggregate(self, updates: Iterable[Update], ctx: RoundContext) -> Aggregate:
        """What every site sent, by site."""
        sent = {update.site: update for update in updates}
        tensors = {s: u.tensors["answer"] if "answer" in u.tensors else _flat(s, u.tensors) for s, u in sent.items()}
        metrics = {site: dict(update.metrics) for site, update in sent.items()}
        return Aggregate(tensors, sum(map(self.weight, sent.values())), len(sent), metrics)

    def server_update(self, state: EvaluationState, aggregate: Aggregate, ctx: RoundContext) -> EvaluationState:
        if ctx.phase == "train":
            return self._with_sites(state, aggregate.tensors)
        answers = {site: Answer.decoded(sent).values for site, sent in aggregate.tensors.items()}
        counts = {site: answer["examples"] for site, answer in answers.items()}
        cells = {name: {site: answer["cells"][name] for site, answer in answers.items()} for name in state.names}
        models = {
            name: {
                "digest": _digest(_of(state.models, name)),
                "metrics": weighted_metrics([(counts[site], metrics) for site, metrics in cells[name].items()]),
                "sites": cells[name],
            }
            for name in state.names
        }
        return replace(state, found=canonical_json({"examples": counts, "models": models}).decode())

    def _with_sites(self, state: EvaluationState, sent: Groups) -> EvaluationState:
        """With the sites' models, whose frozen parameters are the server's."""
        frozen = {"frozen": self.model(state)["frozen"]}
        held = {name: t for site in sent for name, t in _flat(site, frozen).items()}
        own = {name: t for tensors in sent.values() for name, t in tensors.items()}
        servers = tuple(name for name in state.names if name not in sent)
        return replace(state, models={**state.models, **held, **own}, names=(*servers, *sorted(sent)))

    # -- site
    def site_update(
        self, broadcast: Groups, site_state: NoState, work: Training, ctx: RoundContext
    ) -> tuple[Update, NoState]:
        if ctx.phase == "train":
            local = work.train(broadcast, ctx)
            return local.update(ctx, {"params": local.params, "buffers": local.buffers}), site_state
        evaluated = {name: work.evaluate(_groups(broadcast[name]), ctx) for name in broadcast}
        last = evaluated[LAST]
        cells = {
            name: {n: v if math.isfinite(v) else None for n, v in e.metrics.items()} for name, e in evaluated.items()
        }
        answer = Answer({"cells": cells, "examples": last.examples})
        return last.update(ctx, {"answer": answer.encoded()}), site_state


def _cells(update: Update, names: tuple[str, ...]) -> None:
    """Raises UpdateInvalid where an update does not have the metrics of every model, and nothing else."""
    try:
        values = Answer.decoded(update.tensors["answer"]).values
        cells, examples = values["cells"], values["examples"]
        if examples != update.examples or set(cells) != set(names):
            raise ValueError(f"found metrics of {sorted(cells)}, expected those of {sorted(names)}")
        if not all(isinstance(v, (int, float, type(None))) for metrics in cells.values() for v in metrics.values()):
            raise ValueError("metrics: found what is no number")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UpdateInvalid(f"metrics of models: {error}", site=update.site) from error


def _flat(name: str, groups: Groups) -> dict[str, Tensor]:
    return {f"{name}/{group}/{n}": t for group in MODEL_GROUPS if group in groups for n, t in groups[group].items()}


def _of(models: Tensors, name: str) -> dict[str, Tensor]:
    """One model's tensors, "<group>/<name>"."""
    return {n.removeprefix(f"{name}/"): t for n, t in models.items() if n.startswith(f"{name}/")}


def _groups(flat: Tensors) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {group: {} for group in MODEL_GROUPS}
    for name, tensor in flat.items():
        group, _, own = name.partition("/")
        found[group][own] = tensor
    return found


def _digest(flat: Tensors) -> str:
    """That of the model in its manifest."""
    return model_digest({name.partition("/")[2]: tensor for name, tensor in flat.items()})
