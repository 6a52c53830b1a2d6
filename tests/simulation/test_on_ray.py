"""Simulations on Ray: the bits of every other backend, whoever is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from torch import Tensor, nn

from fedflow.environments import SimEnv
from fedflow.errors import QuorumLost, UserError
from fedflow.recipe import Federation
from fedflow.simulation.engine import simulate
from tests.builders import SITES, Blobs, bits, head, recipe

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
UNEVEN: Mapping[str, Any] = {"rounds": 2, "schedule": {"kind": "sampled", "sites_per_round": 2}}
RECIPES: dict[str, dict[str, Any]] = {
    "fedavg": {"overrides": {"site-1": {"training": {"epochs": 2}}}},
    "scaffold": {"algorithm": "scaffold"},
    "fedadam": {"algorithm": {"kind": "fedopt", "server_optimizer": "adam"}},
    "diloco": {"algorithm": {"kind": "diloco", "local_steps_per_round": 3}},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of two processors on this machine, to which this process is connected."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


def test_the_memory_of_actors_on_this_machine_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"workers: found 9000000000, .* it takes [\d.]+ GiB of the at least"):
        simulate(recipe(), SITES, backend="ray", workers=9_000_000_000)
    assert not ray.is_initialized()


@pytest.mark.parametrize("name", RECIPES)
def test_the_bits_are_those_of_one_process_with_any_number_of_actors(name: str, cluster: None) -> None:
    fields = {**UNEVEN, **RECIPES[name]}
    wanted = bits(simulate(recipe(**fields), SITES, backend="debug"))
    for count in (1, 2):
        assert bits(simulate(recipe(**fields), SITES, backend="ray", workers=count)) == wanted
    assert ray.is_initialized()  # a cluster that was there stays


def test_a_cohort_larger_than_what_may_wait_to_be_reduced(cluster: None) -> None:
    sites = [f"site-{i:03}" for i in range(1, 141)]
    once = {"steps": 1, "batch_size": 4, "optimizer": {"lr": 0.1}}
    wide = recipe(rounds=2, training=once, algorithm="tests.builders:Leaning", memory_budget=40_000)
    assert bits(simulate(wide, sites, backend="ray")) == bits(simulate(wide, sites, backend="debug"))


class Deadly(Blobs):
    """Whoever trains site 2 dies, once if there is a place to note it."""

    def __init__(self, site: str, note: str = "") -> None:
        super().__init__(site)
        self.note = note

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.site == "site-2" and not (self.note and Path(self.note).exists()):
            if self.note:
                Path(self.note).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch)


def test_an_actor_that_is_killed_loses_no_update(tmp_path: Path, cluster: None) -> None:
    note = tmp_path / "died"
    deadly = {"path": "tests.simulation.test_on_ray:Deadly", "args": {"note": str(note)}}
    found = simulate(recipe(workload=deadly, algorithm="scaffold"), SITES, backend="ray", workers=2)
    assert note.exists()
    assert head(found).excluded == {}
    undisturbed = simulate(recipe(workload=deadly, algorithm="scaffold"), SITES, backend="debug")
    assert bits(found) == bits(undisturbed)


def test_a_site_over_which_actors_die_is_excluded(cluster: None) -> None:
    deadly = recipe(workload="tests.simulation.test_on_ray:Deadly", quorum=2, rounds=1)
    found = head(simulate(deadly, SITES, backend="ray", workers=1))
    assert sorted(found.contributors) == ["site-1", "site-3"]
    assert "its process died 3 times" in found.excluded["site-2"]
    others = simulate(recipe(quorum=2, rounds=1), ["site-1", "site-3"], backend="debug")
    assert found.model_digest == head(others).model_digest


def test_a_site_that_fails_is_named_with_the_reason(cluster: None) -> None:
    work = {"path": "tests.simulation.test_simulation:Bad", "args": {"how": "has no data"}}
    with pytest.raises(QuorumLost, match=r"missing: site-2: .*the workload has no examples"):
        simulate(recipe(workload=work, rounds=1), SITES, backend="ray", workers=2)


def test_more_actors_than_the_cluster_has_processors_are_refused(cluster: None) -> None:
    with pytest.raises(UserError, match="workers: found 3, expected at most the 2 processors in the Ray cluster"):
        simulate(recipe(), SITES, backend="ray", workers=3)


def test_in_the_background_on_a_cluster_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    federation = Federation.model_validate({"sites": list(SITES)})
    with SimEnv(federation, home=tmp_path, backend="ray", workers=1) as env:
        run = env.execute(recipe(rounds=1))
        run.result()
    assert bits(run.journal) == bits(simulate(recipe(rounds=1), SITES, backend="debug"))


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"backend: found 'ray', expected Ray installed; pip install 'fedflow\[ray\]'"):
        simulate(recipe(), SITES, backend="ray")
    with pytest.raises(UserError, match=r"pip install 'fedflow\[ray\]'"):
        SimEnv(3, home=tmp_path, backend="ray")


def test_objects_cannot_go_to_actors() -> None:
    with pytest.raises(UserError, match="backend: found 'ray', expected 'debug' where workloads or model are given"):
        simulate(recipe(), {site: Blobs(site) for site in SITES}, backend="ray")
