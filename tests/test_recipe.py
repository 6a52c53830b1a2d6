"""The recipe: one value from Python, YAML and JSON, and one clear line for every mistake."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedflow.algorithms import FedAvg
from fedflow.errors import RecipeError
from fedflow.local.optimizers import make_optimizer
from fedflow.recipe import (
    AMENDABLE,
    EarlyStop,
    Federation,
    ImportRef,
    LocalTraining,
    Numerics,
    Optimizer,
    Recipe,
    SiteConfig,
    SiteOverrides,
    Timeouts,
    recipe_schema,
)
from fedflow.schedules import Sampled
from tests.builders import Leaning

MINIMAL: Mapping[str, Any] = {"name": "r", "model": "m:Model", "workload": "m:Work", "rounds": 3}

FULL = Recipe(
    name="full",
    model=ImportRef(path="m:Model", args={"width": 3}),
    workload=ImportRef(path="m:Work"),
    rounds=10,
    algorithm=FedAvg(server_learning_rate=0.5, aggregation_weights={"a": 2.0}),
    schedule=Sampled(sites_per_round=4, over_selection=1.5),
    training=LocalTraining(steps=20, batch_size=8, optimizer=Optimizer(lr=0.1, momentum=0.9)),
    overrides={"a": SiteOverrides(training={"steps": 5}, workload_args={"path": "/data"})},
    checkpoint="model.safetensors",
    seed=7,
    numerics=Numerics(threads=2),
    quorum=3,
    min_sites=2,
    required_sites=["a"],
    late="carry",
    attempts=2,
    timeouts=Timeouts(round_deadline=timedelta(minutes=30), quorum_grace=timedelta(0)),
    evaluation=ImportRef(path="m:HeldOut"),
    early_stop=EarlyStop(patience=3),
)


def wrong(fields: Mapping[str, Any]) -> str:
    """The one line that a user sees."""
    with pytest.raises(RecipeError) as caught:
        Recipe.load({**MINIMAL, **fields})
    text = str(caught.value)
    assert "\n" not in text
    return text


# -- one value ---------------------------------------------------------------------------------------------------------
def test_python_yaml_and_json_are_the_same(tmp_path: Path) -> None:
    fields = FULL.model_dump(mode="json")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(fields))
    (tmp_path / "r.json").write_text(json.dumps(fields))
    for source in (tmp_path / "r.yaml", str(tmp_path / "r.json"), fields):
        assert Recipe.load(source) == FULL
        assert Recipe.load(source).digest() == FULL.digest()


def test_what_people_write_is_what_python_says() -> None:
    found = Recipe.load(
        yaml.safe_load(
            """
            name: full
            model: {path: "m:Model", args: {width: 3}}
            workload: m:Work
            rounds: 10
            algorithm: {kind: fedavg, server_learning_rate: 0.5, aggregation_weights: {a: 2}}
            schedule: {kind: sampled, sites_per_round: 4, over_selection: 1.5}
            training: {steps: 20, batch_size: 8, optimizer: {lr: 1e-1, momentum: 0.9}}
            overrides: {a: {training: {steps: 5}, workload_args: {path: /data}}}
            checkpoint: model.safetensors
            seed: 7
            numerics: {threads: 2}
            quorum: 3
            min_sites: 2
            required_sites: [a]
            late: carry
            attempts: 2
            timeouts: {round_deadline: 30m, quorum_grace: 0s}
            evaluation: m:HeldOut
            early_stop: {patience: 3}
            """
        )
    )
    assert found == FULL


def test_a_kind_alone_is_an_algorithm_with_its_defaults() -> None:
    found = Recipe.load({**MINIMAL, "algorithm": "fedavg", "schedule": "everyone"})
    assert found == Recipe.load(MINIMAL)
    assert found.algorithm == FedAvg(server_learning_rate=1.0, weight_by="examples", transfer="full")


def test_somebody_elses_algorithm_comes_back_by_its_import_path() -> None:
    recipe = Recipe.load({**MINIMAL, "algorithm": Leaning(weight_by="steps")})
    dumped = recipe.model_dump(mode="json")
    assert dumped["algorithm"]["kind"] == "tests.builders:Leaning"
    assert Recipe.load(dumped).algorithm == Leaning(weight_by="steps")


@settings(max_examples=50)
@given(st.timedeltas(min_value=timedelta(milliseconds=1), max_value=timedelta(days=100)))
def test_durations_survive_json_to_the_microsecond(duration: timedelta) -> None:
    timeouts = Timeouts(round_deadline=duration)
    assert Timeouts.model_validate_json(timeouts.model_dump_json()) == timeouts


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("90s", timedelta(seconds=90)),
        ("1h30m", timedelta(minutes=90)),
        (" 2 h ", timedelta(hours=2)),
        ("500ms", timedelta(milliseconds=500)),
        ("1.5d", timedelta(days=1.5)),
        (45, timedelta(seconds=45)),
        (0.25, timedelta(milliseconds=250)),
        ("PT2M", timedelta(minutes=2)),
        ("00:01:30", timedelta(seconds=90)),
    ],
)
def test_durations_are_read_as_people_write_them(written: Any, meant: timedelta) -> None:
    assert Timeouts(round_deadline=written).round_deadline == meant


def test_the_digest_is_of_what_a_resume_may_not_change() -> None:
    may = {"rounds": 11, "quorum": 4, "min_sites": 3, "required_sites": [], "attempts": 1, "wait_for_sites": "1m"}
    may |= {"timeouts": {"round_deadline": "3h"}, "memory_budget": "1GiB"}
    assert may.keys() == AMENDABLE
    for field, value in may.items():
        assert Recipe.load({**FULL.model_dump(), field: value}).digest() == FULL.digest(), field
    must_not = {"seed": 8, "late": "drop", "model": "m:Other", "algorithm": "fedavg", "numerics": {"threads": 1}}
    for field, value in must_not.items():
        assert Recipe.load({**FULL.model_dump(), field: value}).digest() != FULL.digest(), field


# -- per site ----------------------------------------------------------------------------------------------------------
def test_a_sites_overrides_are_merged_over_the_recipe() -> None:
    recipe = Recipe.load(
        {
            **MINIMAL,
            "workload": {"path": "m:Work", "args": {"path": "/all", "size": 1}},
            "training": {"epochs": 2, "optimizer": {"lr": 0.1, "momentum": 0.9}},
            "overrides": {
                "a": {"training": {"optimizer": {"lr": 0.2}}, "workload_args": {"path": "/a"}},
                "b": {"training": {"steps": 4}},
            },
        }
    )
    a, b, c = (recipe.training_at(site) for site in "abc")
    assert (a.epochs, a.optimizer.lr, a.optimizer.momentum) == (2, 0.2, 0.9)
    assert (b.epochs, b.steps, b.optimizer) == (None, 4, c.optimizer)
    assert c == recipe.training
    assert recipe.workload_args_at("a") == {"path": "/a", "size": 1}
    assert recipe.workload_args_at("c") == {"path": "/all", "size": 1}


# -- mistakes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"round": 3}, ["round: unknown field", "remove it or correct its name"]),
        ({"training": {"learning_rate": 1}}, ["training.learning_rate: unknown field"]),
        ({"rounds": 0}, ["rounds: found 0", "greater than or equal to 1"]),
        ({"rounds": 2.5}, ["rounds: found 2.5", "integer"]),
        ({"rounds": "3"}, ["rounds: found '3'", "integer"]),
        ({"rounds": True}, ["rounds: found True", "integer"]),
        ({"seed": -1}, ["seed: found -1", "greater than or equal to 0"]),
        ({"seed": 2**53}, ["seed: found", "less than"]),
        ({"name": "a/b"}, ["name: found 'a/b'"]),
        ({"name": "../up"}, ["name: found '../up'"]),
        ({"model": None}, ["model: found None"]),
        ({"model": {"path": ""}}, ["model.path: found ''"]),
        ({"late": "wait"}, ["late: found 'wait'", "'drop' or 'carry'"]),
        ({"algorithm": {"server_learning_rate": 1}}, ["algorithm", "'kind'", "fedavg"]),
        ({"algorithm": {"kind": "fedavgg"}}, ["algorithm", "found 'fedavgg'", "fedavg", "correct the name"]),
        ({"algorithm": {"kind": "no.such:Thing"}}, ["algorithm", "no.such:Thing", "install the package"]),
        ({"algorithm": {"kind": "fedflow.schedules:Everyone"}}, ["algorithm", "a subclass of Algorithm"]),
        ({"algorithm": {"kind": "fedavg", "eta": 1}}, ["algorithm.eta: unknown field"]),
        ({"algorithm": {"kind": "fedavg", "server_learning_rate": -1}}, ["algorithm.server_learning_rate: found -1"]),
        ({"schedule": {"kind": "sampled"}}, ["schedule", "exactly one of sites_per_round and fraction"]),
        ({"schedule": ["a"]}, ["schedule", "'kind'"]),
        ({"training": {"epochs": 1, "steps": 2}}, ["training: give epochs or steps, not both"]),
        ({"training": {"steps": 1.0}}, ["training.steps: found 1.0"]),
        ({"training": {"optimizer": {"kind": "adam", "momentum": 0.9}}}, ["momentum", "SGD", "adam"]),
        ({"training": {"optimizer": {"nesterov": True}}}, ["nesterov needs momentum"]),
        ({"training": {"optimizer": {"lr": "fast"}}}, ["training.optimizer.lr: found 'fast'"]),
        ({"training": {"clip_norm": 0}}, ["training.clip_norm: found 0"]),
        ({"overrides": {"a": {"training": {"step": 1}}}}, ["overrides.a.training: step: unknown field"]),
        ({"overrides": {"a": {"training": {"steps": 0}}}}, ["overrides.a.training: steps: found 0"]),
        ({"quorum": 0}, ["quorum: found 0"]),
        ({"quorum": 2, "min_sites": 3}, ["min_sites (3)", "quorum (2)", "raise quorum or lower min_sites"]),
        (
            {"quorum": 5, "schedule": {"kind": "sampled", "sites_per_round": 4}},
            ["quorum (5)", "schedule.sites_per_round (4)", "lower quorum"],
        ),
        ({"attempts": 0}, ["attempts: found 0"]),
        ({"numerics": {"device": "tpu"}}, ["numerics.device: found 'tpu'", "'cpu'"]),
        ({"timeouts": {"round_deadline": "10min"}}, ["timeouts.round_deadline: found '10min'", '"10m"']),
        ({"timeouts": {"round_deadline": 0}}, ["timeouts.round_deadline: found 0", "greater than 0"]),
        ({"timeouts": {"round_deadline": True}}, ["timeouts.round_deadline", "90s"]),
        ({"timeouts": {"train": "1m"}}, ["timeouts.train: unknown field"]),
        ({"early_stop": {"patience": 0}}, ["early_stop.patience: found 0"]),
    ],
    ids=str,
)
def test_a_mistake_names_the_field_what_was_found_and_what_is_expected(fields: dict[str, Any], told: list[str]) -> None:
    text = wrong(fields)
    assert all(part in text for part in told), text


def test_every_mistake_is_told_at_once() -> None:
    text = wrong({"rounds": 0, "late": "wait", "colour": 1})
    assert all(f"{field}: " in text for field in ("rounds", "late", "colour")), text


def test_what_is_missing_is_named() -> None:
    with pytest.raises(RecipeError, match=r"model: missing; give it a value; workload: missing.*; rounds: missing"):
        Recipe.load({"name": "r"})


@pytest.mark.parametrize(
    ("timeouts", "attempts", "told"),
    [
        (
            {"train_timeout": "1m", "transfer_timeout": "2m"},
            1,
            ["transfer_timeout (0:02:00)", "train_timeout (0:01:00)"],
        ),
        ({"train_timeout": "3h"}, 1, ["train_timeout (3:00:00)", "round_deadline (2:00:00)"]),
        ({"quorum_grace": "2h"}, 1, ["quorum_grace (2:00:00)", "round_deadline (2:00:00)"]),
        ({"heartbeat": "3h"}, 1, ["heartbeat (3:00:00)", "round_deadline (2:00:00)"]),
        ({"run_timeout": "1h"}, 1, ["round_deadline (2:00:00)", "run_timeout (1:00:00)"]),
        (
            {"train_timeout": "1h"},
            3,
            ["train_timeout (1:00:00)", "attempts (3)", "3:03:00", "round_deadline (2:00:00)"],
        ),
    ],
    ids=str,
)
def test_timeouts_that_contradict_each_other_are_both_named_with_the_fix(
    timeouts: dict[str, str], attempts: int, told: list[str]
) -> None:
    text = wrong({"timeouts": timeouts, "attempts": attempts})
    assert all(part in text for part in told), text
    assert "raise" in text and "lower" in text


@settings(max_examples=100)
@given(st.timedeltas(min_value=timedelta(seconds=1), max_value=timedelta(days=30)), st.integers(1, 20))
def test_a_deadline_alone_gives_timeouts_that_fit_each_other(deadline: timedelta, attempts: int) -> None:
    recipe = Recipe.load({**MINIMAL, "attempts": attempts, "timeouts": {"round_deadline": deadline}})
    t = recipe.durations
    assert t.train_timeout and t.transfer_timeout and t.heartbeat and t.quorum_grace is not None
    assert t.transfer_timeout < t.train_timeout < deadline / attempts
    assert max(t.quorum_grace, t.heartbeat) <= deadline / 10


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.yaml", None, ["none.yaml", "readable file", "No such file"]),
        ("bad.yaml", "name: [", ["bad.yaml: not valid YAML"]),
        ("bad.json", "{'name': 1}", ["bad.json: not valid JSON"]),
        ("list.yaml", "- name", ["list.yaml", "a mapping of fields"]),
        ("empty.yaml", "", ["empty.yaml", "found None"]),
        ("field.yaml", "nam: r", ["field.yaml: ", "nam: unknown field", "name: missing"]),
    ],
)
def test_a_file_that_is_no_recipe_is_told_in_one_line(
    tmp_path: Path, name: str, content: str | None, told: list[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(tmp_path / name)
    assert all(part in str(caught.value) for part in told) and "\n" not in str(caught.value)


# -- the form ----------------------------------------------------------------------------------------------------------
def test_the_form_tells_algorithms_and_schedules_apart_by_a_required_kind_of_one_value() -> None:
    properties = recipe_schema()["properties"]
    for field, kinds in (
        ("algorithm", {"fedavg", "fedopt", "scaffold", "diloco"}),
        ("schedule", {"everyone", "sampled"}),
    ):
        *forms, other = properties[field]["oneOf"]
        assert kinds <= {form["properties"]["kind"]["enum"][0] for form in forms}
        assert kinds <= set(other["properties"]["kind"]["not"]["enum"])  # whatever is not known here is let through
        assert all(len(f["properties"]["kind"]["enum"]) == 1 and "kind" in f["required"] for f in forms)


@pytest.mark.parametrize("field", ["algorithm", "schedule"])
def test_the_form_shows_a_value_as_of_its_own_kind(field: str) -> None:
    """Prefect's form takes the first kind that has most of the value's fields."""
    forms = [form["properties"] for form in recipe_schema()["properties"][field]["oneOf"]]
    for own in forms:
        assert max(forms, key=lambda form: len(form.keys() & own.keys()))["kind"] == own["kind"] or own is forms[-1]


def test_a_choice_within_an_algorithm_is_told_apart_in_the_same_way() -> None:
    forms = recipe_schema()["properties"]["algorithm"]["oneOf"]
    (fedopt,) = [f for f in forms if f["properties"]["kind"].get("enum") == ["fedopt"]]
    choices = fedopt["properties"]["server_optimizer"]["oneOf"]
    assert [c["properties"]["kind"]["enum"] for c in choices] == [["sgd"], ["adagrad"], ["adam"], ["yogi"]]
    assert all("kind" in c["required"] for c in choices) and "$ref" not in json.dumps(fedopt)


# -- the local optimizer is torch's ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "cls"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_an_optimizer_is_torchs_with_torchs_defaults(kind: Any, cls: type[torch.optim.Optimizer]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    ours = make_optimizer(Optimizer(kind=kind, lr=0.01, weight_decay=0.1), [parameter])
    theirs = cls([parameter], lr=0.01, weight_decay=0.1)  # type: ignore[call-arg]
    assert type(ours).__qualname__ == cls.__qualname__
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]


# -- federation and site -----------------------------------------------------------------------------------------------
def test_a_federation_is_read_from_names_or_from_sites(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("store: /s\nsites: [b, {name: a, pool: gpu, state: /a}]\n")
    found = Federation.load(tmp_path / "f.yaml")
    assert found.names == ["a", "b"]
    assert [(site.work_pool, site.state) for site in found.sites] == [("b", None), ("gpu", "/a")]
    assert Federation.of(2).names == ["site-1", "site-2"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"sites": []}, "sites: found"),
        ({"sites": ["a", "a"]}, "sites named twice: ['a']; give each site a name of its own"),
        ({"sites": ["../a"]}, "found '../a'"),
        ({"sites": ["a"], "password": "x"}, "password: unknown field"),
    ],
)
def test_a_wrong_federation_is_told_in_one_line(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Federation.load(fields)
    assert told in str(caught.value)


def test_a_site_says_where_its_state_lies_and_what_may_be_imported() -> None:
    with pytest.raises(RecipeError, match="state: missing"):
        SiteConfig.load({"name": "a", "store": "/s"})
    found = SiteConfig.load({"name": "a", "store": "/s", "state": "/a", "allowed_imports": ["mine.*"]})
    assert (found.work_pool, found.allowed_imports) == ("a", ["mine.*"])
