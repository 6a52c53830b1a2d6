"""The simulator: the reference run's bits with any number of processes, whoever is killed."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Generator, Tensor, nn

from fedflow.algorithms import FedAvg
from fedflow.engine import simulate as reference
from fedflow.engine.retention import check_run
from fedflow.engine.summary import summarize
from fedflow.errors import QuorumLost, RoundError, SiteStateLost, UserError
from fedflow.recipe import Recipe
from fedflow.simulation.engine import simulate
from fedflow.simulation.traces import Generated
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.records import Manifest
from fedflow.testing.faults import Fault, fail_at
from fedflow.types import Aggregate, RoundContext
from tests.builders import SITES, Blobs, HeldOut, Tiny, bits, head, recipe, trainings

UNEVEN: Mapping[str, Any] = {
    "rounds": 3,
    "schedule": {"kind": "sampled", "sites_per_round": 2},
    "evaluation": "tests.builders:HeldOut",
}
"""Sampling, uneven sites, BatchNorm, dropout, momentum."""

RECIPES: dict[str, dict[str, Any]] = {
    "fedavg": {"overrides": {"site-1": {"training": {"epochs": 2}}}},
    "scaffold": {"algorithm": "scaffold"},
    "fedadam": {"algorithm": {"kind": "fedopt", "server_optimizer": "adam"}},
    "diloco": {"algorithm": {"kind": "diloco", "local_steps_per_round": 3}},
    "streaming diloco": {"algorithm": {"kind": "streaming_diloco", "fragments": 3, "local_steps_per_round": 2}},
    "personal": {"algorithm": {"kind": "fedavg", "personal": ["1.*"]}},
    "geometric median": {"algorithm": {"kind": "fedavg", "reduction": {"kind": "geometric_median"}}},
    "norm clipping": {
        "algorithm": {"kind": "fedavg", "transfer": "delta", "reduction": {"kind": "norm_clip", "max_norm": 0.1}}
    },
    "int8 both ways": {
        "algorithm": {"kind": "fedavg", "transfer": "delta"},
        "transforms": [{"kind": "quantise", "bits": 8, "broadcast": True}],
    },
    "top-k": {"algorithm": {"kind": "fedavg", "transfer": "delta"}, "transforms": [{"kind": "top_k", "fraction": 0.2}]},
    "a site's own state": {"algorithm": "tests.builders:Leaning"},
    "two phases": {"algorithm": "tests.builders:Bounded"},
    "little memory": {"memory_budget": 1024},
}


def evaluations(journal: Journal) -> list[Any]:
    return [e.metrics if (e := journal.evaluation(r)) else None for r in range(head(journal).round + 1)]


# -- bits --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RECIPES)
def test_the_bits_are_those_of_the_reference_with_any_number_of_processes(name: str) -> None:
    fields, counts = RECIPES[name], (1, 2, 3) if name in ("fedavg", "scaffold", "fedadam", "diloco") else (2,)
    wanted = reference(recipe(**UNEVEN, **fields), SITES)
    for options in ({"backend": "debug"}, *({"workers": count} for count in counts)):
        found = simulate(recipe(**UNEVEN, **fields), SITES, **options)  # type: ignore[arg-type]
        assert bits(found) == bits(wanted), options
        assert evaluations(found) == evaluations(wanted)
        assert head(found).metrics == head(wanted).metrics


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
def test_a_cohort_of_whole_blocks_and_larger_than_what_may_wait_has_the_same_bits(algorithm: str) -> None:
    """Eighty sites are five blocks, which are dealt out, and summed, in another way by each number of workers."""
    sites = [f"site-{i:03}" for i in range(1, 81)]
    wide = recipe(algorithm=algorithm, training={"steps": 1, "batch_size": 4, "optimizer": {"lr": 0.1}})
    wanted = bits(reference(wide, sites))
    for options in ({"backend": "debug"}, {"workers": 1}, {"workers": 2}, {"workers": 3}):
        assert bits(simulate(wide, sites, **options)) == wanted, options  # type: ignore[arg-type]


class Odd(Blobs):
    """Every seventh site diverges, so that most blocks of the others are not those that were dealt out."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = super().loss(model, batch)
        return loss * float("inf") if int(self.site.removeprefix("site-")) % 7 == 0 else loss


