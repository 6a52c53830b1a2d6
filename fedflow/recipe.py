"""The recipe: everything a user says about a run, as one value. The same from Python, YAML, JSON and the UI's form."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, TypeVar

from blake3 import blake3
from pydantic import (
    BaseModel,
    ByteSize,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from fedflow import algorithms, schedules, transforms
from fedflow.algorithm import Algorithm, Schedule, Transform
from fedflow.algorithms.statistics import StatisticsPolicy
from fedflow.described import Described
from fedflow.errors import RecipeError, RecipeRefused, ResolveError, UserError, field_error
from fedflow.registry import entry_point_names, load_entry_point, resolve
from fedflow.transforms.composed import Transformed
from fedflow.transforms.evaluated import Validated
from fedflow.types import SiteId, canonical_json

__all__ = [
    "AMENDABLE",
    "TLS",
    "Delay",
    "Duration",
    "EarlyStop",
    "Federation",
    "FederationSite",
    "ImportRef",
    "KeyMetric",
    "LocalTraining",
    "Numerics",
    "Optimizer",
    "Recipe",
    "Review",
    "ReviewPolicy",
    "SiteConfig",
    "SiteLimits",
    "SiteOverrides",
    "Timeouts",
    "explain",
    "read_model",
]

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
Name = Annotated[str, Field(pattern=NAME)]
"""Letters, digits, dot, dash, underscore; at most 63; it becomes part of keys, pools and deployments."""

PublicKey = Annotated[str, Field(pattern=r"^ed25519:[A-Za-z0-9+/]{43}=$")]
"""As `fedflow site enroll` prints it."""

MAX_BACKOFF = timedelta(seconds=60)
"""The longest pause between two attempts of a site."""


# -- durations ---------------------------------------------------------------------------------------------------------
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def _parse_duration(value: Any, as_timedelta: ValidatorFunctionWrapHandler) -> Any:
    """Seconds, an ISO 8601 duration, or "1h30m", "90s", "500ms"."""
    if isinstance(value, str) and (parts := re.fullmatch(r"\s*((?:\d+(?:\.\d+)?\s*(?:ms|s|m|h|d)\s*)+)", value)):
        found = re.findall(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)", parts[1])
        return timedelta(seconds=sum(float(n) * _UNITS[u] for n, u in found))
    if not isinstance(value, bool):
        with contextlib.suppress(ValidationError):
            return as_timedelta(value)
    raise ValueError(f'found {value!r}, expected seconds, "90s", "10m", "1h30m" or ISO 8601')


Duration = Annotated[timedelta, WrapValidator(_parse_duration), Field(gt=timedelta(0))]
Delay = Annotated[timedelta, WrapValidator(_parse_duration), Field(ge=timedelta(0))]


# -- algorithms, schedules, transforms by kind -------------------------------------------------------------------------
class _ByKind:
    """A field that holds an algorithm, a schedule or a transform: `{"kind": name, hyperparameters...}`.

    The name is a built-in, an entry point of an installed package, or an import path allowed by the validation context
    (`context={"allowed_imports": [...]}`; without it any).
    """

    def __init__(self, base: type[Algorithm] | type[Schedule] | type[Transform], group: str, module: Any) -> None:
        self.base, self.group = base, group
        self.builtin: dict[str, Any] = {
            cls.model_fields["kind"].default: cls for cls in (getattr(module, name) for name in module.__all__)
        }

    def find(self, kind: str, info: ValidationInfo | None = None) -> Any:
        if kind in self.builtin:
            return self.builtin[kind]
        allowed = (info.context or {}).get("allowed_imports") if info else None
        if ":" not in kind:
            found = load_entry_point(self.group, kind, field="kind", allowed=allowed)
            if found is None:
                known = sorted({*self.builtin, *entry_point_names(self.group)})
                raise ResolveError(
                    field_error("kind", kind, f"one of {known} or an import path 'module:Class'", "correct the name")
                )
        else:
            found = resolve(self.group, kind, field="kind", allowed=allowed)
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise ResolveError(field_error("kind", kind, f"a subclass of {self.base.__name__}", "correct the name"))
        return found

    def name_of(self, value: Any) -> str:
        kind = str(value.kind)
        if self.builtin.get(kind) is type(value) or (kind in entry_point_names(self.group)):
            return kind
        return f"{type(value).__module__}:{type(value).__qualname__}"

    def parse(self, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, self.base):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
            raise PydanticCustomError(
                "kind", "expected a mapping with a 'kind', one of {kinds}", {"kinds": sorted(self.builtin)}
            )
        try:
            cls = self.find(value["kind"], info)
        except UserError as error:
            raise PydanticCustomError("resolve", "{why}", {"why": str(error)}) from error
        fields = {k: v for k, v in value.items() if k != "kind"}
        return cls.model_validate(fields, context=info.context)

    def dump(self, value: Any) -> dict[str, Any]:
        return {**value.model_dump(mode="json"), "kind": self.name_of(value)}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self.parse, serialization=core_schema.plain_serializer_function_ser_schema(self.dump)
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        known = self._kinds()
        other = {
            "title": "Another, by name or import path",
            "type": "object",
            "properties": {"kind": {"type": "string", "title": "Kind", "not": {"enum": known}}},
            "required": ["kind"],
            "additionalProperties": True,
        }
        # of a value, Prefect's forms show the first kind that has most of its fields: its own, where kinds with fewer come first
        forms = sorted((self._form(kind) for kind in known), key=lambda form: len(form["properties"]))
        return {"oneOf": [*forms, other], "title": self.base.__name__}

    def _kinds(self) -> list[str]:
        return sorted({*self.builtin, *entry_point_names(self.group)})

    def _form(self, kind: str) -> dict[str, Any]:
        """The JSON schema of one kind. `kind` is required with a one-value enum: a form needs it to tell them apart."""
        schema: dict[str, Any] = self.find(kind).model_json_schema()
        form: dict[str, Any] = _for_forms(schema, schema.get("$defs", {}))
        form["properties"]["kind"] = {"type": "string", "enum": [kind], "title": "Kind"}
        form["required"] = ["kind", *(name for name in form.get("required", []) if name != "kind")]
        return form


def _for_forms(schema: Any, defs: Mapping[str, Any]) -> Any:
    """`schema` without references, its choices told apart by a required `kind` of one value."""
    if isinstance(schema, list):
        return [_for_forms(part, defs) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if reference := schema.get("$ref"):
        return _for_forms(
            {**defs[reference.rpartition("/")[2]], **{k: v for k, v in schema.items() if k != "$ref"}}, defs
        )
    found = {k: _for_forms(v, defs) for k, v in schema.items() if k not in ("$defs", "discriminator")}
    properties = found.get("properties", {})
    if isinstance(kind := properties.get("kind"), dict) and "const" in kind:
        properties["kind"] = {"type": "string", "enum": [kind["const"]], "title": "Kind"}
        found["required"] = ["kind", *(name for name in found.get("required", []) if name != "kind")]
    return found


_algorithms = _ByKind(Algorithm, "algorithms", algorithms)
_schedules = _ByKind(Schedule, "schedules", schedules)
_transforms = _ByKind(Transform, "transforms", transforms)


# -- parts -------------------------------------------------------------------------------------------------------------
class ImportRef(Described):
    """Something found by name where it is needed: a model, a workload. A bare string is the path without arguments."""

    path: Annotated[str, Field(min_length=1)]
    """"package.module:attribute", or a short name that the site or an installed package defines."""
    args: dict[str, JsonValue] = {}
    """Keyword arguments."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class Optimizer(Described):
    """The local optimizer, by torch.optim's names and defaults."""

    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Learning rate η_l."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """SGD only."""
    nesterov: bool = False
    """SGD only."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam and AdamW only."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind != "sgd" and (self.momentum or self.nesterov):
            raise ValueError(f"momentum and nesterov are SGD's, not {self.kind}'s: remove them or set kind: sgd")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum > 0")
        return self


