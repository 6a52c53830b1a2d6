"""A sweep: a recipe over a grid of values and seeds, each combination a run of its own. Called again it goes on.

from fedflow.environments import SimEnv
from fedflow.sweep import Sweep

sweep = Sweep(recipe, {"algorithm.mu": [0.0, 0.01, 0.1]}, seeds=[0, 1, 2])
with SimEnv(100) as env:
    result = sweep.execute(env)
result.write(Path("mu.csv"))
result.plot(Path("mu.png"))
"""

from __future__ import annotations

import itertools
import json
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from blake3 import blake3

from fedflow.engine import start_run
from fedflow.engine.metrics import write_table
from fedflow.engine.summary import RunSummary, Status
from fedflow.environments.base import Ended, Environment, Run
from fedflow.errors import ObjectMissing, RecipeError, RunExists, RunMissing, UserError, field_error
from fedflow.plot import plot_runs, short_names
from fedflow.recipe import NAME, Recipe
from fedflow.registry import resolve
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.types import SiteId, canonical_json

__all__ = ["Row", "Sweep", "SweepResult", "Trial"]

_LONGEST = 63  # characters of a run's name


@dataclass(frozen=True)
class Trial:
    """One run of a sweep. values: field -> value, as the recipe has it after validation."""

    run: str
    values: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Row:
    """What became of a trial. summary: None where nothing of it is in the store."""

    trial: Trial
    status: Status
    summary: RunSummary | None

    def as_dict(self) -> dict[str, Any]:
        """Column -> value. final, best: the key metric of the last and of the best round; seconds: of its rounds."""
        summary, key = self.summary, self.trial.recipe.key_metric.name
        rounds = summary.rounds if summary else []
        best = rounds[summary.best] if summary and summary.best is not None else None
        values = {
            name: value if isinstance(value, int | float | str | None) else json.dumps(value)
            for name, value in self.trial.values.items()
        }
        return {
            "run": self.trial.run,
            **values,
            "seed": self.trial.recipe.seed,
            "status": self.status,
            "rounds": len(rounds),
            "key_metric": key,
            "final": rounds[-1].shown.get(key) if rounds else None,
            "best": best.shown.get(key) if best else None,
            "best_round": best.round if best else None,
            "seconds": sum(round.seconds for round in rounds),
            "model_digest": summary.model_digest if summary else None,
        }


@dataclass(frozen=True)
class SweepResult:
    """Every trial of a sweep, in its order, and what became of it."""

    name: str
    rows: list[Row]

    @property
    def unfinished(self) -> list[Row]:
        """The trials that did not train as asked."""
        return [row for row in self.rows if row.status != "finished"]

    def table(self) -> list[dict[str, Any]]:
        """A row a trial: fields, seed, status, final and best key metric."""
        return [row.as_dict() for row in self.rows]

    def write(self, out: Path) -> Path:
        """The table as a .csv or a .parquet; returns `out`."""
        table = self.table()
        return write_table(list(table[0]), [list(row.values()) for row in table], out)

    def plot(self, out: Path) -> Path:
        """Every trial that has a committed round as a picture (see `plot_runs`); returns `out`."""
        return plot_runs([row.summary for row in self.rows if row.summary and row.summary.rounds], out)