def test_excluded_sites_within_blocks_change_no_bit() -> None:
    sites = [f"site-{i:03}" for i in range(1, 151)]
    once = {"steps": 1, "batch_size": 4, "optimizer": {"lr": 0.1}}
    odd = recipe(rounds=1, training=once, quorum=100, workload="tests.simulation.test_simulation:Odd")
    found, wanted = simulate(odd, sites, workers=2), reference(odd, sites)
    assert len(head(found).contributors) == 150 - 21
    assert bits(found) == bits(wanted)


class Wide(nn.Sequential):
    """What a site remembers of it is larger than what a pipe holds."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 20_000), nn.ReLU(), nn.Linear(20_000, 3))


def test_states_larger_than_a_pipe_holds_go_both_ways() -> None:
    sites = [f"site-{i:02}" for i in range(1, 25)]
    once = {"steps": 1, "batch_size": 4, "optimizer": {"lr": 0.1}}
    wide = recipe(model="tests.simulation.test_simulation:Wide", algorithm="tests.builders:Leaning", training=once)
    assert bits(simulate(wide, sites, workers=1)) == bits(reference(wide, sites))


def test_workloads_given_as_objects_are_those_of_the_recipe() -> None:
    given = simulate(recipe(), {site: Blobs(site) for site in SITES}, model=Tiny, backend="debug")
    assert bits(given) == bits(simulate(recipe(), SITES, backend="debug"))


def test_the_interpreter_is_left_as_it_was() -> None:
    """Meanwhile its garbage is seldom looked for: in books of many sites there is none."""
    before, meanwhile = gc.get_threshold(), list[int]()
    simulate(recipe(rounds=1), SITES, on_commit=lambda manifest: meanwhile.append(gc.get_threshold()[0]))
    assert gc.get_threshold() == before and meanwhile == [50_000] != [before[0]]


def test_objects_cannot_go_to_other_processes() -> None:
    with pytest.raises(
        UserError, match="backend: found 'processes', expected 'debug' where workloads or model are given"
    ):
        simulate(recipe(), {site: Blobs(site) for site in SITES})


class Counting(nn.Sequential):
    """It counts its own calls in Python, and behaves by them."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) / self.calls  # type: ignore[no-any-return,no-untyped-call]


def test_every_training_has_a_module_of_its_own() -> None:
    odd = recipe(model="tests.simulation.test_simulation:Counting")
    assert bits(simulate(odd, SITES, workers=1)) == bits(reference(odd, SITES))


# -- going on ----------------------------------------------------------------------------------------------------------
SCRIPT = """
import json, sys
from pathlib import Path
from fedflow.simulation.engine import simulate
from tests.builders import SITES, recipe

if __name__ == "__main__":
    folder, fields = Path(sys.argv[1]), json.loads(sys.argv[2])
    options = json.loads(sys.argv[3])
    simulate(recipe(**fields), SITES, store=str(folder / "store"), run="run", book=folder / "book.sqlite", workers=2, **options)
"""


def simulated(folder: Path, fields: Mapping[str, Any], fault: Fault | None = None, **options: Any) -> int:
    """The exit code of a simulation in a process of its own."""
    script = folder / "simulated.py"
    script.write_text(SCRIPT)
    python_path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": python_path}
    if fault:
        environment |= fault.environment(environment)
    command = [sys.executable, str(script), str(folder), json.dumps(dict(fields)), json.dumps(options)]
    return subprocess.run(command, env=environment, check=False).returncode


def there(folder: Path) -> Journal:
    return Journal(ObjectStore(str(folder / "store")), "run")


STATEFUL: Mapping[str, Any] = {**UNEVEN, "algorithm": "tests.builders:Leaning"}


@pytest.fixture(scope="module")
def undisturbed() -> Journal:
    return reference(recipe(**STATEFUL), SITES)


