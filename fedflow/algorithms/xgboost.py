"""Boosted trees with XGBoost (Chen and Guestrin, KDD 2016, arXiv:1603.02754) over several sites.

    bagging:    site i: grows `trees_per_round` iterations on the global ensemble, from its own rows, and sends the new trees
                server: appends all sites' trees, the leaves of site i times its share: the margin moves by the mean of the sites' steps
    histogram:  all sites grow the same trees together: gradients are summed in bins over all of them by xgboost's federated plug-in
With one site a round (schedule `cyclic`) bagging is cyclic boosting; with `num_parallel_tree`, a random forest. A booster is xgboost's own JSON
in a tensor of bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import ByteSize, Field, JsonValue, field_validator, model_validator
from torch import Tensor

from fedflow.algorithm import Algorithm, Evaluated, NoState, Own
from fedflow.described import Described
from fedflow.errors import FedflowError, ResolveError, TrainingInvalid, UpdateInvalid, field_error
from fedflow.types import Aggregate, Groups, RoundContext, SiteId, Spec, Tensors, TensorSpec, Update, canonical_json

__all__ = ["Meeting", "OwnRows", "Tracker", "XGBoost", "XGBoostState", "merged"]

Json = dict[str, Any]
OURS: Mapping[str, str] = {
    "nthread": "set numerics.threads",
    "n_jobs": "set numerics.threads",
    "seed": "set the recipe's seed",
    "random_state": "set the recipe's seed",
    "n_estimators": "set rounds and trees_per_round",
    "num_boost_round": "set rounds and trees_per_round",
    "process_type": "leave it out",
    "updater": "set tree_method",
}
"""Parameters that are said elsewhere."""
_MEETING = 1 << 20
"""Bytes that a site may say of itself."""


class Tracker(Described):
    """Where sites on several machines meet: one of them waits for the others, and runs xgboost's federated server."""

    site: SiteId
    """The one that the others can reach."""
    host: Annotated[str, Field(min_length=1)]
    """Its name or address, as they know it."""
    port: Annotated[int, Field(ge=1, le=65534, strict=True)]
    """They meet at this one; xgboost's server is at the next."""


@dataclass(frozen=True)
class Meeting:
    """Who trains together next. name: nobody else's; tracker: where, None = all are on one machine; patience: seconds to wait for others"""

    name: str
    sites: Sequence[SiteId]
    tracker: Tracker | None
    patience: float


class OwnRows(Own, Protocol):
    """What a site gives to boosting."""

    @property
    def encrypts(self) -> bool:
        """Whether it meets the others, if they are on other machines, with certificates."""
        ...

    def boosted(
        self,
        rows: Any,
        params: Mapping[str, Any],
        iterations: int,
        booster: bytes | None,
        meeting: Meeting,
        ctx: RoundContext,
    ) -> bytes:
        """Trees of so many more iterations, as xgboost's JSON, that all sites of `meeting` grow at once on the rows of all of them.

        booster: what they begin with. Raises SiteError where not all come and stay.
        """
        ...


@dataclass(frozen=True)
class XGBoostState:
    """booster: its bytes as "booster", none at the beginning; meeting: canonical JSON, who trains together next"""

    booster: Tensors = field(default_factory=dict)
    meeting: str = "{}"


