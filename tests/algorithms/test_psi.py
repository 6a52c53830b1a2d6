"""Private set intersection: exact against Python's sets, and nothing but sizes and what is common becomes known."""

from __future__ import annotations

import json
import random
import signal
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nacl.bindings
import numpy as np
import pandas
import pytest
import torch
from nacl.bindings import crypto_scalarmult as multiply
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, SealedBox

from fedflow.algorithms.psi import PSI, PSIState, SiteSecrets, _hashed, texts
from fedflow.cli import main
from fedflow.engine import simulate, start_run
from fedflow.engine.psi import common_items
from fedflow.engine.results import read_result
from fedflow.errors import QuorumLost, RecipeError, ResolveError, TrainingInvalid, UpdateInvalid, UserError
from fedflow.local.matching import KeyedTable, rows_of
from fedflow.recipe import Recipe, SiteConfig
from fedflow.simulation.engine import simulate as simulate_on
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.store.tensors import read_tensors
from fedflow.testing.faults import Fault, fail_at
from fedflow.types import RoundContext, Update
from tests.builders import in_child

HERE = __name__


def psi(**algorithm: Any) -> Recipe:
    fields = {"name": "psi", "workload": f"{HERE}:many", "algorithm": {"kind": "psi", **algorithm}, "rounds": 1}
    return Recipe.load({**fields, "attempts": 1})


def many(site: str) -> list[str]:
    """100,000 items; each is at a site with a chance of 2 in 3."""
    return random.Random(site).sample([f"patient-{i}" for i in range(150_000)], 100_000)


def found_at(journal: Journal, site: str) -> list[str]:
    config = SiteConfig(
        name=site, store=journal.store.url, state=f"{journal.store.url}-states/{site}", allowed_imports=["*"]
    )
    return common_items(config, journal.run)


# -- exact -------------------------------------------------------------------------------------------------------------
def test_three_sites_of_100_000_items(tmp_path: Path) -> None:
    sites = ["site-1", "site-2", "site-3"]
    found = read_result(simulate_on(psi(), sites, workers=3, store=str(tmp_path))).values
    expected = set.intersection(*(set(many(site)) for site in sites))
    assert found == {"sites": dict.fromkeys(sites, 100_000), "intersection": len(expected)} and len(expected) > 1000


CASES: dict[str, tuple[list[list[Any]], list[str]]] = {
    "two": ([["a", "b", "c"], ["b", "c", "d"]], ["b", "c"]),
    "three, and what only two have": ([["a", "b", "x"], ["b", "x", "y"], ["b", "y", "a"]], ["b"]),
    "duplicates": ([["a", "a", "b"], ["a", "c", "a"]], ["a"]),
    "one without items": ([["a"], []], []),
    "all without": ([[], [], []], []),
    "nothing in common": ([["a"], ["b"], ["c"]], []),
    "numbers": ([[1, 20, np.int64(3)], ["1", "3", 2**70], np.array([3, 1])], ["1", "3"]),
    "missing values": ([["a", None, float("nan"), ""], [None, "a", ""]], ["a"]),
    "composed and decomposed": ([["Zoë", "ｆ"], [unicodedata.normalize("NFD", "Zoë"), "f"]], ["Zoë"]),
}


@pytest.mark.parametrize("lists, expected", CASES.values(), ids=CASES)
def test_what_is_common(lists: list[list[Any]], expected: list[str]) -> None:
    journal = simulate(psi(), {f"site-{i}": items for i, items in enumerate(lists, start=1)})
    assert read_result(journal).values["intersection"] == len(expected)
    for i in range(1, len(lists) + 1):
        assert found_at(journal, f"site-{i}") == expected


