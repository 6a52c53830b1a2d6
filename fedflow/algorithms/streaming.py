"""Streaming DiLoCo: Douillard et al., "Streaming DiLoCo with overlapping communication: Towards a Distributed Free Lunch",
arXiv:2501.18512, Algorithm 2.

    The model is P fragments; round r synchronises fragment p = r mod P. H steps a round; P·H between two of the same fragment.

    site i:  τ inner steps of the live θᵢ
             θᵢ,ₚ' ← α θᵢ,ₚ' + (1 − α) xₚ'             p' = r − 1 mod P: what the last round made of its fragment
             H − τ inner steps; send θᵢ,ₚ
    server:  xₚ ← one step of DiLoCo's outer optimizer on xₚ − Σ pᵢ θᵢ,ₚ

With one fragment, τ = 0 and α = 0 it is DiLoCo. Buffers belong to no fragment: they take the plain mean, every round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from fedflow.algorithm import NO_MERGE, SMALL, Merge, Training
from fedflow.algorithms.diloco import DiLoCo, DiLoCoState
from fedflow.errors import RecipeError, field_error
from fedflow.types import Aggregate, Groups, RoundContext, Spec, Tensors, Update

__all__ = ["StreamingDiLoCo", "StreamingSite", "StreamingState"]


@dataclass(frozen=True)
class StreamingState(DiLoCoState):
    """x and the outer momentum; the number of the fragment by parameter name; and rounds done."""

    fragment: Tensors = field(metadata=SMALL)
    rounds: int


@dataclass(frozen=True)
class StreamingSite:
    """θᵢ after the site's last round that counted, x as it was received by then, the fragments, what is personal, that round."""

    live: Tensors
    received: Tensors
    fragment: Tensors
    personal: Tensors
    round: int


