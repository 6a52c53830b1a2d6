"""A task: a function of the sites' own, asked of all of them, its answers reduced at the server.

    site i:  aᵢ ← f(data of i, what is shared)
    server:  r ← reduction of all aᵢ;  what is shared of r is what sites are given in the next round
f is found at the site, in its own registry; nothing but its name and arguments goes there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ByteSize, Field, JsonValue, field_validator
from torch import Tensor

from fedflow.algorithm import Algorithm, NoState, Own
from fedflow.algorithms.answers import Answer, added, answer_spec, as_arrays
from fedflow.errors import FedflowError, TrainingInvalid, UpdateInvalid, field_error
from fedflow.registry import call, resolve
from fedflow.tensors import cast
from fedflow.types import Aggregate, Groups, Result, RoundContext, Spec, Tensors, Update, canonical_json

__all__ = ["FederatedTask", "TaskState"]

BUILT_IN = ("collect", "sum", "mean")
GIVEN = ("data", "arrays", "round", "seed", "site", "answers", "found", "args", "field")
"""Names of arguments that are not to be had for what is shared."""


@dataclass(frozen=True)
class TaskState:
    """The newest result. values: canonical JSON of an object; shared: names of what sites are given of both"""

    arrays: Tensors
    values: str
    shared: tuple[str, ...]


class FederatedTask(Algorithm):
    """Any function of the sites' data, round after round; the recipe's workload is the data, of whatever kind."""

    kind: Literal["task"] = "task"
    trains: ClassVar[bool] = False
    partitionable: ClassVar[bool] = False
    State: ClassVar[type[Any]] = TaskState

    function: Annotated[str, Field(min_length=1)]
    """f: a short name that the site's configuration or an installed package defines, or "package.module:function". Called with those of
    `data`, what is shared (each by its name; all arrays together as `arrays`), `round`, `seed` and `site` that its signature has,
    and with `args`; returns a mapping of names to numbers, arrays, and whatever JSON has."""
    args: dict[str, JsonValue] = {}
    """Keyword arguments of the function."""
    reduction: Annotated[str, Field(min_length=1)] = "collect"
    """What becomes of the answers: `collect` (every site's under `sites`, its arrays as "<site>/<name>"), `sum`, `mean` (weighted by
    the answers' `examples`, else 1), or a function "package.module:function" at the server, called as the sites' is, with `answers` (site -> what it sent) for `data`."""
    reduction_args: dict[str, JsonValue] = {}
    """Keyword arguments of a reduction of your own."""
    shared: list[Annotated[str, Field(min_length=1)]] = []
    """Names in the result that sites are given in the next round; nothing else of it leaves the server. The tensors of the recipe's
    model, if there is one, are shared from the beginning."""
    answer_limit: Annotated[ByteSize, Field(ge=1024)] = ByteSize(8 << 20)
    """The most that a site's arrays may take, and again its values. Ours."""

    @field_validator("shared")
    @classmethod
    def _nameable(cls, shared: list[str]) -> list[str]:
        if taken := sorted(set(shared) & set(GIVEN)):
            raise ValueError(f"found {taken}, expected other names than {', '.join(GIVEN)}; rename them in the result")
        return shared

    @field_validator("reduction")
    @classmethod
    def _known(cls, reduction: str) -> str:
        if ":" not in reduction and reduction not in BUILT_IN:
            raise ValueError(f"found {reduction!r}, expected one of {', '.join(BUILT_IN)} or 'module:function'")
        return reduction

    # -- server
    def init(self, model: Groups) -> TaskState:
        self._reduction()
        arrays = {name: tensor for tensors in model.values() for name, tensor in tensors.items()}
        return TaskState(arrays, "{}", (*arrays, *(name for name in self.shared if name not in arrays)))

    def _reduction(self) -> Callable[..., Any] | None:
        """The user's; None of a built-in one. Raises ResolveError."""
        if self.reduction in BUILT_IN:
            return None
        found: Callable[..., Any] = resolve("reductions", self.reduction, field="algorithm.reduction")
        return found

    def model(self, state: TaskState) -> Groups:
        """The arrays that are shared."""
        return {"params": _only(state.arrays, state.shared), "frozen": {}, "buffers": {}}

    def result(self, state: TaskState) -> Result:
        return Result(json.loads(state.values), state.arrays)

    def broadcast(self, state: TaskState, phase: str) -> Groups:
        return {"shared": Answer(*self._shared(state)).encoded()}

    def _shared(self, state: TaskState) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return _only(json.loads(state.values), state.shared), _only(state.arrays, state.shared)

    def expects(self, state: TaskState, phase: str) -> Spec:
        return answer_spec(self.answer_limit)

    def weight(self, update: Update) -> float:
        return update.examples

    @property
    def gathers(self) -> bool:
        return self.reduction not in ("sum", "mean")

    def decode(self, update: Update, state: TaskState, phase: str) -> Update:
        _read(update)
        return update

    def aggregate(self, updates: Iterable[Update], ctx: RoundContext) -> Aggregate:
        """One answer, reduced as they come; or all of them, by site."""
        metrics: dict[str, Mapping[str, float]] = {}
        weights: list[float] = []

        def noted() -> Iterable[Update]:
            for update in updates:
                metrics[update.site] = dict(update.metrics)
                weights.append(self.weight(update))
                yield update

        if self.gathers:
            sent: dict[str, Tensors] = {update.site: update.tensors["answer"] for update in noted()}
        else:
            sent = {"": self._added(noted()).encoded()}
        return Aggregate(sent, sum(weights), len(weights), metrics)

    def _added(self, updates: Iterable[Update]) -> Answer:
        current = None

        def weighted() -> Iterable[tuple[Answer, float]]:
            nonlocal current
            for update in updates:
                current = update.site
                yield _read(update), self.weight(update)

        try:
            return added(weighted(), mean=self.reduction == "mean")
        except ValueError as error:
            raise UpdateInvalid(str(error), site=current) from error

    def server_update(self, state: TaskState, aggregate: Aggregate, ctx: RoundContext) -> TaskState:
        answers = {site: Answer.decoded(sent) for site, sent in aggregate.tensors.items()}
        reduced = self._reduced(answers, state, ctx)
        values, arrays = _only(json.loads(state.values), state.shared), _only(state.arrays, state.shared)
        for name, tensor in reduced.tensors.items():
            arrays[name] = self._fitting(name, tensor, state) if name in arrays else tensor
            values.pop(name, None)
        for name, value in reduced.values.items():
            values[name] = value
            arrays.pop(name, None)
        if missing := [name for name in state.shared if name not in arrays and name not in values]:
            fix = "correct algorithm.shared, or return them"
            raise FedflowError(field_error("algorithm.shared", missing, f"names among {[*values, *arrays]}", fix))
        return TaskState(arrays, canonical_json(values).decode(), state.shared)

    def _reduced(self, answers: Mapping[str, Answer], state: TaskState, ctx: RoundContext) -> Answer:
        if self.reduction in ("sum", "mean"):
            return answers[""]
        if (reduction := self._reduction()) is None:
            arrays = {f"{site}/{name}": t for site, answer in answers.items() for name, t in answer.tensors.items()}
            return Answer({"sites": {site: answer.values for site, answer in answers.items()}}, arrays)
        known = {site: answer.named() for site, answer in answers.items()}
        given = {**_given(*self._shared(state), ctx), "answers": known}
        returned = call(reduction, self.reduction_args, field="algorithm.reduction_args", **given)
        try:
            return Answer.of(returned)
        except ValueError as error:
            raise FedflowError(f"algorithm.reduction {self.reduction}: {error}") from error

    def _fitting(self, name: str, tensor: Tensor, state: TaskState) -> Tensor:
        """A tensor of the recipe's model stays of its shape and dtype."""
        before = state.arrays[name]
        if name in self.shared:
            return tensor
        if before.shape != tensor.shape:
            raise FedflowError(
                f"algorithm.reduction {self.reduction}: {name}: found shape {list(tensor.shape)}, expected the model's {list(before.shape)}"
            )
        return cast(tensor, before.dtype)

    # -- site
    def site_update(
        self, broadcast: Groups, site_state: NoState, work: Own, ctx: RoundContext
    ) -> tuple[Update, NoState]:
        shared = Answer.decoded(broadcast["shared"])
        returned = work.apply(self.function, self.args, _given(dict(shared.values), shared.tensors, ctx), ctx)
        try:
            answer = Answer.of(returned)
        except ValueError as error:
            raise TrainingInvalid(f"{self.function}: {error}", **ctx.place) from error
        fix = "send less, or raise algorithm.answer_limit"
        sent = answer.within(self.answer_limit, self.function, ctx, fix)
        return _update(answer, sent, work, ctx), site_state


def _update(answer: Answer, sent: Tensors, work: Own, ctx: RoundContext) -> Update:
    assert ctx.site is not None
    examples = answer.values.get("examples")
    return Update(
        site=ctx.site,
        base_round=ctx.round,
        examples=examples if type(examples) is int and examples > 0 else 1,
        steps=1,
        lr_sum=0.0,
        tensors={"answer": sent},
        metrics=answer.numbers(),
        numerics=work.recorded(),
    )


def _read(update: Update) -> Answer:
    try:
        return Answer.decoded(update.tensors["answer"])
    except ValueError as error:
        raise UpdateInvalid(str(error), site=update.site) from error


def _given(values: Mapping[str, Any], tensors: Tensors, ctx: RoundContext) -> dict[str, Any]:
    """What a function may ask for, by name."""
    arrays = as_arrays(tensors)
    return {**values, **arrays, "arrays": arrays, "round": ctx.round, "seed": ctx.seed, "site": ctx.site}


def _only(mapping: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: mapping[name] for name in names if name in mapping}