class LocalTraining(Described):
    """How a site trains in one round. Give `epochs` or `steps`; one epoch where neither is given."""

    epochs: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Passes over the site's data."""
    steps: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Exactly so many optimizer steps (K), going round the data as often as needed."""
    batch_size: Annotated[int, Field(ge=1, strict=True)] = 32
    optimizer: Optimizer = Optimizer()
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest global gradient norm before each step."""
    config: dict[str, JsonValue] = {}
    """What a training function or script of the site's own is given besides, under names of its choice."""
    evaluate: Literal["after", "before", "both", "never"] = "after"
    """When the site evaluates: its own model after the training, the received one before it ("before." in front of its metrics)."""
    strict: bool = False
    """Training code that has to be stopped after its steps, or data that cannot be resumed, is an error and not a warning."""
    tidy_every: Annotated[int, Field(ge=0, strict=True)] = 0
    """Give freed memory back to the system after every so many rounds, at the site and at the coordinator; 0 = never."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self


class Timeouts(Described):
    """The only six durations of a run. What is not given follows from `round_deadline`; contradictions are errors."""

    round_deadline: Duration = timedelta(hours=2)
    """From a round's opening to its closing. Ours."""
    train_timeout: Duration | None = None
    """One attempt of one site, killed after it. Default: what the deadline leaves to each attempt."""
    transfer_timeout: Duration | None = None
    """No byte for so long is a stalled transfer. Default: 5 minutes, at most half of train_timeout."""
    quorum_grace: Delay | None = None
    """How long a round that has its quorum waits for the rest. Default: 30 s, at most a tenth of round_deadline."""
    heartbeat: Duration | None = None
    """How often a trainer shows life and looks whether its round closed. Default: 30 s, at most a tenth of round_deadline."""
    run_timeout: Duration | None = None
    """The whole run. Default: none."""

    def resolved(self, attempts: int) -> Timeouts:
        """All durations filled in."""
        tenth = self.round_deadline / 10
        train = self.train_timeout or self.round_deadline / attempts - _spare(attempts, self.round_deadline)
        return Timeouts(
            round_deadline=self.round_deadline,
            train_timeout=train,
            transfer_timeout=self.transfer_timeout or min(timedelta(minutes=5), train / 2),
            quorum_grace=self.quorum_grace if self.quorum_grace is not None else min(timedelta(seconds=30), tenth),
            heartbeat=self.heartbeat or min(timedelta(seconds=30), tenth),
            run_timeout=self.run_timeout,
        )

    def contradictions(self, attempts: int) -> list[str]:
        """What does not fit together, each naming both settings and the fix."""
        t = self.resolved(attempts)
        assert t.train_timeout and t.transfer_timeout and t.heartbeat and t.quorum_grace is not None
        pause = backoff(attempts, t.round_deadline)
        needed = attempts * (t.train_timeout + pause)
        found = []

        def check(ok: bool, less: str, a: timedelta, more: str, b: timedelta, fix: str) -> None:
            if not ok:
                found.append(f"timeouts.{less} ({a}) must be below timeouts.{more} ({b}); {fix}")

        check(
            t.transfer_timeout < t.train_timeout,
            "transfer_timeout",
            t.transfer_timeout,
            "train_timeout",
            t.train_timeout,
            "lower the first or raise the second",
        )
        check(
            t.train_timeout < t.round_deadline,
            "train_timeout",
            t.train_timeout,
            "round_deadline",
            t.round_deadline,
            "lower the first or raise the second",
        )
        check(
            t.quorum_grace < t.round_deadline,
            "quorum_grace",
            t.quorum_grace,
            "round_deadline",
            t.round_deadline,
            "lower the first or raise the second",
        )
        check(
            t.heartbeat < t.round_deadline,
            "heartbeat",
            t.heartbeat,
            "round_deadline",
            t.round_deadline,
            "lower the first or raise the second",
        )
        if self.train_timeout and needed > t.round_deadline:
            found.append(
                f"timeouts.train_timeout ({t.train_timeout}) times attempts ({attempts}), with {pause} of backoff each, is {needed}: "
                f"more than timeouts.round_deadline ({t.round_deadline}); raise round_deadline or lower attempts"
            )
        if t.run_timeout:
            check(
                t.round_deadline <= t.run_timeout,
                "round_deadline",
                t.round_deadline,
                "run_timeout",
                t.run_timeout,
                "lower the first or raise the second",
            )
        return found