def test_the_rule_for_texts_is_the_recipes() -> None:
    plain, compatible, caseless = PSI().item, PSI(unicode="NFKC").item, PSI(unicode="NFKC", ignore_case=True).item
    assert texts(["ﬁ", "FI", "fi"], plain) == ["FI", "fi", "ﬁ"]
    assert texts(["ﬁ", "FI", "fi"], compatible) == ["FI", "fi"]
    assert texts(["Straße", "STRASSE", "ﬁ"], caseless) == ["fi", "strasse"]
    assert texts(["ℌ", "H", "h"], caseless) == ["h"], "compatible with a capital letter"
    same = ["\u1fb4", "\u03b1\u0345\u0301", "\u03b1\u0301\u0345"]  # canonically equivalent
    assert len({unicodedata.normalize("NFC", text) for text in same}) == 1
    assert len(texts(same, PSI(ignore_case=True).item)) == 1
    sites = {"a": ["Ada ", "BOB"], "b": ["ada", "bob"]}
    assert read_result(simulate(psi(ignore_case=True), sites)).values["intersection"] == 1  # blanks tell apart


def intersected(store: str, fault: Fault | None = None) -> None:
    """A run that may meet a fault."""
    if fault:
        fault.arm()
    simulate(psi(), SETS, store=store, run="psi-1", state=f"{store}-states")


def test_killed_at_a_site_and_between_phases_it_goes_on_and_is_exact(tmp_path: Path) -> None:
    """A site dies when it remembers its secrets, and has not said what it sends; the coordinator when lists have gone round once."""
    store = str(tmp_path / "store")
    site = fail_at("site state", site="site-2", when="after", token=tmp_path / "site")
    between = replace(
        fail_at("manifest", when="after", token=tmp_path / "between"), at=r"rounds/00000/second/manifest\.json$"
    )
    for fault in (site, between):
        assert in_child(intersected, store, fault) == -signal.SIGKILL and fault.struck
    intersected(store)
    journal = Journal(ObjectStore(store), "psi-1")
    assert read_result(journal).values == {"sites": {s: len(items) for s, items in SETS.items()}, "intersection": 1}
    assert [found_at(journal, site) for site in SETS] == [["all"]] * 3


# -- what becomes known --------------------------------------------------------------------------------------------------
SETS = {
    "site-1": ["both-12", "all", "own-1"],
    "site-2": ["both-12", "all", "own-2", "more-2"],
    "site-3": ["all", "own-3"],
}


def payloads(journal: Journal) -> Iterator[tuple[str, Mapping[str, Mapping[str, torch.Tensor]]]]:
    """Phase -> what sites are given for it, all that is public."""
    for step in [(-1, "initial"), *journal.committed()]:
        manifest = journal.manifest(*step)
        assert manifest
        yield step[1], {g: read_tensors(journal.store, ref) for g, ref in manifest.broadcast.items()}


def test_no_item_is_in_the_shared_store() -> None:
    journal = simulate(psi(), SETS)
    for key in journal.store.list(""):
        content = journal.store.get(key)
        assert not any(item.encode() in content for items in SETS.values() for item in items), key


def test_a_site_is_given_points_sealed_lists_and_places_and_no_list_under_all_keys() -> None:
    given = dict(payloads(simulate(psi(), SETS)))
    sizes = {site: len(items) for site, items in SETS.items()}
    assert {g: t for g, t in given["initial"].items() if t} == {}
    blinded, sealed = given["blind"], given["second"]
    assert {s: len(t) for s, t in blinded["lists"].items()} == {s: 32 * n for s, n in sizes.items()}
    assert {s: len(t) for s, t in blinded["keys"].items()} == dict.fromkeys(SETS, 32)
    assert {s: len(t) for s, t in sealed["lists"].items()} == {s: 32 * n + 48 for s, n in sizes.items()}
    assert not given["third"]["lists"] and {s: len(t) for s, t in given["third"]["places"].items()} == dict.fromkeys(
        SETS, 1
    )
    assert not any(given["reveal"].values())


