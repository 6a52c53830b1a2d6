"""Names in a recipe: built-ins, entry points of installed packages, aliases, import paths that are allowed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fedflow.errors import RecipeError, ResolveError
from fedflow.recipe import Recipe, SiteConfig
from fedflow.registry import call, entry_point_names, load_entry_point, resolve


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with an algorithm, a schedule and a workload."""
    (tmp_path / "registered.py").write_text(
        "from typing import Literal\n"
        "from fedflow.algorithms import FedAvg\n"
        "from fedflow.schedules import Everyone\n"
        "class Mine(FedAvg):\n    kind: Literal['mine'] = 'mine'\n    mu: float = 0.5\n"
        "class Always(Everyone):\n    kind: Literal['always'] = 'always'\n"
        "class Work:\n    pass\n"
    )
    info = tmp_path / "registered-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: registered\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[fedflow.algorithms]\nmine = registered:Mine\n[fedflow.schedules]\nalways = registered:Always\n"
        "[fedflow.workloads]\nwork = registered:Work\nbroken = registered.none:Work\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "registered", raising=False)


RECIPE = {"name": "r", "model": "m:M", "workload": "m:W", "rounds": 1}


@pytest.mark.usefixtures("package")
def test_an_installed_package_adds_algorithms_and_schedules_by_name() -> None:
    recipe = Recipe.load({**RECIPE, "algorithm": {"kind": "mine", "mu": 0.25}, "schedule": "always"})
    assert (type(recipe.algorithm).__name__, recipe.algorithm.mu, recipe.schedule.kind) == ("Mine", 0.25, "always")
    dumped = recipe.model_dump(mode="json")
    assert (dumped["algorithm"]["kind"], dumped["schedule"]["kind"]) == ("mine", "always")
    assert Recipe.load(dumped) == recipe


@pytest.mark.usefixtures("package")
def test_names_of_installed_packages_are_offered_where_a_name_is_wrong() -> None:
    with pytest.raises(RecipeError, match=r"found 'mien', expected one of \[.*'fedavg', .*'mine',"):
        Recipe.load({**RECIPE, "algorithm": "mien"})
    assert {"work", "broken"} <= set(entry_point_names("workloads"))


@pytest.mark.usefixtures("package")
def test_a_package_that_is_not_allowed_is_not_imported_by_its_short_name_either() -> None:
    with pytest.raises(
        ResolveError, match=r"workload: found 'work', expected a short name.*let the site's owner add registered"
    ):
        resolve("workloads", "work", field="workload", allowed=[])
    with pytest.raises(ValueError, match=r"found 'mine', expected a module among \['hospital'\]"):
        Recipe.model_validate({**RECIPE, "algorithm": "mine"}, context={"allowed_imports": ["hospital"]})
    assert "registered" not in sys.modules
    assert resolve("workloads", "work", field="workload", allowed=["registered"]).__name__ == "Work"


@pytest.mark.usefixtures("package")
def test_an_entry_point_that_does_not_import_is_named() -> None:
    assert load_entry_point("workloads", "work", field="workload").__name__ == "Work"
    assert load_entry_point("workloads", "nobody's", field="workload") is None
    with pytest.raises(ResolveError, match=r"workloads 'broken': entry point registered\.none:Work failed to import"):
        load_entry_point("workloads", "broken", field="workload")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("digit", ["workload: found 'digit'", "'digits'", "correct the name"]),
        (
            "no_such_package.work:W",
            ["workload: found 'no_such_package.work:W'", "install the package that has 'no_such_package'"],
        ),
        ("fedflow.schedules:Nobody", ["workload: found", "'Everyone'", "'Sampled'", "correct the attribute"]),
        ("fedflow.schedules:", ["workload: found 'fedflow.schedules:'"]),
        (":Thing", ["workload: found ':Thing'"]),
        (".relative:Thing", ["workload: found '.relative:Thing'"]),
    ],
)
def test_a_name_that_leads_to_nothing_says_what_was_looked_for(name: str, told: list[str]) -> None:
    with pytest.raises(ResolveError) as caught:
        resolve("workloads", name, field="workload", aliases={"digits": "fedflow.schedules:Everyone"})
    assert all(part in str(caught.value) for part in told), str(caught.value)


def test_a_module_that_fails_to_import_is_told_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ResolveError, match=r"model: found 'failing_module:M'.*ZeroDivisionError"):
        resolve("models", "failing_module:M", field="model")