def _spare(attempts: int, deadline: timedelta) -> timedelta:
    """What training leaves of its attempt's share of the deadline, for transfers and for the pause before the next."""
    return min(MAX_BACKOFF, deadline / attempts / 10)


def backoff(attempts: int, deadline: timedelta) -> timedelta:
    """The longest pause before the next attempt; none if there is only one."""
    return _spare(attempts, deadline) if attempts > 1 else timedelta(0)


class Numerics(Described):
    """What decides the bits of a training, applied by the shared training code in every environment."""

    deterministic: Literal["bitwise", "fast"] = "bitwise"
    """bitwise: equal bits in every environment. fast: whatever is quickest, compared within a tolerance."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of one trainer; gradients of convolutions differ between 1 and 2."""
    device: Literal["cpu", "cuda", "mps"] = "cpu"


class KeyMetric(Described):
    """The metric that decides which model is best."""

    name: str = "accuracy"
    """A metric of the server's evaluation, or else of the sites (weighted mean)."""
    mode: Literal["max", "min"] = "max"


class EarlyStop(Described):
    """When to stop before the last round, judged by the key metric."""

    patience: Annotated[int, Field(ge=1)] | None = None
    """Rounds without an improvement of more than `min_delta`."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    target: float | None = None
    """Stop as soon as the key metric reaches this."""


class SiteOverrides(Described):
    """What is different at one site."""

    training: dict[str, JsonValue] = {}
    """Fields of `training`, merged over the recipe's."""
    workload_args: dict[str, JsonValue] = {}
    """Arguments of the workload, merged over the recipe's."""


NO_MODEL = "fedflow.local.model:NoModel"
"""Of a recipe whose algorithm trains nothing."""


def _trains(algorithm: Any) -> bool:
    """Whether an algorithm, as a recipe has it, trains a model; True where it is not known."""
    kind = algorithm.get("kind") if isinstance(algorithm, Mapping) else algorithm
    if isinstance(kind, Algorithm):
        return kind.trains
    try:
        return not isinstance(kind, str) or bool(_algorithms.find(kind).trains)
    except UserError:
        return True


R = TypeVar("R", covariant=True)