def test_a_curious_site_cannot_compare_its_items_with_one_other_sites() -> None:
    """Site-1 raises whatever it can read by its key once more, and looks whether anything of its own is among the others'. Had it what was
    sealed for another site (its own list under k₁k₂), it would find what it shares with site-2, whose list it can bring under both."""
    algorithm, work = PSI(), {site: _Work(items) for site, items in SETS.items()}
    state, secrets, told = algorithm.init({}), dict.fromkeys(SETS, SiteSecrets()), {}
    for phase in ("blind", "second"):
        told[phase] = algorithm.broadcast(state, phase)
        made = {}
        for site in SETS:
            context = RoundContext("run", 0, phase, site, 3, 0)
            made[site], secrets[site] = algorithm.site_update(told[phase], secrets[site], work[site], context)
        state = algorithm.server_update(state, algorithm.aggregate(made.values(), context), context)
    blinded, sealed = told["second"]["lists"], algorithm.broadcast(state, "third")["lists"]

    def opened(owner: str, site: str) -> set[bytes]:
        return _points(SealedBox(PrivateKey(_raw(secrets[site].secrets["key"]))).decrypt(_raw(sealed[owner])))

    mine = _raw(secrets["site-1"].secrets["scalar"])
    for owner in ("site-1", "site-3"):
        with pytest.raises(CryptoError):
            opened(owner, "site-1")
    own = _points(_raw(blinded["site-1"]))
    others = [_points(_raw(blinded["site-2"])), _points(_raw(blinded["site-3"])), opened("site-2", "site-1")]
    known = set.union(*others, *({multiply(mine, p) for p in points} for points in others))
    assert not known & (own | {multiply(mine, p) for p in own})
    assert len({multiply(mine, p) for p in others[0]} & opened("site-1", "site-3")) == 2  # "both-12" and "all"


def test_lists_are_in_the_order_of_their_bytes_and_new_in_every_run() -> None:
    lists = [dict(payloads(simulate(psi(), SETS)))["blind"]["lists"]["site-2"] for _ in range(2)]
    rows = [[one.numpy().tobytes()[i : i + 32] for i in range(0, len(one), 32)] for one in lists]
    assert all(row == sorted(row) for row in rows) and not set(rows[0]) & set(rows[1])


def test_items_are_hashed_into_the_subgroup_and_twice_raised_in_either_order_are_equal() -> None:
    points, (a, b) = _hashed(["x", "y"]), (random.Random(1).randbytes(32), random.Random(2).randbytes(32))
    for p in points:
        assert multiply(a, multiply(b, p)) == multiply(b, multiply(a, p)) != p
        order = nacl.bindings.crypto_core_ed25519_is_valid_point(_edwards(p))
        assert order, "a point of the subgroup of prime order"


def _edwards(u: bytes) -> bytes:
    """y = (u − 1) / (u + 1)."""
    prime, value = 2**255 - 19, int.from_bytes(u, "little")
    return ((value - 1) * pow(value + 1, -1, prime) % prime).to_bytes(32, "little")


def _raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.numpy())


def _points(data: bytes) -> set[bytes]:
    return {data[i : i + 32] for i in range(0, len(data), 32)}


class _Work:
    def __init__(self, data: list[str]) -> None:
        self.data = data

    def items(self, column: str | None, item: Any) -> list[str]:
        return self.data

    def recorded(self) -> dict[str, Any]:
        return {"threads": 2}


# -- who does not keep to the protocol ------------------------------------------------------------------------------------
@pytest.mark.parametrize("point", [bytes(32), (1).to_bytes(32, "little"), (2**255 - 20).to_bytes(32, "little")])
def test_a_list_with_a_point_of_small_order_is_refused_and_says_whose_it_is(point: bytes) -> None:
    """Raised by any key it comes out the same: it would be in every list."""
    algorithm, context = PSI(), RoundContext("run", 0, "second", "site-1", 2, 0)
    lists = {site: torch.tensor(list(point), dtype=torch.uint8) for site in ("site-1", "site-2")}
    _, secrets = algorithm._blinded(_Work(["x"]), context)
    given = {"lists": lists, "keys": lists, "places": {}}
    with pytest.raises(
        TrainingInvalid, match=r"psi: the list of site-2: found what is none .*expected points of the curve"
    ):
        algorithm.site_update(given, secrets, _Work(["x"]), context)