class XGBoost(Algorithm):
    """Gradient boosting or a random forest. The recipe's workload is (features, labels), an `xgboost.DMatrix`, or a mapping with one of these as
    "train" and, for evaluation, as "held_out"."""

    kind: Literal["xgboost"] = "xgboost"
    trains: ClassVar[bool] = False
    work: ClassVar[str] = "fedflow.local.together:RowData"
    partitionable: ClassVar[bool] = False
    model_files: ClassVar[tuple[str, ...]] = (".json", ".ubj")
    State: ClassVar[type[Any]] = XGBoostState

    mode: Literal["bagging", "histogram"] = "bagging"
    """bagging: every site grows trees of its own; histogram: all sites the same ones, as if their rows were at one place."""
    params: dict[str, JsonValue] = {}
    """xgboost's own parameters: objective, eta, max_depth, eval_metric, ... `base_score` is 0.5 where none is given: each site would
    estimate another."""
    trees_per_round: Annotated[int, Field(ge=1, strict=True)] = 1
    """Boosting iterations a round; each is a tree for every class, times `num_parallel_tree`."""
    weight_by: Literal["examples", "uniform"] = "examples"
    """bagging: shares of the sites in a step."""
    tracker: Tracker | None = None
    """histogram: where the sites meet. Default: all are on one machine."""
    patience: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 120.0
    """histogram: seconds that a site waits for the others to come. Ours."""
    size_limit: Annotated[ByteSize, Field(ge=1024)] = ByteSize(64 << 20)
    """The most that a booster may take that a site sends. Ours."""

    @field_validator("params")
    @classmethod
    def _theirs(cls, params: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if taken := sorted(params.keys() & OURS.keys()):
            raise ValueError(
                f"found {taken[0]}, expected parameters of xgboost that are not said elsewhere; {OURS[taken[0]]}"
            )
        for name, known in (("booster", "gbtree"), ("multi_strategy", "one_output_per_tree")):
            if params.get(name, known) != known:
                raise ValueError(f"{name}: found {params[name]!r}, expected {known!r}; leave it out")
        return params

    @model_validator(mode="after")
    def _fits(self) -> XGBoost:
        if self.mode == "histogram" and self.params.get("tree_method", "hist") not in ("hist", "approx", "auto"):
            found = self.params["tree_method"]
            raise ValueError(f"params.tree_method: found {found!r}, expected 'hist' in mode histogram; leave it out")
        return self

    @property
    def phases(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("boost",) if self.mode == "bagging" else ("meet", "boost")

    @property
    def needs_all(self) -> bool:  # type: ignore[override]
        return self.together

    @property
    def together(self) -> bool:
        return self.mode == "histogram"

    @property
    def names(self) -> Mapping[str, SiteId]:
        return {"tracker.site": self.tracker.site} if self.together and self.tracker else {}

    def enough(self, phase: str, quorum: int) -> int:
        """Trees that all grew together are known from any of them."""
        return 1 if self.together and phase == "boost" else quorum

    @property
    def gathers(self) -> bool:
        return True

    # -- server
    def init(self, model: Groups) -> XGBoostState:
        return XGBoostState()

    def model(self, state: XGBoostState) -> Groups:
        return {"params": state.booster, "frozen": {}, "buffers": {}}

    def as_file(self, model: Groups, suffix: str) -> bytes:
        data = _raw(model["params"])
        if data is None or suffix == ".json":
            return data or b"{}"
        return bytes(_loaded(data).save_raw(suffix.removeprefix(".")))

    def broadcast(self, state: XGBoostState, phase: str) -> Groups:
        told = {"told": _bytes(state.meeting.encode())} if self.together and phase == "boost" else {}
        return {"params": {} if self.together and phase == "meet" else state.booster, "meeting": told}

    def expects(self, state: XGBoostState, phase: str) -> Spec:
        limit = _MEETING if phase == "meet" else self.size_limit
        return {"sent": {"bytes": TensorSpec((limit,), torch.uint8, up_to=True)}}

    def weight(self, update: Update) -> float:
        return update.examples

    def decode(self, update: Update, state: XGBoostState, phase: str) -> Update:
        try:
            found = _json(update.tensors["sent"]["bytes"])
            if phase == "meet":
                assert isinstance(found["token"], str) and isinstance(found["columns"], list)
                assert isinstance(found["tls"], bool)
            else:
                _check_trees(found, self.trees_per_round)
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
            raise UpdateInvalid(
                f"xgboost: not a booster of {self.trees_per_round} iterations: {error!r}", site=update.site
            ) from error
        return update

    def aggregate(self, updates: Iterable[Update], ctx: RoundContext) -> Aggregate:
        """What every site sent, with its examples; of trees that all grew together, the first one's."""
        sent: dict[SiteId, Tensors] = {}
        for update in updates:
            told = {"bytes": update.tensors["sent"]["bytes"], "examples": torch.tensor(float(update.examples))}
            _check_columns(update.site, told, sent)
            if not (self.together and ctx.phase == "boost" and sent):
                sent[update.site] = told
        return Aggregate(sent, float(len(sent)), len(sent), {site: {} for site in sent})

    def server_update(self, state: XGBoostState, aggregate: Aggregate, ctx: RoundContext) -> XGBoostState:
        found = {site: _json(told["bytes"]) for site, told in sorted(aggregate.tensors.items())}
        if ctx.phase == "meet":
            if self.tracker and self.tracker.site not in found:
                fix = "name one that takes part"
                why = field_error("algorithm.tracker.site", self.tracker.site, f"one of {list(found)}", fix)
                raise FedflowError(why, run=ctx.run, round=ctx.round)
            tokens = "".join(told["token"] for told in found.values())
            name = hashlib.blake2b(tokens.encode(), digest_size=16).hexdigest()
            meeting = {"name": name, "sites": list(found), "seed": ctx.seed % 2**31}
            return replace(state, meeting=canonical_json(meeting).decode())
        uniform = self.weight_by == "uniform" or self.together
        weights = {s: 1.0 if uniform else float(aggregate.tensors[s]["examples"]) for s in found}
        shares = [weight / sum(weights.values()) for weight in weights.values()]
        before = _raw(state.booster)
        try:
            whole = merged(
                None if before is None else json.loads(before), list(zip(found.values(), shares, strict=True))
            )
        except ValueError as error:
            raise FedflowError(f"xgboost: {error}", run=ctx.run, round=ctx.round) from error
        return XGBoostState({"booster": _bytes(json.dumps(whole, separators=(",", ":")).encode())})

    def report(self, state: XGBoostState, updates: int) -> str | None:
        size = sum(len(tensor) for tensor in state.booster.values())
        return f"{updates} sites' trees; the booster takes {size} bytes"

    # -- site
    def site_update(
        self, broadcast: Groups, site_state: NoState, work: OwnRows, ctx: RoundContext
    ) -> tuple[Update, NoState]:
        assert ctx.site is not None
        before, threads = _raw(broadcast["params"]), int(work.recorded()["threads"])
        with _told(ctx):
            rows = _rows(work.data, "train", threads)
        if ctx.phase == "meet":
            encrypts = self.tracker is not None and work.encrypts
            sent = canonical_json({"token": os.urandom(16).hex(), "columns": _columns(rows), "tls": encrypts})
        elif self.together:
            told = json.loads(bytes(broadcast["meeting"]["told"].numpy()))
            params, meeting = self._params(threads, told["seed"]), self._meeting(told)
            sent = work.boosted(rows, params, self.trees_per_round, before, meeting, ctx)
        else:
            with _told(ctx):
                sent = _grown(self._params(threads, ctx.seed % 2**31), rows, self.trees_per_round, before)
        if len(sent) > (limit := _MEETING if ctx.phase == "meet" else self.size_limit):
            fix = "lower trees_per_round or max_depth, or raise algorithm.size_limit"
            raise TrainingInvalid(field_error("xgboost", f"{len(sent)} bytes", f"at most {limit}", fix), **ctx.place)
        tensors = {"sent": {"bytes": _bytes(sent)}}
        return Update(ctx.site, ctx.round, rows.num_row(), 1, 0.0, tensors, numerics=work.recorded()), site_state

    def _meeting(self, told: Json) -> Meeting:
        return Meeting(told["name"], told["sites"], self.tracker, self.patience)

    def evaluated(self, broadcast: Groups, work: OwnRows, ctx: RoundContext) -> Evaluated:
        """xgboost's `eval_metric`s of the global booster on the site's held-out rows."""
        with _told(ctx):
            threads = int(work.recorded()["threads"])
            rows, data = _rows(work.data, "held_out", threads), _raw(broadcast["params"])
            assert data is not None
            booster, metrics = _loaded(data), self.params.get("eval_metric", [])
            booster.set_param("nthread", threads)
            for metric in metrics if isinstance(metrics, list) else [metrics]:
                booster.set_param("eval_metric", metric)
            told = booster.eval_set([(rows, "held_out")]).split("\t")[1:]
        found = {
            name.removeprefix("held_out-"): float(value) for name, _, value in (one.rpartition(":") for one in told)
        }
        return Evaluated(found, rows.num_row(), work.recorded())

    def _params(self, threads: int, seed: int) -> Json:
        return {"base_score": 0.5, "verbosity": 0, **self.params, "nthread": threads, "seed": seed}


# -- at a site ---------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _told(ctx: RoundContext) -> Iterator[None]:
    """xgboost's errors, and those of reading the data, as ones about the site: a retry would not help."""
    try:
        yield
    except (ValueError, TypeError) as error:  # XGBoostError is a ValueError
        text = str(error).partition("\nStack trace")[0]
        text = re.sub(r"^\[[\d:]+\] \S+:\d+: (Check failed: )?", "", text)  # the time, and its source's line
        raise TrainingInvalid(f"xgboost: {text[:1000]}", **ctx.place) from error


def _xgboost() -> Any:
    try:
        import xgboost
    except ImportError as error:
        raise ResolveError("xgboost: found none, expected it; pip install 'fedflow[xgboost]'") from error
    return xgboost


def _rows(data: Any, part: Literal["train", "held_out"], threads: int) -> Any:
    """The rows of that part as a DMatrix. Raises ValueError where there are none, or they are of no known kind."""
    xgboost = _xgboost()
    if isinstance(data, Mapping):
        if part not in data:
            raise ValueError(field_error("workload", sorted(data), f"a mapping with {part!r}", "add it"))
        data = data[part]
    elif part == "held_out":
        fix = 'let it return {"train": ..., "held_out": ...}, or leave out federated_evaluation'
        raise ValueError(field_error("workload", type(data).__name__, "rows that are held out", fix))
    if not isinstance(data, xgboost.DMatrix):
        if not isinstance(data, tuple) or len(data) != 2:
            expected = "(features, labels), a DMatrix, or a mapping with 'train'"
            raise ValueError(field_error("workload", type(data).__name__, expected, "let it return one of them"))
        if len(data[0]) != len(data[1]):
            found = f"{len(data[0])} rows and {len(data[1])} labels"
            raise ValueError(field_error("workload", found, "as many of each", "mend the data"))
        if isinstance(kind := getattr(data[0], "dtype", None), np.dtype) and kind.kind in "US":
            raise ValueError(field_error("workload", f"features of type {kind}", "numbers", "encode the texts"))
        data = xgboost.DMatrix(data[0], label=data[1], nthread=threads, enable_categorical=True)  # to name them below
    if not data.num_row():
        raise ValueError(field_error("workload", "no rows", "some", "leave this site out"))
    if "c" in (kinds := data.feature_types or []):  # each site would have codes of its own
        found = f"categorical columns {[name for name, kind in zip(_columns(data), kinds, strict=True) if kind == 'c']}"
        fix = "encode them, the same way at all sites: one column a category"
        raise ValueError(field_error("workload", found, "columns of numbers", fix))
    return data


def _columns(rows: Any) -> list[str]:
    return list(rows.feature_names or map(str, range(rows.num_col())))


def _grown(params: Json, rows: Any, iterations: int, before: bytes | None) -> bytes:
    """The trees of so many more iterations, without those before."""
    booster = None if before is None else _loaded(before)
    start = booster.num_boosted_rounds() if booster else 0
    grown = _xgboost().train(params, rows, iterations, xgb_model=booster)
    return bytes(grown[start : start + iterations].save_raw("json"))


def _loaded(data: bytes) -> Any:
    booster = _xgboost().Booster()
    booster.load_model(bytearray(data))
    return booster


# -- boosters as JSON --------------------------------------------------------------------------------------------------
def merged(before: Json | None, parts: Sequence[tuple[Json, float]]) -> Json:
    """`before` with the trees of all `parts` behind its own, the leaves of each times its share.

    Iteration j of the parts is one iteration of the whole, in which their trees are parallel: Σ over trees is then what xgboost predicts, and
    a slice of iterations a slice of rounds. `num_parallel_tree` stays what a site was told: xgboost goes on with it. The parts are changed.
    Raises ValueError where one has other columns, classes or objective than the first.
    """
    whole = _emptied(parts[0][0]) if before is None else before
    for part, share in parts:
        _check_alike(whole, part)
        _scale(_model(part)["trees"], share)
    into = _model(whole)
    for j in range(len(_model(parts[0][0])["iteration_indptr"]) - 1):
        for part, _ in parts:
            model = _model(part)
            start, stop = model["iteration_indptr"][j : j + 2]
            into["tree_info"] += model["tree_info"][start:stop]
            into["trees"] += model["trees"][start:stop]
        into["iteration_indptr"].append(len(into["trees"]))
    for number, tree in enumerate(into["trees"]):
        tree["id"] = number
    into["gbtree_model_param"]["num_trees"] = str(len(into["trees"]))
    return whole


def _model(booster: Json) -> Json:
    found: Json = booster["learner"]["gradient_booster"]["model"]
    return found


def _emptied(booster: Json) -> Json:
    """A copy without trees."""
    learner = booster["learner"]
    model = {**_model(booster), "trees": [], "tree_info": [], "iteration_indptr": [0]}
    model["gbtree_model_param"] = dict(model["gbtree_model_param"])
    return {**booster, "learner": {**learner, "gradient_booster": {**learner["gradient_booster"], "model": model}}}


def _scale(trees: Sequence[Json], share: float) -> None:
    """Leaves are single precision in xgboost: so are the products, which are then written as short as they can be read back."""
    if share == 1.0:
        return
    for tree in trees:
        for name in ("split_conditions", "base_weights"):
            leaves = [left == -1 for left in tree["left_children"]]
            tree[name] = [
                float(str(np.float32(value * share))) if leaf else value
                for value, leaf in zip(tree[name], leaves, strict=True)
            ]


def _check_alike(whole: Json, part: Json) -> None:
    for name in ("learner_model_param", "objective"):
        here, there = part["learner"][name], whole["learner"][name]
        if name == "learner_model_param":
            here, there = ({k: d[k] for k in ("num_class", "num_feature", "base_score")} for d in (here, there))
        if here != there:
            raise ValueError(
                field_error(name, here, f"{there} as before", "let all sites have the same columns and params")
            )


def _check_columns(site: SiteId, told: Tensors, others: Mapping[SiteId, Tensors]) -> None:
    """Raises UpdateInvalid where a site has other columns than the first, or meets others in another way."""
    if not others:
        return
    first = next(iter(others))
    here, there = _json(told["bytes"]), _json(others[first]["bytes"])
    if here.get("tls") != there.get("tls"):
        found, expected = ("certificates" if told.get("tls") else "no certificates" for told in (here, there))
        fix = "give all sites certificates, in their own configuration, or none"
        raise UpdateInvalid(field_error("tls", found, f"{expected}, as {first}", fix), site=site)
    mine, theirs = _columns_of(here), _columns_of(there)
    if mine != theirs:
        more, missing = sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))
        found = f"{more} more and {missing} fewer" if more or missing else "another order"
        fix = "bring the tables into one form"
        raise UpdateInvalid(field_error("columns", found, f"the {len(theirs)} of {first}", fix), site=site)