def test_only_allowed_modules_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "not_allowed.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ResolveError, match=r"found 'not_allowed:W'.*\['fedflow\.\*', 'mine'\].*allowed_imports"):
        resolve("workloads", "not_allowed:W", field="workload", allowed=["mine", "fedflow.*"])
    assert "not_allowed" not in sys.modules
    assert (
        resolve("workloads", "fedflow.schedules:Everyone", field="workload", allowed=["fedflow.*"]).__name__
        == "Everyone"
    )


def test_a_site_that_allows_no_module_imports_none() -> None:
    """A recipe with a command, for instance: fedflow brings a workload that runs one."""
    site = SiteConfig.load({"name": "a", "store": "/s", "state": "/a"})
    name = "fedflow.local.script:ScriptWorkload"
    with pytest.raises(
        ResolveError, match=r"found 'fedflow\.local\.script:ScriptWorkload', expected a short name: this site lets"
    ):
        resolve("workloads", name, field="workload", aliases=site.workloads, allowed=site.allowed_imports)
    with pytest.raises(ValueError, match="expected a short name"):
        Recipe.model_validate({**RECIPE, "algorithm": "tests.builders:Leaning"}, context=site.context)
    assert Recipe.model_validate({**RECIPE, "algorithm": "fedavg"}, context=site.context).algorithm.kind == "fedavg"


def test_what_the_sites_owner_names_is_allowed_by_being_named() -> None:
    aliases = {"mine": "fedflow.schedules:Everyone"}
    assert resolve("workloads", "mine", field="workload", aliases=aliases, allowed=[]).__name__ == "Everyone"


def test_an_algorithm_by_import_path_is_held_to_what_the_site_allows() -> None:
    fields = {**RECIPE, "algorithm": "tests.builders:Leaning"}
    assert Recipe.model_validate(fields, context={"allowed_imports": ["tests.*"]}).algorithm.kind == "leaning"
    with pytest.raises(ValueError, match="allowed_imports"):
        Recipe.model_validate(fields, context={"allowed_imports": ["mine"]})


def test_arguments_are_given_only_as_far_as_they_are_asked_for() -> None:
    def factory(size: int, site: str) -> tuple[int, str]:
        return size, site

    assert call(factory, {"size": 2}, field="workload.args", site="a", sites=["a", "b"]) == (2, "a")
    assert call(factory, {"size": 2, "site": "own"}, field="workload.args", site="a") == (2, "own")
    ready: Any = object()
    assert call(ready, {}, field="workload.args", site="a") is ready


@pytest.mark.parametrize("args", [{}, {"size": 1, "colour": 2}])
def test_arguments_that_do_not_fit_are_told_with_the_signature(args: dict[str, int]) -> None:
    def factory(size: int) -> int:
        return size

    with pytest.raises(ResolveError, match=r"workload\.args: found .*expected arguments of factory\(size: .?int.?\)"):
        call(factory, args, field="workload.args")


# -- what a recipe may not reach ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("allowed", [None, ["fedflow.template.*"]])
@pytest.mark.parametrize("path", ["fedflow.template.workload:torch.os.system", "fedflow.template.workload:np.load"])
def test_a_name_does_not_lead_through_modules(path: str, allowed: list[str] | None) -> None:
    with pytest.raises(ResolveError, match=r"workload: found .* is a module: name it before the colon"):
        resolve("workloads", path, field="workload", allowed=allowed)


def test_what_an_allowed_module_has_imported_is_not_allowed_with_it() -> None:
    path = "fedflow.template.workload:load_digits"
    with pytest.raises(ResolveError, match=r"expected a module among \['fedflow.template.workload'\]"):
        resolve("workloads", path, field="workload", allowed=["fedflow.template.workload"])


@pytest.mark.parametrize("path", ["os:system", "subprocess:run", "builtins:eval"])
def test_python_s_own_library_is_no_model(path: str) -> None:
    with pytest.raises(ResolveError, match=r"model: found .* expected code of an installed package"):
        resolve("models", path, field="model")


def test_a_module_is_asked_for_again_where_the_interpreter_stumbles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stumbling.py").write_text(
        "from pathlib import Path\n"
        "tried = Path(__file__).with_name('tried')\n"
        "if not tried.exists():\n"
        "    tried.touch()\n"
        "    raise SystemError('AST constructor recursion depth mismatch (before=102, after=72)')\n"
        "def work(): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("workloads", "stumbling:work", field="workload").__name__ == "work"