class Runs(Protocol[R]):
    """Whatever runs recipes: an environment."""

    def execute(self, recipe: Recipe, *, run_id: str | None = None) -> R: ...


# -- the recipe --------------------------------------------------------------------------------------------------------
class Recipe(Described):
    """A run, as one value: model and data by name, algorithm, schedule, rounds, and what happens when something fails."""

    name: Name
    """Names the run's flow runs and, with a number, the run."""
    model: ImportRef
    """A factory of the `torch.nn.Module`, found at the server and at every site. May be left out where the algorithm trains nothing."""
    workload: ImportRef
    """What a site trains on, resolved at the site."""
    rounds: Annotated[int, Field(ge=1, strict=True)]
    algorithm: Annotated[Any, _algorithms] = algorithms.FedAvg()
    """The mathematics of a round."""
    schedule: Annotated[Any, _schedules] = schedules.Everyone()
    """Who takes part."""
    transforms: list[Annotated[Any, _transforms]] = []
    """What happens to updates and broadcasts on their way, in this order: compression."""
    training: LocalTraining = LocalTraining()
    """Local training at every site."""
    overrides: dict[Name, SiteOverrides] = {}
    """Per site."""
    checkpoint: str | None = None
    """Initial model: a safetensors file, a PyTorch file that loads with weights_only, or that of another run in the same store:
    "run:<id>" for its last, "run:<id>@best", "run:<id>@<round>". Default: the factory's own."""
    checkpoints: dict[Name, str] = {}
    """Further models, by name, for algorithms that look at several (`evaluation`)."""
    seed: Annotated[int, Field(ge=0, lt=2**53, strict=True)] = 0
    numerics: Numerics = Numerics()
    quorum: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Valid updates that close a round. Default: the schedule's (everyone asked, or the sample's size)."""
    min_sites: Annotated[int, Field(ge=1, strict=True)] = 1
    """Sites that must be there for a round to begin."""
    required_sites: list[Name] = []
    """Sites without which no round counts."""
    wait_for_sites: Duration = timedelta(minutes=2)
    """How long a run waits at its start for the sites' workers."""
    late: Literal["drop", "carry"] = "drop"
    """What becomes of an update that arrives after its round closed: dropped, or counted in the next round, for which the site
    goes on until its round's deadline."""
    attempts: Annotated[int, Field(ge=1, le=20, strict=True)] = 3
    """How often a site may try in a round."""
    memory_budget: Annotated[ByteSize, Field(ge=1024)] = ByteSize(256 << 20)
    """Memory that aggregation takes for tensors, in bytes or as "1GiB", however large the model; no bit depends on it."""
    timeouts: Timeouts = Timeouts()
    evaluation: ImportRef | None = None
    """A workload with `evaluate(model)`, resolved at the server, run after every round on data held out there."""
    federated_evaluation: bool = False
    """Whether the sites evaluate the model that each round makes, on their held-out data, in a phase of its own: the key metric is then
    that model's, and not that of the models which the sites trained in that round. Late updates are dropped."""
    key_metric: KeyMetric = KeyMetric()
    early_stop: EarlyStop = EarlyStop()

    @model_validator(mode="before")
    @classmethod
    def _without_a_model(cls, value: Any) -> Any:
        """What trains nothing may begin with nothing."""
        if isinstance(value, Mapping) and "model" not in value and not _trains(value.get("algorithm")):
            return {**value, "model": NO_MODEL}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = self.timeouts.contradictions(self.attempts)
        if self.federated_evaluation and not self.algorithm.evaluates:
            problems.append(f"federated_evaluation: found true, expected false with algorithm {self.algorithm.kind}")
        if self.evaluation and self.algorithm.model_files:
            kind, fix = self.algorithm.kind, "let the sites evaluate (federated_evaluation)"
            problems.append(field_error("evaluation", self.evaluation.path, f"none with algorithm {kind}", fix))
        if clash := sorted({"last"} & self.checkpoints.keys()):
            problems.append(f"checkpoints: found {clash}, which is what `checkpoint` is called; choose another name")
        if self.transforms and not self.algorithm.trains:
            problems.append(f"transforms: found some, expected none with algorithm {self.algorithm.kind}; remove them")
        if self.quorum is not None and self.min_sites > self.quorum:
            problems.append(
                f"min_sites ({self.min_sites}) must not exceed quorum ({self.quorum}); raise quorum or lower min_sites"
            )
        closes, wanted = self.schedule.closing or ("schedule", None)
        if self.quorum is not None and wanted is not None and self.quorum > wanted:
            problems.append(f"quorum ({self.quorum}) must not exceed {closes} ({wanted}); lower quorum")
        least = self.algorithm.least_updates
        for field, given in (("quorum", self.quorum), (closes, wanted)):
            if given is not None and given < least:
                problems.append(
                    f"{field} ({given}) must be at least {least}, which algorithm.reduction needs; raise it"
                )
        for field in ("quorum", "required_sites") if self.algorithm.needs_all else ():
            if given := getattr(self, field):
                needs = f"none with algorithm {self.algorithm.kind}, which needs everyone who is asked"
                problems.append(field_error(field, given, needs, "leave it out; name the sites in schedule.sites"))
        problems += self.schedule.objections(self) + self.algorithm.objections(self.training)
        for site in self.overrides:
            try:
                objections = self.algorithm.objections(self.training_at(site))
                problems += [f"overrides.{site}.{why}" for why in objections]
            except ValidationError as error:
                problems.append(f"overrides.{site}.training: {explain(error)}")
        if problems:
            raise PydanticCustomError("contradiction", "{problems}", {"problems": "; ".join(problems)})
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """A form cannot know before whether a model will be needed; `_without_a_model` does, and then says so."""
        found = super().__get_pydantic_json_schema__(schema, handler)
        handler.resolve_ref_schema(found)["required"].remove("model")
        return found

    # -- reading and writing
    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any], context: Mapping[str, Any] | None = None) -> Recipe:
        """A recipe from a YAML or JSON file, or from a mapping. Raises RecipeError naming field, found, expected, fix.

        context: as for `model_validate`: a site's `context` says what the recipe may name there
        """
        return read_model(cls, source, "recipe", context)

    def digest(self) -> str:
        """Digest of everything that a resume may not change."""
        fixed = {k: v for k, v in self.model_dump(mode="json").items() if k not in AMENDABLE}
        return f"blake3:{blake3(canonical_json(fixed)).hexdigest()}"

    # -- running
    def execute(self, env: Runs[R], *, run_id: str | None = None) -> R:
        """Start this recipe in `env` and return a handle on the run at once; `env.execute(recipe)`, the other way round."""
        return env.execute(self, run_id=run_id)

    @property
    def computation(self) -> Algorithm:
        """What the engine runs: the algorithm with its transforms, and the sites' evaluation behind it."""
        algorithm: Algorithm = self.algorithm
        if self.transforms:
            algorithm = Transformed(algorithm=algorithm, transforms=tuple(self.transforms))
        return Validated(algorithm=algorithm) if self.federated_evaluation else algorithm

    @property
    def phases(self) -> tuple[str, ...]:
        """Of each round."""
        return tuple(self.computation.phases)

    @property
    def named_sites(self) -> set[SiteId]:
        """Every site of which it speaks."""
        return {*self.overrides, *self.required_sites, *self.schedule.names, *self.algorithm.names.values()}

    # -- what holds for one site
    def training_at(self, site: SiteId) -> LocalTraining:
        """Local training with `site`'s overrides."""
        if site not in self.overrides:
            return self.training
        return _merged(self.training, self.overrides[site].training)

    def workload_args_at(self, site: SiteId) -> dict[str, JsonValue]:
        """Workload arguments with `site`'s overrides."""
        own = self.overrides[site].workload_args if site in self.overrides else {}
        return {**self.workload.args, **own}

    def server_modules(self) -> list[str]:
        """Modules that model and evaluation come from."""
        refs = [self.model, *([self.evaluation] if self.evaluation else [])]
        return sorted({ref.path.partition(":")[0] for ref in refs if ":" in ref.path})

    @property
    def durations(self) -> Timeouts:
        """All six durations, filled in."""
        return self.timeouts.resolved(self.attempts)