FAULTS = {
    "before round 0 is written": fail_at("manifest", round=0),
    "after it": fail_at("manifest", round=0, when="after"),
    "what the sites remember is written, the state is not": Fault(at="/public/run/objects/", nth=5),
    "the state is written, the manifest is not": fail_at("manifest", round=1),
    "the evaluation is not": fail_at("evaluation", round=1),
    "at the end": fail_at("evaluation", round=2, when="after"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_killed_simulation_goes_on_to_the_same_bytes(fault: Fault, undisturbed: Journal, tmp_path: Path) -> None:
    assert simulated(tmp_path, STATEFUL, fault) == -signal.SIGKILL
    assert simulated(tmp_path, STATEFUL) == 0
    assert bits(there(tmp_path)) == bits(undisturbed)
    assert evaluations(there(tmp_path)) == evaluations(undisturbed)


def test_with_a_model_every_few_rounds_a_killed_simulation_does_those_since_again(tmp_path: Path) -> None:
    """Killed in round 4, whose model would not be written: it goes on behind round 2, from what the sites remembered then."""
    fields = {**STATEFUL, "rounds": 7}
    assert simulated(tmp_path, fields, fail_at("manifest", round=4), journal_every=3) == -signal.SIGKILL
    assert have_models(there(tmp_path)) == [False, False, True, False]
    assert simulated(tmp_path, fields, journal_every=3) == 0
    assert have_models(there(tmp_path)) == [False, False, True, False, False, True, True]
    journal, undisturbed = there(tmp_path), reference(recipe(**fields), SITES)
    assert [m.model_digest for m in manifests(journal)] == [m.model_digest for m in manifests(undisturbed)]
    assert bits(journal) == bits(undisturbed)
    assert evaluations(journal) == evaluations(undisturbed)
    assert check_run(journal).problems == []


def have_models(journal: Journal) -> list[bool]:
    return [all(journal.store.exists(ref.key) for ref in m.objects()) for m in manifests(journal)]


def manifests(journal: Journal) -> list[Manifest]:
    return [m for round, phase in journal.committed() if (m := journal.manifest(round, phase))]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"journal_every": 0}, "journal_every: found 0, expected a count of rounds, at least 1"),
        (
            {"journal_every": 2, "trace": Generated(seed=1, seconds_per_step=1.0)},
            "journal_every: found 2, expected 1 with a trace",
        ),
    ],
    ids=["none", "with a trace"],
)
def test_a_journal_that_cannot_be_written_so_seldom_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        simulate(recipe(), SITES, backend="debug", **options)


def test_no_process_outlives_a_killed_simulation(tmp_path: Path) -> None:
    assert simulated(tmp_path, STATEFUL, fail_at("manifest", round=0)) == -signal.SIGKILL
    for process in _processes(str(tmp_path)):
        with contextlib.suppress(ProcessLookupError):
            select.select([os.pidfd_open(process)], [], [])  # returns when it has ended


def _processes(argument: str) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument.encode() in path.read_bytes():
                yield int(path.parent.name)


def test_more_rounds_go_on_from_where_the_run_ended(tmp_path: Path, undisturbed: Journal) -> None:
    log = tmp_path / "log"
    work = {"workload": {"path": "tests.builders:Blobs", "args": {"log": str(log)}}}
    assert simulated(tmp_path, {**STATEFUL, **work, "rounds": 1}) == 0
    assert simulated(tmp_path, {**STATEFUL, **work}) == 0
    assert sum(trainings(log).values()) == 6
    assert bits(there(tmp_path)) == bits(undisturbed)


def test_without_what_its_sites_remember_a_run_does_not_go_on(tmp_path: Path) -> None:
    store, book = str(tmp_path / "store"), tmp_path / "book.sqlite"
    fields = {**STATEFUL, "rounds": 1}
    simulate(recipe(**fields), SITES, store=store, run="run", book=book, backend="debug")
    book.unlink()
    with pytest.raises(
        SiteStateLost, match=r"site states lost: found those as of commit -1 in .*book.sqlite, expected commit 0's"
    ):
        simulate(recipe(**STATEFUL), SITES, store=store, run="run", book=book, backend="debug")
    assert head(there(tmp_path)).round == 0