@dataclass(frozen=True)
class Sweep:
    """A grid over `recipe`: every combination of values, with every seed.

    fields: dotted field of the recipe -> its values: "algorithm.mu", "training.optimizer.lr", "transforms.0.bits", "algorithm"
    seeds:  default: the recipe's
    name:   what the runs' names begin with; default: the recipe's
    A run's name follows from `name`, values and seed alone: whoever executes the same sweep again, or a larger one, finds the
    runs that are finished and goes on with the others.
    Raises RecipeError, naming field, value and what was expected, for anything that is no recipe.
    """

    recipe: Recipe
    fields: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.recipe.name)
        if not re.fullmatch(NAME, self.name):
            raise UserError(field_error("--name", self.name, f"a name that matches {NAME}", "choose such a name"))
        if not self.fields and not self.seeds:
            raise RecipeError(
                field_error("sweep", "an empty grid", "fields with values, or seeds", "give --set or --seeds")
            )
        for path, values in self._axes.items():
            _check_axis(path, values)
        for path in self.fields:
            if path.partition(".")[0] == "name":
                fix = "use --name for the sweep's"
                raise RecipeError(field_error(path, "a field of the sweep", "a field that changes the training", fix))
        if "seed" in self.fields and self.seeds:
            raise RecipeError(field_error("seed", "values and seeds", "one of the two", "leave one out"))
        _ = self.trials

    @cached_property
    def _axes(self) -> dict[str, Sequence[Any]]:
        return {**self.fields, **({"seed": self.seeds} if self.seeds else {})}

    @cached_property
    def trials(self) -> list[Trial]:
        """Every run, the seeds of a combination one after the other."""
        names = short_names(list(self.fields))
        found: dict[bytes, tuple[dict[str, Any], Trial]] = {}
        for chosen in itertools.product(*self._axes.values()):
            given = dict(zip(self._axes, chosen, strict=True))
            recipe = _changed(self.recipe, given)
            dumped = recipe.model_dump(mode="json")
            values = {path: _at(dumped, path, given[path]) for path in self.fields if path != "seed"}
            trial = Trial(_run_name(self.name, names, values, recipe.seed), values, recipe)
            same, _ = found.setdefault(canonical_json(dumped), (given, trial))
            if same is not given:
                raise _twice(same, given)
        return [trial for _, trial in found.values()]

    # -- running
    def check(self, env: Any) -> None:
        """Raises UserError where a trial could not start in `env`: before any of them is trained.

        Models are built, and runs of the same names are looked at; what is at the sites is their matter.
        """
        built: set[bytes] = set()
        sites: list[SiteId] = env.federation.names
        for trial in self.trials:
            begun = _begun(Journal(env.store, trial.run), trial)
            recipe = canonical_json(trial.recipe.model_copy(update={"seed": 0}).model_dump(mode="json"))
            if not begun and recipe not in built:
                built.add(recipe)
                try:
                    _check_code(trial.recipe, env.kind)
                    _check_start(trial.recipe, sites)
                except UserError as error:
                    raise type(error)(f"{trial.run}: {error}") from error

    def execute(
        self,
        env: Environment,
        *,
        parallel: int = 1,
        on_tick: Callable[[Sequence[Run], Sequence[Row]], None] = lambda active, done: None,
        every: float = 0.2,
    ) -> SweepResult:
        """Run every trial that is not finished, `parallel` of them at a time, and return what became of all.

        on_tick: called every `every` seconds with the runs that are going on and the trials that are done
        A trial that fails stops none of the others. Whatever interrupts this call, a KeyboardInterrupt say, aborts the runs that
        are going on; after a kill they go on by themselves, and the next call waits for them.
        """
        if parallel < 1:
            raise UserError(field_error("parallel", parallel, "a count of at least 1", "leave it out for 1"))
        self.check(env)
        waiting, active, done = list(self.trials), dict[str, Run](), dict[str, Row]()
        by_name = {trial.run: trial for trial in self.trials}
        try:
            while waiting or active:
                while waiting and len(active) < parallel:
                    trial = waiting.pop(0)
                    if (row := _complete(env, trial)) is not None:
                        done[trial.run] = row
                    else:
                        active[trial.run] = env.execute(trial.recipe, run_id=trial.run)
                on_tick(list(active.values()), list(done.values()))
                for name in [name for name, run in active.items() if run.status() != "running"]:
                    done[name] = _row(by_name[name], active.pop(name))
                if active:
                    time.sleep(every)
            on_tick([], list(done.values()))
        except BaseException:
            for run in active.values():
                with suppress(Exception):  # what stopped us is told, not what follows from it
                    run.abort()
            raise
        return SweepResult(self.name, [done[trial.run] for trial in self.trials])

    def result(self, env: Any) -> SweepResult:
        """How every trial stands, without starting any."""
        rows = [_row(trial, Run(trial.run, env.store, Ended())) for trial in self.trials]
        return SweepResult(self.name, rows)


def _check_code(recipe: Recipe, env: str) -> None:
    """Raises ResolveError where the code of workload or evaluation, on this machine unless in prod, is not found."""
    if env != "prod":
        resolve("workloads", recipe.workload.path, field="workload")
        if recipe.evaluation is not None:
            resolve("workloads", recipe.evaluation.path, field="evaluation")


def _check_start(recipe: Recipe, sites: list[SiteId]) -> None:
    """Start a run of it in memory, of which nothing stays. Raises UserError."""
    store = ObjectStore(f"memory://fedflow-sweep-{uuid.uuid4().hex}")
    try:
        start_run(store, "check", recipe, sites)
    finally:
        for key in store.list():
            store.delete(key)


def _row(trial: Trial, run: Run) -> Row:
    try:
        summary = run.summary()
    except (RunMissing, ObjectMissing):
        return Row(trial, "interrupted", None)
    return Row(trial, summary.status, summary)


def _complete(env: Any, trial: Trial) -> Row | None:
    """The row of a trial that is finished as it is asked for now."""
    run = Run(trial.run, env.store, Ended())
    if not run.is_complete() or run.journal.recipe() != trial.recipe:
        return None
    return _row(trial, run)


