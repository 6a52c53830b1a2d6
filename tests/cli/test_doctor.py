"""`fedflow doctor`: every line ok, warn or fail, with its fix; exit code 0 only if nothing fails."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.cli.project import SITES, Project, Result
from tests.servers import PrefectServer, prefect_server


def lines(result: Result) -> dict[str, tuple[str, str]]:
    """What was looked at -> (state, the rest of its line)."""
    found = re.findall(r"^(ok|warn|fail) +(\S.*?)  +(.*?) *$", result.out, re.M)
    return {what: (state, rest) for state, what, rest in found}


def test_all_is_well(project: Project) -> None:
    recipe = project.recipe(timeouts={"round_deadline": "10m"})
    result = project.call("doctor", recipe, "--store", "store")
    found = lines(result)
    assert (result.code, result.err) == (0, ""), result
    for what in ("fedflow", "python", "torch", "prefect", "fastapi", "federation", "recipe", "store"):
        assert found[what][0] in ("ok", "warn"), found[what]
    assert found["round_deadline"] == ("ok", "10m 00s")
    assert found["quorum_grace"] == ("ok", "30 s  (follows from round_deadline)")
    assert found["run_timeout"] == ("ok", "none")
    assert found["Prefect server"][0] == "warn" and "PREFECT_API_URL" in found["Prefect server"][1]


def test_what_fails_is_named_with_its_fix(project: Project) -> None:
    recipe = project.recipe(timeouts={"round_deadline": "1m", "train_timeout": "2m"})
    (project.folder / "file").touch()
    result = project.call("doctor", recipe, "--store", "file/store")
    found = lines(result)
    assert result.code == 1
    assert found["recipe"][0] == "fail" and "train_timeout (0:02:00)" in found["recipe"][1]
    assert found["store"][0] == "fail" and "file/store" in found["store"][1]
    assert re.match(r"error: 2 of \d+ checks failed\n$", result.err)


def test_server_that_does_not_answer(project: Project) -> None:
    result = project.shell("doctor", PREFECT_API_URL="http://127.0.0.1:1/api")
    state, rest = lines(result)["Prefect server"]
    assert (result.code, state) == (1, "fail")
    assert "http://127.0.0.1:1/api" in rest


@pytest.fixture
def prefect_api(postgres: str) -> Iterator[PrefectServer]:
    """A server on which nobody has deployed anything."""
    with prefect_server(postgres) as server:
        yield server


def test_server_before_and_after_a_deployment(project: Project, prefect_api: PrefectServer) -> None:
    """`fedflow deploy` makes what `fedflow doctor` misses; the workers are the sites' own matter."""
    before = project.shell("doctor", "recipe.yaml", PREFECT_API_URL=prefect_api.url)
    assert before.code == 0, before
    assert lines(before)["Prefect server"][0] == "ok"
    state, rest = lines(before)["worker of site-1"]
    assert state == "warn"
    assert "no work pool 'site-1'" in rest and "fedflow site start" in rest

    deployed = project.shell("deploy", "federation.yaml", "--store", "store", PREFECT_API_URL=prefect_api.url)
    assert deployed.code == 0, deployed
    assert [name.rpartition("/")[2] for name in deployed.out.split()] == ["federation", "federation", *SITES, *SITES]
    after = project.shell("doctor", "recipe.yaml", PREFECT_API_URL=prefect_api.url)
    assert "no worker on work pool 'site-1'" in lines(after)["worker of site-1"][1]
    # of three, each 0.3 s after work, 5 s when idle, and 15 s at most
    rates = "10.0 times a second after a round, 0.6 when idle, 0.2 of a slow API"
    assert lines(after)["requests"] == ("ok", f"3 workers ask {rates}")