# -- workers that die --------------------------------------------------------------------------------------------------
def test_a_worker_that_is_killed_in_round_2_of_5_loses_no_update(tmp_path: Path) -> None:
    token, fields = tmp_path / "fired", {**STATEFUL, "rounds": 5}
    assert simulated(tmp_path, fields, fail_at("training", round=2, token=token)) == 0
    assert token.exists()
    assert bits(there(tmp_path)) == bits(reference(recipe(**fields), SITES))
    assert [len(r.sites) for r in summarize(there(tmp_path)).rounds] == [2, 2, 2, 2, 2]


def test_a_worker_that_is_killed_while_it_has_nothing_to_do_is_replaced(undisturbed: Journal) -> None:
    def kill(manifest: Manifest) -> None:
        for child in multiprocessing.active_children() if manifest.round == 0 else ():
            child.kill()
            child.join()

    with_killing = simulate(recipe(**STATEFUL), SITES, workers=2, on_commit=kill)
    assert bits(with_killing) == bits(undisturbed)


class Deadly(Blobs):
    """Whoever trains site 2 dies."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.site == "site-2":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch)


def test_a_site_over_which_processes_die_is_excluded() -> None:
    deadly = recipe(workload="tests.simulation.test_simulation:Deadly", quorum=2, rounds=1)
    found = head(simulate(deadly, SITES, workers=2))
    assert sorted(found.contributors) == ["site-1", "site-3"]
    assert "its process died 3 times (exit code -9)" in found.excluded["site-2"]
    others = simulate(recipe(quorum=2, rounds=1), ["site-1", "site-3"], backend="debug")
    assert found.model_digest == head(others).model_digest


class Fatal(Blobs):
    """Its module ends every process that makes one."""

    def __init__(self, site: str) -> None:
        os._exit(7)


def test_processes_that_die_over_every_site_lose_the_quorum() -> None:
    with pytest.raises(QuorumLost, match=r"site-1: its process died 3 times \(exit code 7\)"):
        simulate(recipe(workload="tests.simulation.test_simulation:Fatal"), SITES, workers=2)


# -- sites that fail ---------------------------------------------------------------------------------------------------
class Failing(Blobs):
    """Site 2 fails in one way or another as long as there is a file `broken` that says how."""

    def __init__(self, site: str, broken: str) -> None:
        super().__init__(site)
        self.broken = Path(broken)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = super().loss(model, batch)
        if self.site != "site-2" or not self.broken.exists():
            return loss
        if self.broken.read_text() == "diverges":
            return loss * float("inf")
        if self.broken.read_text() == "exits":
            sys.exit("no licence left")
        raise RuntimeError("the disk is on fire")


def failing(tmp_path: Path, how: str, **fields: Any) -> Recipe:
    (tmp_path / "broken").write_text(how)
    args = {"broken": str(tmp_path / "broken")}
    return recipe(workload={"path": "tests.simulation.test_simulation:Failing", "args": args}, **fields)


@pytest.mark.parametrize("options", [{"backend": "debug"}, {"workers": 2}], ids=["debug", "processes"])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raises", r"training failed:\n.*RuntimeError: the disk is on fire"),
        ("exits", r"training failed:\n.*SystemExit: no licence left"),
        ("diverges", r"not finite: \w+/\S+ \(\d+ of"),
    ],
)
def test_a_site_that_fails_is_excluded_with_the_reason(
    how: str, reason: str, options: dict[str, Any], tmp_path: Path
) -> None:
    found = head(simulate(failing(tmp_path, how, quorum=2), SITES, **options))
    assert sorted(found.contributors) == ["site-1", "site-3"]
    assert re.match(reason, found.excluded["site-2"], re.DOTALL)


def test_below_the_quorum_the_run_stops_and_goes_on_when_the_site_is_back(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "store": str(tmp_path / "store"), "run": "run", "book": tmp_path / "book.sqlite", "workers": 2
    }  # fmt: skip
    broken = failing(tmp_path, "raises", quorum=3)
    with pytest.raises(
        QuorumLost, match=r"round 0: found 2 valid updates, expected 3; missing: site-2: training failed"
    ):
        simulate(broken, SITES, **options)
    assert there(tmp_path).committed() == []
    (tmp_path / "broken").unlink()
    assert head(simulate(broken, SITES, **options)).model_digest == head(reference(recipe(), SITES)).model_digest


class Bad(Blobs):
    """Site 2 is of no use, in one way or another."""

    def __init__(self, site: str, how: str) -> None:
        if site == "site-2" and how == "cannot be read":
            raise FileNotFoundError("no such volume")
        super().__init__(site)
        self.how = how if site == "site-2" else ""

    def __len__(self) -> int:
        return 0 if self.how == "has no data" else super().__len__()

    def batches(self, batch_size: int, generator: Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in super().batches(batch_size, generator):
            yield (inputs[:, :3] if self.how == "has other columns" else inputs), targets


BAD = {
    "cannot be read": r"FileNotFoundError: no such volume",
    "has no data": r"round 0, site site-2: the workload has no examples; give this site data or leave it out",
    "has other columns": r"RuntimeError: mat1 and mat2 shapes cannot be multiplied \(\d+x3 and 4x6\)",
}


@pytest.mark.parametrize("how", BAD)
def test_a_site_of_no_use_is_named_with_the_reason(how: str) -> None:
    work = {"path": "tests.simulation.test_simulation:Bad", "args": {"how": how}}
    with pytest.raises(QuorumLost, match=rf"(?s)round 0: found 2 valid updates, .* missing: site-2: .*{BAD[how]}"):
        simulate(recipe(workload=work, rounds=1), SITES, backend="debug")


def test_more_sampled_than_there_are_is_said_before_anything_starts() -> None:
    sampled = recipe(schedule={"kind": "sampled", "sites_per_round": 4})
    with pytest.raises(
        UserError, match=r"schedule.sites_per_round: found 4, expected at most 3, the sites of the federation; lower"
    ):
        simulate(sampled, SITES)


class Wordy(Blobs):
    """Site 2 says something that is no number."""

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        return {"accuracy": "splendid" if self.site == "site-2" else 1.0}


def test_a_metric_that_is_no_number_excludes_its_site() -> None:
    wordy = recipe(workload="tests.simulation.test_simulation:Wordy", quorum=2, rounds=1)
    found = head(simulate(wordy, SITES, workers=2))
    assert sorted(found.contributors) == ["site-1", "site-3"]
    assert "ValueError: could not convert string to float: 'splendid'" in found.excluded["site-2"]


@pytest.mark.parametrize("reduction", ["geometric_median", {"kind": "trimmed_mean", "byzantine": 1}])
def test_too_few_updates_for_a_robust_reduction_are_a_lost_quorum(reduction: Any, tmp_path: Path) -> None:
    robust = failing(tmp_path, "raises", algorithm={"kind": "fedavg", "reduction": reduction}, quorum=3)
    with pytest.raises(QuorumLost, match=r"round 0: found 2 valid updates, expected 3; missing: site-2"):
        simulate(robust, SITES, workers=2)


class Large(nn.Sequential):
    """28 MB."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 500_000), nn.Linear(500_000, 10, bias=False))