AMENDABLE: frozenset[str] = frozenset(
    {"rounds", "timeouts", "quorum", "min_sites", "required_sites", "wait_for_sites", "attempts", "memory_budget"}
)
"""Fields that a resume may change; every change is written into the run's journal."""


def _merged(training: LocalTraining, changes: Mapping[str, Any]) -> LocalTraining:
    """`training` with `changes`, one level deep; `epochs` and `steps` displace each other."""
    base = training.model_dump()
    if {"epochs", "steps"} & changes.keys():
        base |= {"epochs": None, "steps": None}
    if isinstance(changes.get("optimizer"), Mapping):
        changes = {**changes, "optimizer": {**base["optimizer"], **changes["optimizer"]}}
    return LocalTraining.model_validate({**base, **changes})


# -- federation and site ----------------------------------------------------------------------------------------------
class FederationSite(Described):
    """One site as the coordinator knows it."""

    name: Name
    pool: Name | None = None
    """Its work pool. Default: the site's name."""
    state: str | None = None
    """URL of the site's own state, where fedflow starts the site itself (PocEnv); otherwise the site's configuration has it."""
    key: PublicKey | None = None
    """The site's public key, as `fedflow site enroll` prints it there: only updates that it has signed count. Default: any do."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def work_pool(self) -> str:
        return self.pool or self.name


class Federation(Described):
    """All sites, and where they meet."""

    name: Name = "federation"
    sites: Annotated[list[FederationSite], Field(min_length=1)]
    store: str | None = None
    """URL of the shared object store. Default: given on the command line."""
    store_options: dict[str, JsonValue] = {}
    """Endpoint and the like; credentials belong into the environment."""
    coordinator_pool: Name = "coordinator"
    regions: list[FederationSite] = []
    """Regional aggregators, for `schedule: tree`: each has a work pool and a worker of its own."""
    coordinator_key: PublicKey | None = None
    """The coordinator's public key, as `fedflow enroll` prints it: whoever holds a round must have the other half, and sign. Default:
    no key is asked for."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [site.name for site in self.workplaces]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"sites named twice: {twice}; give each site a name of its own")
        pools = [self.coordinator_pool, *(site.work_pool for site in self.workplaces)]
        if twice := sorted({p for p in pools if pools.count(p) > 1}):
            raise ValueError(f"work pools used twice: {twice}; give each site and the coordinator a pool of its own")
        return self

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any]) -> Federation:
        """A federation from a YAML or JSON file, or from a mapping."""
        return read_model(cls, source, "federation")

    @classmethod
    def of(cls, count: int, *, store: str | None = None) -> Federation:
        """`site-1` … `site-<count>`."""
        return cls(sites=[FederationSite(name=f"site-{i + 1}") for i in range(count)], store=store)

    def joined(self, names: Iterable[SiteId]) -> Federation:
        """This federation with sites of these names too."""
        new = [FederationSite(name=name) for name in names if name not in self.names]
        return self.model_validate({**self.model_dump(), "sites": [*self.sites, *new]})

    def with_regions(self, names: Iterable[str]) -> Federation:
        """This federation with regional aggregators of these names too."""
        known = {workplace.name for workplace in self.workplaces}
        new = [FederationSite(name=name) for name in names if name not in known]
        return self.model_validate({**self.model_dump(), "regions": [*self.regions, *new]})

    @property
    def workplaces(self) -> list[FederationSite]:
        """Sites and regional aggregators: whoever has a work pool and a worker."""
        return [*self.sites, *self.regions]

    @property
    def names(self) -> list[SiteId]:
        return sorted(site.name for site in self.sites)

    @property
    def public_keys(self) -> dict[SiteId, str]:
        """Site, or regional aggregator -> its public key, of those that have one. (Not `keys`: dict(federation), which Prefect asks for, would call it.)"""
        return {workplace.name: workplace.key for workplace in self.workplaces if workplace.key}

    def without_keys(self) -> Federation:
        """The same, in which nobody signs."""
        sites, regions = ([w.model_copy(update={"key": None}) for w in part] for part in (self.sites, self.regions))
        return self.model_copy(update={"sites": sites, "regions": regions, "coordinator_key": None})