class StreamingDiLoCo(DiLoCo):
    """DiLoCo that synchronises a fragment of the model a round, while the sites' live parameters go on.

    An update holds the fragment's parameters, and a site reads those of the last round's fragment: 1/P of the model, both
    ways. A site that took part in the last round merges its fragment after τ steps. A site that missed rounds takes what
    was synchronised meanwhile as it is, before its first step, and keeps the rest of its live parameters; one that joins,
    or lost its state, takes the whole model.
    """

    kind: Literal["streaming_diloco"] = "streaming_diloco"  # type: ignore[assignment]
    State: ClassVar[type[Any]] = StreamingState
    SiteState: ClassVar[type[Any]] = StreamingSite
    renewable: ClassVar[bool] = True

    fragments: Annotated[int, Field(ge=1, strict=True)] = 2
    """P; ours: the paper has fragments of three layers. At most as many as the model has layers."""
    pattern: Literal["strided", "sequential"] = "strided"
    """Layer l of L, in the model's order, is in fragment l mod P, or ⌊l P / L⌋; strided in the paper. A layer is what shares
    a name up to its first number ("blocks.3"), or a module's own parameters."""
    tau: Annotated[int, Field(ge=0, strict=True)] = 1
    """τ, the inner steps that a site goes on with before it merges what the last round made of its fragment, less than a
    round has; 1 in the paper. 0: it merges before its first step."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """α, the share of the live parameters in what is merged; 0.5 in the paper. 0: the server's replace them."""

    def objections(self, training: Any) -> list[str]:
        H = self.local_steps_per_round or training.steps
        found = super().objections(training)
        if H is not None and self.tau >= H:
            expected = f"less than the {H} steps of a round"
            found.append(field_error("algorithm.tau", self.tau, expected, "lower it, or take more steps"))
        return found

    # -- server
    def init(self, model: Groups) -> StreamingState:
        self.check(model)
        fragment = self._numbered(self.shared(model["params"]))
        return StreamingState(model["params"], model["frozen"], model["buffers"], {}, fragment, rounds=0)

    def _numbered(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Name -> the number of its fragment. Raises RecipeError where there are fewer layers than fragments."""
        layer = {name: _layer(name) for name in names}
        layers, P = list(dict.fromkeys(layer.values())), self.fragments
        if len(layers) < P:
            expected = f"at most {len(layers)}, the layers of the model ({', '.join(layers[:5])})"
            raise RecipeError(field_error("algorithm.fragments", P, expected, "lower it"))
        places = {name: i % P if self.pattern == "strided" else i * P // len(layers) for i, name in enumerate(layers)}
        return {name: torch.tensor(places[layer[name]]) for name in layer}

    def broadcast(self, state: StreamingState, phase: str) -> Groups:
        """The fragments one by one: a site reads those that are new to it."""
        fragments = {_group(p): _part(state.params, state.fragment, p) for p in range(self.fragments)}
        personal = {"personal": self.own({"params": state.params})} if self.personal else {}
        return {**fragments, **personal, "frozen": state.frozen, "buffers": state.buffers}

    def expects(self, state: StreamingState, phase: str) -> Spec:
        spec = super().expects(state, phase)
        return {g: self._due(g, tensors, state.fragment, state.rounds) for g, tensors in spec.items()}

    def server_update(self, state: Any, aggregate: Aggregate, ctx: RoundContext) -> Any:
        stepped = super().server_update(state, aggregate, ctx)  # what was not sent stays, with its momentum
        return replace(stepped, rounds=state.rounds + 1)  # type: ignore[call-arg]

    def report(self, state: Any, updates: int) -> str:
        p = (state.rounds - 1) % self.fragments
        of_fragment = replace(state, params=_part(state.params, state.fragment, p))
        return f"fragment {p} of {self.fragments}: {super().report(of_fragment, updates)}"

    # -- site
    def init_site(self, broadcast: Groups, work: Training, ctx: RoundContext) -> StreamingSite:
        fragments = {p: broadcast[_group(p)] for p in range(self.fragments)}
        fragment = {n: torch.tensor(p) for p, tensors in fragments.items() for n in tensors}
        x = {n: t for tensors in fragments.values() for n, t in tensors.items()}
        live = {**x, **broadcast["personal"]} if self.personal else x
        own = self.own({"params": live, "frozen": broadcast["frozen"], "buffers": broadcast["buffers"]})
        return StreamingSite(live, x, fragment, own, ctx.round)

    def site_update(
        self, broadcast: Groups, site_state: StreamingSite, work: Training, ctx: RoundContext
    ) -> tuple[Update, StreamingSite]:
        site, last = site_state, ctx.round - 1
        new = {r % self.fragments for r in range(max(site.round, ctx.round - self.fragments), ctx.round)}
        arrived = {n: t for p in sorted(new) for n, t in broadcast[_group(p)].items()}
        x, live = {**site.received, **arrived}, dict(site.live)
        merge = Merge(arrived, after=self.tau, keep=self.alpha if site.round == last else 0.0)
        if site.round < last or self.tau == 0:
            live, merge = merge.into(live), NO_MERGE
        model = {"params": live, "frozen": broadcast["frozen"], "buffers": broadcast["buffers"]}
        local = work.train(
            self.start(model, site),
            ctx,
            steps=self.local_steps_per_round,
            preserve=self.preserve_optimizer_state,
            merge=merge,
        )
        sent = self.payload({"params": x}, local)  # differences are from what was received, not from the round's start
        due = {g: self._due(g, tensors, site.fragment, ctx.round) for g, tensors in sent.items()}
        kept = StreamingSite(local.params, x, site.fragment, self.own(local.groups), ctx.round)
        return local.update(ctx, due), kept

    # -- both
    def _due(self, group: str, tensors: Any, fragment: Tensors, round: int) -> dict[str, Any]:
        """What travels of `tensors` in `round`: of parameters the fragment's, of the rest everything."""
        return _part(tensors, fragment, round % self.fragments) if group in ("params", "delta") else dict(tensors)


def _layer(name: str) -> str:
    """ "blocks.3.up.weight" -> "blocks.3", "norm.weight" -> "norm"."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if number is None else parts[: number + 1]) or name


def _group(p: int) -> str:
    """The group that fragment p is broadcast in."""
    return f"fragment-{p}"


def _part(tensors: Any, fragment: Tensors, p: int) -> dict[str, Any]:
    """Those of fragment p."""
    return {n: t for n, t in tensors.items() if n in fragment and int(fragment[n]) == p}