def _begun(journal: Journal, trial: Trial) -> bool:
    """Whether the trial's run is there. Raises RunExists where it is another's, UserError where it has more rounds."""
    try:
        known = journal.recipe()
    except RunMissing:
        return False
    if known.digest() != trial.recipe.digest():
        raise RunExists(
            field_error(
                "--name", trial.run, "runs of this sweep's recipe", "choose another --name: the recipe has changed"
            )
        )
    done = len(journal.rounds(known.phases[-1]))
    if trial.recipe.rounds < done:
        expected = f"at least the {done} that {trial.run} has committed"
        raise RecipeError(field_error("rounds", trial.recipe.rounds, expected, "raise it"))
    return True


# -- the grid ----------------------------------------------------------------------------------------------------------
def _check_axis(path: str, values: Sequence[Any]) -> None:
    if not values:
        raise RecipeError(field_error(path, "no value", "at least one", f"give it as {path}=VALUE,…"))
    known = [canonical_json(value) for value in values]
    if twice := [value for at, value in enumerate(values) if canonical_json(value) in known[:at]]:
        raise RecipeError(field_error(path, twice[0], "each value once", "leave it out"))


def _twice(one: Mapping[str, Any], other: Mapping[str, Any]) -> RecipeError:
    """Values that are written differently and mean the same."""
    path = next(path for path in one if one[path] != other[path] or type(one[path]) is not type(other[path]))
    return RecipeError(
        field_error(path, [one[path], other[path]], "values that give different recipes", "leave one of them out")
    )


def _changed(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """`recipe` with these fields; whole ones before what is in them."""
    fields, whole = _given(recipe), {path: value for path, value in given.items() if "." not in path}
    with suppress(RecipeError):  # if it is wrong, it is told below
        recipe = Recipe.load({**fields, **whole})
    defaults = recipe.model_dump(mode="json")
    for path in sorted(given, key=lambda path: path.count(".")):
        _put(fields, path, given[path], defaults)
    try:
        return Recipe.load(fields)
    except RecipeError as error:
        said = ", ".join(
            f"{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in given.items()
        )
        raise RecipeError(f"{error.reason.removeprefix('recipe: ')}; correct the values of {said}") from error


def _given(recipe: Recipe) -> dict[str, Any]:
    """The fields that the recipe's author wrote: others may not fit another algorithm."""
    fields = recipe.model_dump(mode="json", exclude_unset=True)
    for name in ("algorithm", "schedule"):
        if name in fields:
            own = getattr(recipe, name).model_dump(mode="json", exclude_unset=True)
            fields[name] = {**own, "kind": fields[name]["kind"]}
    return fields


def _put(fields: dict[str, Any], path: str, value: Any, defaults: Any) -> None:
    """Set the field at that dotted path; what leads to it is made where it is not there, of the kind that it has by default."""
    place: Any = fields
    *parents, last = path.split(".")
    for name in parents:
        inner = _step(place, name, path)
        defaults = defaults.get(name) if isinstance(defaults, dict) else None
        if inner is None:
            inner = {"kind": defaults["kind"]} if isinstance(defaults, dict) and "kind" in defaults else {}
        elif isinstance(inner, str):
            inner = {"path" if name in ("model", "workload", "evaluation") else "kind": inner}
        place[_key(place, name)] = place = inner
    _step(place, last, path)
    place[_key(place, last)] = value


def _step(place: Any, name: str, path: str) -> Any:
    """What is at `name`; None where there is nothing yet."""
    if isinstance(place, list) and name.isdigit() and int(name) < len(place):
        return place[int(name)]
    if isinstance(place, dict) and name:
        return place.get(name)
    found = f"a list of {len(place)}" if isinstance(place, list) else repr(place)
    raise RecipeError(
        field_error(path, path, f"a field of the recipe, but {name!r} is looked for in {found}", "correct it")
    )


def _key(place: Any, name: str) -> Any:
    return int(name) if isinstance(place, list) else name


def _at(dumped: Any, path: str, default: Any) -> Any:
    """The validated value at that path; `default`, as it was given, where that says more than any reader wants to know."""
    for name in path.split("."):
        try:
            dumped = dumped[int(name)] if isinstance(dumped, list) else dumped[name]
        except (KeyError, IndexError, TypeError, ValueError):
            return default
    return default if isinstance(dumped, dict) else dumped


# -- names -------------------------------------------------------------------------------------------------------------
def _run_name(sweep: str, names: Mapping[str, str], values: Mapping[str, Any], seed: int) -> str:
    """ "digits-mu-0.01-seed-2"; with a digest where that would be too long, or say too little."""
    parts = [sweep, *(f"{names[path]}-{_text(value)}" for path, value in values.items()), f"seed-{seed}"]
    whole = "-".join(parts)
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", whole)
    if plain == whole and len(plain) <= _LONGEST:
        return plain
    digest = blake3(canonical_json({**values, "seed": seed})).hexdigest()[:8]
    return f"{plain[: _LONGEST - 9].rstrip('-')}-{digest}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