class SiteLog(Described):
    """A site's log in a file, each line with the run, the round and the site that it is about."""

    path: str
    """Absolute; its folder is there."""
    format: Literal["text", "json"] = "text"
    """A line of text, or a JSON object a line."""
    size: Annotated[ByteSize, Field(ge=1 << 12)] = ByteSize(10 << 20)
    """A file that has become so large ("10MiB") is renamed to `<path>.1`, that one to `<path>.2`, and so on."""
    keep: Annotated[int, Field(ge=1, strict=True)] = 5
    """How many of those are kept."""

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        return _in_a_folder(path)


class ReviewPolicy(Described):
    """Recipes that need no approval at a site: all that is said here must fit. Arguments of models and workloads are not looked at."""

    algorithms: Annotated[list[str], Field(min_length=1)]
    """Patterns of algorithms' kinds ("fedavg", "scaffold")."""
    models: list[str] = ["*"]
    """Patterns of models' paths ("hospital.models:*")."""
    workloads: list[str] = ["*"]
    """Patterns of workloads' paths or short names."""
    rounds: Annotated[int, Field(ge=1, strict=True)] | None = None
    """At most so many."""

    def objection(self, recipe: Recipe) -> str | None:
        """What of `recipe` does not fit; None if all does."""
        for field, found, patterns in (
            ("algorithm", _kind(recipe), self.algorithms),
            ("model", recipe.model.path, self.models),
            ("workload", recipe.workload.path, self.workloads),
        ):
            if why := _foreign(field, found, patterns):
                return why
        if self.rounds is not None and recipe.rounds > self.rounds:
            return f"rounds: found {recipe.rounds}, expected at most {self.rounds}"
        return None


class Review(Described):
    """Which recipes a site trains."""

    approved: str
    """Absolute path of the file to which `fedflow site review --approve` adds; its folder is there."""
    policy: ReviewPolicy | None = None
    """What is approved without a person. Default: nothing."""

    @field_validator("approved")
    @classmethod
    def _absolute(cls, path: str) -> str:
        return _in_a_folder(path)


def _kind(recipe: Recipe) -> str:
    """Of its algorithm, as a recipe's file names it."""
    return _algorithms.name_of(recipe.algorithm)