LARGE = f"{__name__}:Large"
KRUM = {"kind": "fedavg", "reduction": {"kind": "krum", "byzantine": 1}}
MUCH: dict[str, tuple[dict[str, Any], dict[str, Any], int, str]] = {
    "many workers": ({}, {"workers": 9_000_000}, 3, r"workers: found 9000000, .*; lower it, or free memory"),
    "many rounds in memory": (
        {"rounds": 1_000_000},
        {"backend": "debug"},
        3,
        r"store: found 'memory://.*; give store=, a folder, or raise journal_every: the models of 1000000 rounds",
    ),
    "the same, written seldom": (
        {"rounds": 1_000_000},
        {"backend": "debug", "journal_every": 7},
        3,
        r"store: found .* the models of 142858 rounds",
    ),
    "all updates at once": (
        {"algorithm": KRUM},
        {"backend": "debug"},
        100_000,
        r"schedule: found '100000 sites a round', .*; ask fewer of them: algorithm fedavg",
    ),
    "a budget": (
        {"memory_budget": "90TB"},
        {"workers": 2_000},
        3,
        r"memory_budget: found 90000000000000, .*; lower it",
    ),
}


@pytest.mark.parametrize("name", MUCH)
def test_more_memory_than_there_is_is_said_before_anything_starts_with_what_takes_it(name: str) -> None:
    fields, options, sites, told = MUCH[name]
    left = r"expected what fits into the [\d.]+ GiB of memory that are left on this machine: it takes [\d.]+ GiB of"
    with pytest.raises(UserError, match=told) as refused:
        simulate(recipe(**{"model": LARGE, **fields}), [f"site-{i}" for i in range(1, 1 + sites)], **options)
    assert re.search(left, str(refused.value))


