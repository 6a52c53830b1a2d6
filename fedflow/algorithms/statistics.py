"""Federated statistics: what all sites' tables and images look like together, and each alone, as far as it lets that be known.

    summary:    site i: per feature nᵢ, failures, Σx, min and max (noised), some order statistics
                server: N = Σ nᵢ,  shift m = Σ Σx / N,  a range of the histogram's bins
    histogram:  site i: S1ᵢ = Σ(x − m),  S2ᵢ = Σ(x − m)²,  counts in the bins
                server: mean = m + ΣS1/N,  variance = (ΣS2 − (ΣS1)²/N) / (N − 1)
Sums are rounded once (Shewchuk's algorithm), and the second pass is about the mean: an offset of 1e9 costs nothing. What a site's
policy does not allow to be known is left out at the site, in both passes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ByteSize, Field, model_validator

from fedflow.algorithm import Algorithm, NoState, Own
from fedflow.algorithms.answers import Answer, answer_spec
from fedflow.algorithms.quantiles import Sketch, quantiles, rank_error, sketch
from fedflow.described import Described
from fedflow.errors import TrainingInvalid, UpdateInvalid
from fedflow.types import (
    Aggregate,
    Groups,
    Result,
    RoundContext,
    SiteId,
    Spec,
    Tensors,
    Update,
    canonical_json,
)

__all__ = ["Dataset", "OwnTables", "Statistics", "StatisticsPolicy", "StatisticsState", "statistics_table"]

Floats = NDArray[np.float64]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class StatisticsPolicy(Described):
    """What a site's owner lets be known. It is the site's own configuration: no recipe can change it."""

    min_count: Annotated[int, Field(ge=0, strict=True)] = 10
    """Of a feature with fewer values, or fewer rows or images, nothing leaves the site, not even its name; 0: no minimum. NVFlare's."""
    min_noise: Share = 0.1
    """Minimum and maximum are moved outwards by at least this share of the range ... NVFlare's."""
    max_noise: Share = 0.3
    """... and at most by this; 0: they are sent as they are. NVFlare's."""
    max_bins_percent: Annotated[float, Field(gt=0, le=100)] = 10.0
    """A histogram may have so many bins per 100 values, and a sketch of quantiles so many points. NVFlare's."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_noise > self.max_noise:
            raise ValueError(f"min_noise ({self.min_noise}) must not exceed max_noise ({self.max_noise}); lower it")
        return self

    def allows(self, values: int, individuals: int) -> bool:
        """Whether anything may be known of a feature with so many values, of so many rows or images."""
        return min(values, individuals) >= max(self.min_count, 1)

    def most(self, values: int) -> int:
        """Bins of a histogram of so many values."""
        return int(values * self.max_bins_percent / 100)


@dataclass(frozen=True)
class Dataset:
    """One table, or set of images, at a site.

    columns: feature -> its finite values, and how many were missing or no numbers
    individuals: rows, or images; others: names of columns without a number
    """

    columns: Mapping[str, tuple[Floats, int]]
    individuals: int
    others: Sequence[str] = ()


class OwnTables(Own, Protocol):
    """What a site gives to statistics."""

    @property
    def policy(self) -> StatisticsPolicy:
        """What the site's owner lets be known."""
        ...

    def datasets(self) -> Mapping[str, Dataset]:
        """The site's data, by name. Raises ResolveError where it is neither tables nor images."""
        ...


@dataclass(frozen=True)
class StatisticsState:
    """summaries: canonical JSON, site -> dataset -> feature -> the first pass; points: of its sketches; found: of the result"""

    points: Tensors
    summaries: str
    found: str