def test_a_list_that_is_sealed_for_nobody_is_refused_and_says_whose_it_is() -> None:
    algorithm, context = PSI(), RoundContext("run", 0, "third", "site-1", 3, 0)
    lists = {site: torch.zeros(80, dtype=torch.uint8) for site in SETS}
    _, secrets = algorithm._blinded(_Work(["x"]), context)
    with pytest.raises(TrainingInvalid, match=r"psi: the list of site-2: .*sealed for this site"):
        algorithm.site_update({"lists": lists, "keys": lists, "places": {}}, secrets, _Work(["x"]), context)


# -- tables ------------------------------------------------------------------------------------------------------------
def test_tables_are_aligned(tmp_path: Path) -> None:
    left = pandas.DataFrame({"id": ["p3", "p1", "p9", "p2"], "age": [3, 1, 9, 2]})
    right = pandas.DataFrame({"who": ["p2", "p5", "p3"], "pressure": [0.2, 0.5, 0.3]})
    left.to_csv(tmp_path / "left.csv", index=False)
    right.to_parquet(tmp_path / "right.parquet")
    tables = {
        "a": KeyedTable(tmp_path / "left.csv", "id", tmp_path / "a.csv"),
        "b": KeyedTable(tmp_path / "right.parquet", "who", tmp_path / "b.parquet"),
    }
    simulate(psi(), tables)
    mine, theirs = pandas.read_csv(tmp_path / "a.csv"), pandas.read_parquet(tmp_path / "b.parquet")
    joined = left.merge(right, left_on="id", right_on="who").sort_values("id")
    assert mine["id"].tolist() == theirs["who"].tolist() == ["p2", "p3"]
    assert mine["age"].tolist() == joined["age"].tolist() and theirs["pressure"].tolist() == joined["pressure"].tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.parquet", "left.csv", "right.parquet"]


def test_tables_are_aligned_by_the_recipes_rule_for_texts(tmp_path: Path) -> None:
    (tmp_path / "left.csv").write_text("id,x\nADA,1\nﬁn,2\n")
    (tmp_path / "right.csv").write_text("id,y\nfin,3\nada,4\n")
    tables = {
        side: KeyedTable(tmp_path / f"{side}.csv", "id", tmp_path / f"{side}-aligned.csv") for side in ("left", "right")
    }
    simulate(psi(unicode="NFKC", ignore_case=True), tables)
    lines = [(tmp_path / f"{side}-aligned.csv").read_text().split() for side in ("left", "right")]
    assert lines == [["id,x", "ADA,1", "ﬁn,2"], ["id,y", "ada,4", "fin,3"]]
    with pytest.raises(QuorumLost, match="rows 0 and 1 with one key"):
        (tmp_path / "left.csv").write_text("id,x\nADA,1\nada,2\n")
        simulate(psi(ignore_case=True), tables)


def test_a_column_of_any_table_has_the_items() -> None:
    frame, mapping = pandas.DataFrame({"id": ["a", "b"]}), {"id": ["b", None]}
    assert read_result(simulate(psi(column="id"), {"a": frame, "b": mapping})).values["intersection"] == 1


# -- mistakes ----------------------------------------------------------------------------------------------------------
def test_sites_must_be_two_or_three_and_all_of_them_answer() -> None:
    for count in (1, 4):
        with pytest.raises(
            UserError, match=rf"schedule: found '{count} sites a round', expected 2 to 3 with algorithm psi"
        ):
            simulate(psi(), {f"site-{i}": ["a"] for i in range(count)})
    with pytest.raises(RecipeError, match=r"quorum: found 2, expected none with algorithm psi"):
        Recipe.load({**psi().model_dump(), "quorum": 2})
    with pytest.raises(RecipeError, match=r"required_sites: found \['a'\], expected none with algorithm psi"):
        Recipe.load({**psi().model_dump(), "required_sites": ["a"]})