def test_rounds_on_disk_that_are_not_written_or_may_never_come_take_no_memory(tmp_path: Path) -> None:
    """As many rounds as are refused above; the first commit ends each of them."""

    def stop(manifest: Manifest) -> None:
        raise InterruptedError

    once = {"rounds": 1_000_000, "model": LARGE, "training": {"steps": 1, "batch_size": 4, "optimizer": {"lr": 0.1}}}
    for options in ({"store": str(tmp_path)}, {"journal_every": 1_000_000}):
        with pytest.raises(InterruptedError):
            simulate(recipe(**once), SITES[:1], backend="debug", on_commit=stop, **options)  # type: ignore[arg-type]
    early = recipe(**once, early_stop={"patience": 3}, evaluation="tests.builders:HeldOut")
    with pytest.raises(InterruptedError):
        simulate(early, SITES[:1], backend="debug", on_commit=stop)


class Stuck(FedAvg):
    """Its server cannot do the second round."""

    def server_update(self, state: Any, aggregate: Aggregate, ctx: RoundContext) -> Any:
        if ctx.round == 1:
            raise RuntimeError("the sum is odd")
        return super().server_update(state, aggregate, ctx)


class Blind(HeldOut):
    """It cannot be evaluated."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        raise RuntimeError("the sum is odd")


@pytest.mark.parametrize(
    ("fields", "round"),
    [
        ({"algorithm": "tests.simulation.test_simulation:Stuck"}, 1),
        ({"evaluation": "tests.simulation.test_simulation:Blind"}, 0),
    ],
    ids=["update", "evaluation"],
)
def test_what_fails_at_the_server_names_run_and_round_and_leaves_no_process_behind(
    fields: dict[str, Any], round: int
) -> None:
    before = set(multiprocessing.active_children())
    told = f"^run odd, round {round}: the server's part failed: RuntimeError: the sum is odd$"
    with pytest.raises(RoundError, match=told) as failed:
        simulate(recipe(**fields), SITES, workers=2, run="odd")
    assert isinstance(failed.value.__cause__, RuntimeError)
    assert set(multiprocessing.active_children()) <= before


def test_a_book_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "book.sqlite").write_text("a shopping list, and a long one, which is no database at all" * 20)
    with pytest.raises(UserError, match=r"book: found '.*book.sqlite', expected a file that fedflow wrote, or none"):
        simulate(recipe(), SITES, book=tmp_path / "book.sqlite", backend="debug")


def test_sites_that_are_not_given_again_are_absent(tmp_path: Path) -> None:
    options: dict[str, Any] = {"store": str(tmp_path), "run": "run", "backend": "debug"}
    simulate(recipe(rounds=1), SITES, **options)
    found = head(simulate(recipe(rounds=2), SITES[:2], **options))
    assert sorted(found.contributors) == list(SITES[:2])
    assert found.excluded == {"site-3": "not among the sites"}