def _foreign(field: str, found: str, patterns: Sequence[str]) -> str | None:
    """What is wrong with `found` where it fits none of `patterns`."""
    if any(fnmatchcase(found, pattern) for pattern in patterns):
        return None
    return f"{field}: found {found!r}, expected one of {patterns}"


class SiteLimits(Described):
    """How much a round may take at a site. Of one that takes more nothing is sent, and the coordinator is told why; besides, how many
    there may be at a time."""

    steps: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Optimizer steps of a training."""
    time: Duration | None = None
    """How long a training, or an aggregation, goes on before it is killed ("2h"), where the recipe's train_timeout is longer."""
    memory: Annotated[ByteSize, Field(ge=1 << 20)] | None = None
    """Memory that a trainer may hold, with all that it starts ("8GiB"); one with more is killed. Linux only."""
    gpus: Annotated[int, Field(ge=0, strict=True)] | None = None
    """CUDA devices that trainers see: the first so many of CUDA_VISIBLE_DEVICES, else of the machine's. With 0, a recipe that asks for
    `cuda` is refused."""
    at_once: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Trainings and aggregations that run at the same time, of whatever runs; others wait their turn. Default: as many as are asked for."""

    def check_steps(self, steps: int) -> None:
        """Raises RecipeRefused where a training takes, or will take, more of them."""
        if self.steps is not None and steps > self.steps:
            raise RecipeRefused(
                f"steps: found {steps}, expected at most {self.steps}, this site's limits.steps; lower training.steps or "
                "training.epochs, or ask the site's owner"
            )


def _in_a_folder(path: str) -> str:
    if not Path(path).is_absolute() or not Path(path).parent.is_dir():
        raise ValueError(f"found {path!r}, expected an absolute path in a folder that is there; make the folder")
    return path


class TLS(Described):
    """Absolute paths of PEM files for connections between sites, in which each shows the other that it is one of the federation's."""

    authority: str
    """The certificate of who signs for the sites, and for nobody else: whoever has a certificate of it is let in."""
    certificate: str
    """This site's. Where the others come to it, with the name by which they do (`tracker.host`)."""
    private_key: str
    """The certificate's, without a passphrase; not for everybody to read."""

    @field_validator("authority", "certificate", "private_key")
    @classmethod
    def _absolute(cls, path: str) -> str:
        if not Path(path).is_absolute():
            raise ValueError(f"found {path!r}, expected an absolute path; write {str(Path(path).absolute())!r}")
        return path