class Statistics(Algorithm):
    """Count, failures, sum, mean, minimum, maximum, variance, standard deviation, histogram and quantiles of every numeric feature, per
    dataset, for each site and for all together. The recipe's workload is a table, images, or a mapping of names to them. Needs one
    round."""

    kind: Literal["statistics"] = "statistics"
    trains: ClassVar[bool] = False
    work: ClassVar[str] = "fedflow.local.tables:TableData"
    phases: ClassVar[tuple[str, ...]] = ("summary", "histogram")
    partitionable: ClassVar[bool] = False
    State: ClassVar[type[Any]] = StatisticsState

    features: Annotated[list[str], Field(min_length=1)] | None = None
    """Patterns of names ("age", "lab.*"). Default: every numeric column. A column that is named but not numeric excludes its site."""
    bins: Annotated[int, Field(ge=1, le=10_000, strict=True)] = 20
    """Of every histogram. A site whose policy allows fewer sends none."""
    ranges: dict[str, tuple[float, float]] = {}
    """Feature -> range of its histogram. Default: from the sites' (noised) smallest to their largest value."""
    quantiles: list[Annotated[float, Field(ge=0, le=1)]] = [0.25, 0.5, 0.75]
    """Which; none: no site sends order statistics, which are values of single rows."""
    sketch: Annotated[int, Field(ge=1, le=100_000, strict=True)] = 1000
    """k: a site sends at most k + 1 order statistics of a feature; the rank of a quantile is then known within N/k."""
    answer_limit: Annotated[ByteSize, Field(ge=1024)] = ByteSize(16 << 20)
    """The most that a site may send in each pass. Ours."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for feature, (low, high) in self.ranges.items():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"ranges.{feature}: found {[low, high]}, expected [low, high] with low < high")
        return self

    @property
    def gathers(self) -> bool:
        return True

    # -- server
    def init(self, model: Groups) -> StatisticsState:
        return StatisticsState({}, "{}", "{}")

    def model(self, state: StatisticsState) -> Groups:
        return {"params": {}, "frozen": {}, "buffers": {}}

    def result(self, state: StatisticsState) -> Result:
        return Result(json.loads(state.found))

    def page(self, result: Result, sites: Sequence[SiteId], excluded: Mapping[SiteId, str]) -> str:
        return statistics_table(result)

    def broadcast(self, state: StatisticsState, phase: str) -> Groups:
        """In the second pass: dataset -> feature -> [shift, low, high]."""
        told = {} if phase == "summary" else self._told(json.loads(state.summaries))
        return {"told": Answer(told).encoded()}

    def _told(self, summaries: Mapping[SiteId, Any]) -> dict[str, Any]:
        return {
            dataset: {feature: self._scale(feature, list(parts.values())) for feature, parts in features.items()}
            for dataset, features in _by_feature(summaries).items()
        }

    def _scale(self, feature: str, parts: Sequence[Mapping[str, Any]]) -> list[float]:
        shift = math.fsum(p["sum"] for p in parts) / sum(p["count"] for p in parts)
        low, high = self.ranges.get(feature, (min(p["min"] for p in parts), max(p["max"] for p in parts)))
        return [shift, low, high if high > low else low + 1.0]

    def expects(self, state: StatisticsState, phase: str) -> Spec:
        return answer_spec(self.answer_limit)

    def weight(self, update: Update) -> float:
        return 1.0

    def decode(self, update: Update, state: StatisticsState, phase: str) -> Update:
        try:
            answer = Answer.decoded(update.tensors["answer"])
            _check(answer, phase, self.bins)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UpdateInvalid(f"statistics: {error}", site=update.site) from error
        return update

    def aggregate(self, updates: Iterable[Update], ctx: RoundContext) -> Aggregate:
        """What every site sent, by site."""
        sent = {update.site: update.tensors["answer"] for update in updates}
        return Aggregate(sent, float(len(sent)), len(sent), {site: {} for site in sent})

    def server_update(self, state: StatisticsState, aggregate: Aggregate, ctx: RoundContext) -> StatisticsState:
        answers = {site: Answer.decoded(sent) for site, sent in aggregate.tensors.items()}
        if ctx.phase == "summary":
            points = {f"{site}/{name}": t for site, answer in answers.items() for name, t in answer.tensors.items()}
            summaries = {site: answer.values for site, answer in answers.items()}
            return replace(state, points=points, summaries=canonical_json(summaries).decode())
        summaries = {s: v for s, v in json.loads(state.summaries).items() if s in answers}
        scales = self._told(json.loads(state.summaries))
        found: dict[str, Any] = {"sites": sorted(summaries), "datasets": {}, "differs": {}, "not_numeric": {}}
        for dataset, features in _by_feature(summaries).items():
            for feature, parts in features.items():
                seconds = {
                    s: a.values[dataset][feature] for s, a in answers.items() if feature in a.values.get(dataset, {})
                }
                both = {site: {**parts[site], **seconds[site]} for site in sorted(parts) if site in seconds}
                if not both:
                    continue
                sketches = [
                    Sketch(state.points[key].numpy(), p["count"])
                    for site, p in both.items()
                    if (key := f"{site}/{dataset}/{feature}") in state.points
                ]
                scale = scales[dataset][feature]
                found["datasets"].setdefault(dataset, {})[feature] = {
                    "all": _figures(list(both.values()), scale, self.bins, sketches, self.quantiles),
                    "sites": {site: _figures([p], scale, self.bins, (), ()) for site, p in both.items()},
                }
                if len(both) < len(summaries):
                    found["differs"].setdefault(dataset, {})[feature] = sorted(both)
        for site, values in summaries.items():
            if others := values["not_numeric"]:
                found["not_numeric"][site] = others
        return replace(state, points={}, found=canonical_json(found).decode())

    # -- site
    def site_update(
        self, broadcast: Groups, site_state: NoState, work: OwnTables, ctx: RoundContext
    ) -> tuple[Update, NoState]:
        assert ctx.site is not None
        told, policy = Answer.decoded(broadcast["told"]).values, work.policy
        values: dict[str, Any] = {"not_numeric": {}} if ctx.phase == "summary" else {}
        tensors: dict[str, torch.Tensor] = {}
        for name, dataset in work.datasets().items():
            chosen = self._chosen(name, dataset, policy, ctx)
            if ctx.phase == "summary":
                values[name] = {f: _summary(x, bad, policy, f"{name}/{f}", ctx) for f, (x, bad) in chosen.items()}
                if dataset.individuals >= policy.min_count and dataset.others and self.features is None:
                    values["not_numeric"][name] = sorted(dataset.others)
                tensors |= {
                    f"{name}/{f}": p
                    for f, (x, _) in chosen.items()
                    if (p := self._points(x, values[name][f], policy)) is not None
                }
            else:
                scales = told.get(name, {})
                values[name] = {f: self._second(x, scales[f], policy) for f, (x, _) in chosen.items() if f in scales}
        fix = "name fewer features, lower sketch, or raise algorithm.answer_limit"
        sent = Answer(values, tensors).within(self.answer_limit, "statistics", ctx, fix)
        update = Update(ctx.site, ctx.round, 1, 1, 0.0, {"answer": sent}, numerics=work.recorded())
        return update, site_state

    def _chosen(
        self, name: str, dataset: Dataset, policy: StatisticsPolicy, ctx: RoundContext
    ) -> dict[str, tuple[Floats, int]]:
        """The features that were asked for and may be known. Raises TrainingInvalid where one is named that is not numeric."""
        wanted = self.features or ["*"]
        if not dataset.individuals:
            raise TrainingInvalid(f"table {name!r}: found no rows, expected some; leave this site out", **ctx.place)
        named = [] if self.features is None else [f for f in dataset.others if _matches(f, wanted)]
        if named:
            raise TrainingInvalid(
                f"algorithm.features: found {named} of table {name!r} without a number, expected numeric columns; leave them out",
                **ctx.place,
            )
        return {
            feature: column
            for feature, column in dataset.columns.items()
            if _matches(feature, wanted) and policy.allows(len(column[0]), dataset.individuals)
        }

    def _points(self, x: Floats, summary: Mapping[str, Any], policy: StatisticsPolicy) -> torch.Tensor | None:
        """Order statistics, their ends as they may be known; none where none are wanted or allowed."""
        parts = min(self.sketch, policy.most(len(x)))
        if not self.quantiles or parts < 1:
            return None
        points = sketch(x, parts).points.copy()
        points[0], points[-1] = summary["min"], summary["max"]
        return torch.from_numpy(points) if len(points) > 1 else None

    def _second(self, x: Floats, scale: Sequence[float], policy: StatisticsPolicy) -> dict[str, Any]:
        """The second pass over a feature."""
        shift, low, high = scale
        about = x - shift
        found: dict[str, Any] = {"s1": math.fsum(about), "s2": math.fsum(about * about)}
        if self.bins <= max(policy.most(len(x)), 1):
            found["counts"] = np.histogram(x, bins=self.bins, range=(low, high))[0].tolist()
        return found


# -- at a site ---------------------------------------------------------------------------------------------------------
def _summary(x: Floats, failures: int, policy: StatisticsPolicy, name: str, ctx: RoundContext) -> dict[str, Any]:
    """The first pass over a feature."""
    low, high = float(x.min()), float(x.max())
    below, above = _noise(x, policy, name, ctx)
    return {
        "count": len(x),
        "failures": failures,
        "sum": math.fsum(x),
        "min": low - below * (high - low),
        "max": high + above * (high - low),
    }


def _noise(x: Floats, policy: StatisticsPolicy, name: str, ctx: RoundContext) -> tuple[float, float]:
    """Shares of the range. Seeded by the values themselves, which nobody else has: the same for a retry, another in another run."""
    digest = hashlib.blake2b(f"{ctx.run} {ctx.round} {name} ".encode() + np.sort(x).tobytes(), digest_size=16).digest()
    random = np.random.default_rng(list(digest))
    below, above = random.uniform(policy.min_noise, policy.max_noise, 2)
    return float(below), float(above)


def _matches(feature: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(feature, pattern) for pattern in patterns)


# -- at the server -----------------------------------------------------------------------------------------------------
def _check(answer: Answer, phase: str, bins: int) -> None:
    """Raises what a mapping raises, or ValueError, where an answer is not what sites send in `phase`."""
    names = ("count", "failures", "sum", "min", "max") if phase == "summary" else ("s1", "s2")
    for dataset, features in answer.values.items():
        if dataset == "not_numeric" and phase == "summary":
            continue
        for feature, found in features.items():
            if not all(isinstance(found[name], (int, float)) for name in names):
                raise ValueError(f"{dataset}/{feature}: expected numbers as {', '.join(names)}")
            if phase == "summary" and not (type(found["count"]) is int and found["count"] > 0):
                raise ValueError(f"{dataset}/{feature}: found a count of {found['count']}, expected at least 1")
            counts = found.get("counts", [0] * bins)
            if len(counts) != bins or not all(type(n) is int and n >= 0 for n in counts):
                raise ValueError(f"{dataset}/{feature}: found other counts than of {bins} bins")
    if phase == "summary" and "not_numeric" not in answer.values:
        raise ValueError("found no `not_numeric`")
    for name, points in answer.tensors.items():
        if points.dtype != torch.float64 or points.dim() != 1 or bool((points.diff() < 0).any()):
            raise ValueError(f"{name}: expected order statistics, in order")


def _by_feature(summaries: Mapping[SiteId, Any]) -> dict[str, dict[str, dict[SiteId, Any]]]:
    """dataset -> feature -> site -> what it sent."""
    found: dict[str, dict[str, dict[SiteId, Any]]] = {}
    for site, datasets in summaries.items():
        for dataset, features in datasets.items():
            for feature, part in features.items() if dataset != "not_numeric" else ():
                found.setdefault(dataset, {}).setdefault(feature, {})[site] = part
    return {dataset: dict(sorted(features.items())) for dataset, features in sorted(found.items())}


def _figures(
    parts: Sequence[Mapping[str, Any]],
    scale: Sequence[float],
    bins: int,
    sketches: Sequence[Sketch],
    wanted: Sequence[float],
) -> dict[str, Any]:
    """Of the values of all `parts` together. scale: shift, and the range of the bins"""
    shift, low, high = scale
    count = sum(p["count"] for p in parts)
    s1, s2 = (math.fsum(p[name] for p in parts) for name in ("s1", "s2"))
    variance = max(s2 - s1 * s1 / count, 0.0) / (count - 1) if count > 1 else None
    found: dict[str, Any] = {
        "count": count,
        "failures": sum(p["failures"] for p in parts),
        "sum": math.fsum(p["sum"] for p in parts),
        "mean": shift + s1 / count,
        "min": min(p["min"] for p in parts),
        "max": max(p["max"] for p in parts),
        "variance": variance,
        "stddev": None if variance is None else math.sqrt(variance),
    }
    if binned := [p["counts"] for p in parts if "counts" in p]:
        edges = np.linspace(low, high, bins + 1).tolist()
        found["histogram"] = {"edges": edges, "counts": np.sum(binned, axis=0).tolist(), "sites": len(binned)}
    if sketches and wanted:
        values = dict(zip(map(str, wanted), quantiles(sketches, wanted), strict=True))
        found["quantiles"] = {"values": values, "rank_error": rank_error(sketches), "sites": len(sketches)}
    return found


def statistics_table(result: Result) -> str:
    """The figures of all sites together as a Markdown table, and what differs between the sites."""
    names = ("count", "failures", "mean", "stddev", "min", "max")
    lines = [f"| feature | {' | '.join(names)} | quantiles |", "|---" * (len(names) + 2) + "|"]
    for dataset, features in result.values.get("datasets", {}).items():
        for feature, found in features.items():
            figures = [_shown(found["all"][name]) for name in names]
            asked = found["all"].get("quantiles", {}).get("values", {})
            told = ", ".join(f"{q}: {_shown(v)}" for q, v in asked.items())
            lines.append(f"| {_cell(dataset)} / {_cell(feature)} | {' | '.join(figures)} | {told} |")
    for dataset, features in result.values.get("differs", {}).items():
        for feature, sites in features.items():
            lines += ["", f"{_cell(dataset)} / {_cell(feature)}: only from {', '.join(sites)}"]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