def _columns_of(told: Json) -> list[str]:
    if "columns" in told:
        return list(told["columns"])
    learner = told["learner"]
    return list(learner["feature_names"] or map(str, range(int(learner["learner_model_param"]["num_feature"]))))


def _check_trees(booster: Json, iterations: int) -> None:
    """Raises what a mapping raises, or ValueError, where `booster` is not so many iterations of trees that can be walked down."""
    model = _model(booster)
    indptr, trees = model["iteration_indptr"], model["trees"]
    features, groups = (int(booster["learner"]["learner_model_param"][k]) for k in ("num_feature", "num_class"))
    if (
        len(indptr) != iterations + 1
        or indptr[0] != 0
        or indptr[-1] != len(trees)
        or booster["learner"]["gradient_booster"]["name"] != "gbtree"
    ):
        raise ValueError(f"found iterations {indptr} of {len(trees)} trees")
    if any(b <= a or (b - a) % max(groups, 1) for a, b in itertools.pairwise(indptr)) or len(model["tree_info"]) != len(
        trees
    ):
        raise ValueError(f"found iterations {indptr} of {groups} classes")
    if any(type(group) is not int or not 0 <= group < max(groups, 1) for group in model["tree_info"]):
        raise ValueError("found trees of no class")
    for tree in trees:
        left, right, splits, values = (
            tree[k] for k in ("left_children", "right_children", "split_indices", "split_conditions")
        )
        count = int(tree["tree_param"]["num_nodes"])
        if not len(left) == len(right) == len(splits) == len(values) == count or count < 1:
            raise ValueError(f"found a tree of {count} nodes with {len(left)} of them")
        for node, (a, b, feature, value) in enumerate(zip(left, right, splits, values, strict=True)):
            inner = node < a < count and node < b < count and 0 <= feature < features
            if not (inner or a == b == -1) or not math.isfinite(value):
                raise ValueError(f"found a node {[a, b, feature, value]} in a tree of {count}")


def _raw(tensors: Tensors) -> bytes | None:
    return bytes(tensors["booster"].numpy()) if "booster" in tensors else None


def _json(data: Tensor) -> Json:
    def refuse(name: str) -> Any:
        raise ValueError(f"found {name}, expected a finite number")

    found: Json = json.loads(bytes(data.numpy()), parse_constant=refuse)
    return found


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