def test_no_site_aggregates() -> None:
    """It would read every list under all keys, and so tell which of its items only one of the two others has."""
    with pytest.raises(
        RecipeError, match="schedule: found swarm with algorithm psi, expected one that aggregates at the"
    ):
        Recipe.load({**psi().model_dump(), "schedule": "swarm"})


def test_three_sites_do_not_become_two(tmp_path: Path) -> None:
    """What two of them share is not for them to know, when the third has gone."""
    sites = {"a": ["x", "y"], "b": ["x", "y"], "c": ["x"]}
    journal = start_run(ObjectStore(str(tmp_path)), "psi-1", psi(), list(sites))
    with pytest.raises(QuorumLost, match="required sites are absent: c"):
        simulate(psi(), {"a": sites["a"], "b": sites["b"]}, store=journal.store.url, run="psi-1")
    found = simulate(psi(), sites, store=journal.store.url, run="psi-1")
    assert read_result(found).values["intersection"] == 1


@pytest.mark.parametrize(
    "data, column, told",
    [
        (["a", 1.5], None, r"items: found 'float', expected texts and whole numbers"),
        ([True], None, "found 'bool'"),
        (["\ud800"], None, "surrogates not allowed"),
        ({"id": ["a"]}, None, "workload: found 'dict', expected texts and whole numbers, or a table"),
        ({"id": ["a"]}, "ID", r"algorithm.column: found 'ID', expected one of \['id'\]"),
        (7, None, "workload: found 'int'"),
    ],
)
def test_data_that_has_no_items_exclude_the_site_and_so_end_the_round(data: Any, column: str | None, told: str) -> None:
    with pytest.raises(QuorumLost, match=told):
        simulate(psi(column=column), {"a": data, "b": {"ID": ["x"]} if column else ["x"]})


def test_more_items_than_are_allowed() -> None:
    with pytest.raises(QuorumLost, match="psi: items: found 3, expected at most 2; raise algorithm.max_items"):
        simulate(psi(max_items=2), {"a": ["x", "y", "z"], "b": ["x"]})


def test_two_rows_with_one_key(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,x\na,1\nb,2\na,3\n")
    with pytest.raises(ResolveError, match="found 'rows 0 and 2 with one key'"):
        KeyedTable(tmp_path / "t.csv", "id").items(PSI().item)
    with pytest.raises(ResolveError, match="found 'no rows for 1 items'"):
        rows_of(["a"], ["b"])
    with pytest.raises(ResolveError, match=r"aligned: found 'x.parquet', expected a name that ends in .csv"):
        KeyedTable("t.csv", "id", "x.parquet")


def test_lists_of_other_lengths_than_the_items_are_refused() -> None:
    algorithm, sizes = PSI(), json.dumps({"a": 2, "b": 3})
    for phase, length in (("blind", 33), ("second", 2 * 32), ("third", 1)):
        update = Update("a", 0, 1, 1, 0.0, {"sent": {"list": torch.zeros(length, dtype=torch.uint8)}})
        with pytest.raises(UpdateInvalid, match=r"list: found \d+ bytes, expected"):
            algorithm.decode(update, PSIState(sizes=sizes), phase)


# -- the command -------------------------------------------------------------------------------------------------------
def test_the_command_shows_sizes_and_at_a_site_the_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = simulate(psi(), SETS, store=str(tmp_path / "store"), state=str(tmp_path / "states"), run="psi-1")
    site = tmp_path / "site.json"
    site.write_text(
        json.dumps({"name": "site-2", "store": journal.store.url, "state": str(tmp_path / "states/site-2")})
    )
    assert main(["psi", "psi-1", "--store", journal.store.url]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| site-1 | 3 |",
        "| site-2 | 4 |",
        "| site-3 | 2 |",
        "| **in all** | 1 |",
    ]
    assert main(["psi", "psi-1", "--site", str(site), "--out", str(tmp_path / "ids.txt")]) == 0
    assert (tmp_path / "ids.txt").read_text() == "all\n"
    assert main(["psi", "psi-1", "--store", journal.store.url, "--out", "x.txt"]) == 2
    assert "expected --site with it" in capsys.readouterr().err