class SiteConfig(Described):
    """A site's own configuration: what its owner decides. Nothing in it can be set from outside."""

    name: Name
    store: str
    """URL of the shared object store."""
    store_options: dict[str, JsonValue] = {}
    state: str
    """URL of this site's own state; it never leaves the site."""
    pool: Name | None = None
    """Work pool. Default: the site's name."""
    allowed_imports: list[str] = []
    """Patterns of modules whose classes and functions a recipe may name, and give any arguments ("mypackage.*"; "*": of all that is
    installed here, which is as much as letting it run any program). Default: none. What `workloads` and `tasks` name, and fedflow's
    own algorithms, need no permission."""
    workloads: dict[str, str] = {}
    """Short names for workloads: name -> import path."""
    tasks: dict[str, str] = {}
    """Short names for functions that a task may call here: name -> import path."""
    tls: TLS | None = None
    """Certificates for where sites that train together meet (XGBoost's histograms). Default: nothing is encrypted there."""
    statistics: StatisticsPolicy | None = None
    """What may be known of the tables here. Default: what the workload says, else NVFlare's."""
    workload_args: dict[str, JsonValue] = {}
    """Arguments of every workload here, over what the recipe says: paths of the data, for instance."""
    data: list[str] = []
    """Files and folders that workloads read here: the worker does not start where it cannot read them."""
    python_path: list[str] = []
    """Folders added to the import path."""
    preload: list[str] = []
    """Modules that the worker imports once, before it forks a trainer: what workloads import slowly, or data that a module
    loads, which all trainers then share."""
    start: Literal["fork", "spawn"] = "fork"
    """How a trainer starts: forked from a process that has imported everything, or, where a workload cannot be forked, as
    a fresh one, which takes seconds."""
    algorithms: Annotated[list[str], Field(min_length=1)] | None = None
    """Patterns of algorithms' kinds ("fedavg", "hospital.*") that this site takes part in. Default: any."""
    limits: SiteLimits = SiteLimits()
    """How much a round may take here. Default: as much as its recipe says."""
    log: SiteLog | None = None
    """A file that this site's log goes to, besides standard error and the UI."""
    flow: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """The flow that this site runs, "module:function", in place of fedflow's `fedflow.flows.site:local_training`: a copy of it that
    its owner has changed, found on the python_path."""
    api_url: str | None = None
    """URL of the Prefect API. Default: the environment's."""
    key: str | None = None
    """Absolute path of this site's private key, which `fedflow site enroll` makes: updates are signed with it. Default: they are not."""
    coordinator_key: PublicKey | None = None
    """The coordinator's public key: this site trains only for rounds that the coordinator has signed. Default: for any."""

    review: Review | None = None
    """Which recipes are trained here. Default: any that `allowed_imports` lets in."""
    audit: str | None = None
    """Absolute path of a file that gets a line, a JSON object, before anything is sent from here into the store. Default: none."""

    @field_validator("audit")
    @classmethod
    def _placed(cls, path: str | None) -> str | None:
        return None if path is None else _in_a_folder(path)

    @field_validator("key")
    @classmethod
    def _absolute_key(cls, key: str | None) -> str | None:
        if key is not None and not Path(key).is_absolute():
            raise ValueError(f"found {key!r}, expected an absolute path; write {str(Path(key).absolute())!r}")
        return key

    @field_validator("state")
    @classmethod
    def _absolute(cls, state: str) -> str:
        """Found again from whatever folder the worker is started in."""
        if "://" not in state and not Path(state).is_absolute():
            raise ValueError(
                f"found {state!r}, expected a URL or an absolute path; write {str(Path(state).absolute())!r}"
            )
        return state

    environment_variable: ClassVar[str] = "FEDFLOW_SITE_CONFIG"
    """Where a worker's child finds the path of this file."""

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any]) -> SiteConfig:
        """A site's configuration from a YAML or JSON file, or from a mapping."""
        return read_model(cls, source, "site")

    @classmethod
    def here(cls) -> SiteConfig:
        """The configuration of the site that this process works for, in force from now on."""
        path = os.environ.get(cls.environment_variable)
        if not path:
            fix = "start the worker with `fedflow site start --config FILE`"
            raise RecipeError(field_error(cls.environment_variable, None, "the path of the site's configuration", fix))
        return cls.load(path).in_force()

    def in_force(self) -> Self:
        """This configuration; from now on this process imports from its python_path, and sees no more devices than its limits allow."""
        sys.path[:0] = [p for p in self.python_path if p not in sys.path]
        if (most := self.limits.gpus) is not None:
            there = os.environ.get(DEVICES)
            devices = there.split(",") if there is not None else map(str, range(most))
            os.environ[DEVICES] = ",".join([*devices][:most])
        return self

    def objection(self, recipe: Recipe) -> str | None:
        """What of `recipe` this site does not do, whoever approves of it; None if it does all."""
        if self.algorithms and (why := _foreign("algorithm", _kind(recipe), self.algorithms)):
            return why
        if self.limits.gpus == 0 and recipe.numerics.device == "cuda":
            return "numerics.device: found 'cuda', expected 'cpu', this site's limits.gpus being 0"
        return None

    @property
    def context(self) -> dict[str, Any]:
        """For `Recipe.model_validate`: what a recipe may name here."""
        return {"allowed_imports": self.allowed_imports}

    @property
    def work_pool(self) -> str:
        return self.pool or self.name


DEVICES = "CUDA_VISIBLE_DEVICES"
"""What CUDA reads once, when it is first used in a process: the devices that there are for it."""


# -- reading -----------------------------------------------------------------------------------------------------------
M = TypeVar("M", bound=BaseModel)


def read_model(
    cls: type[M], source: str | Path | Mapping[str, Any], what: str, context: Mapping[str, Any] | None = None
) -> M:
    """`cls` from a YAML or JSON file or a mapping. Raises RecipeError in one line, never a traceback.

    context: as for `Recipe.model_validate`
    """
    import yaml

    if isinstance(source, Mapping):
        data: Any = source
    else:
        path = Path(source)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(
                field_error(what, str(path), "a readable file", f"check the path: {error.strerror}")
            ) from error
        try:
            data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError(
                f"{path}: not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {' '.join(str(error).split())}"
            ) from error
        what = str(path)
    if not isinstance(data, Mapping):
        raise RecipeError(field_error(what, data, "a mapping of fields", "see `fedflow init` for an example"))
    try:
        return cls.model_validate(data, context=dict(context or {}))
    except ValidationError as error:
        raise RecipeError(f"{what}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """A validation error as one line: every field with what was found and what is expected."""
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "the whole"
        message = item["msg"].removeprefix("Value error, ").replace("datetime.timedelta(0)", "0")
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown field; remove it or correct its name")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing; give it a value")
        elif item["type"] in ("contradiction", "resolve", "kind", "value_error"):
            lines.append(message if where == "the whole" else f"{where}: {message}")
        else:
            lines.append(f"{where}: found {_short(item['input'])}, {message[0].lower()}{message[1:]}")
    return "; ".join(lines)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@cache
def recipe_schema() -> dict[str, Any]:
    """The recipe's JSON schema, for documentation and forms."""
    return TypeAdapter(Recipe).json_schema()
