"""Federated statistics: those of the pooled values, and nothing that a site's policy keeps back."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedflow.algorithms.quantiles import quantiles, rank_error, sketch
from fedflow.algorithms.statistics import Dataset, StatisticsPolicy
from fedflow.engine import simulate
from fedflow.engine.results import read_result
from fedflow.engine.rounds import next_step, open_round, start_run, survey
from fedflow.engine.site import SiteWork, site_step
from fedflow.engine.statistics import as_html, statistics_rows, write_statistics
from fedflow.errors import QuorumLost, RecipeError, UserError
from fedflow.local.tables import Images, Tables, datasets_of
from fedflow.recipe import Recipe, SiteConfig
from fedflow.simulation.engine import simulate as simulate_on
from fedflow.store.journal import Journal
from fedflow.store.objects import ObjectStore
from fedflow.testing.faults import fail_at
from tests.builders import in_child, outcome

HERE = __name__
SITES = ["site-1", "site-2", "site-3"]
OPEN = {"min_count": 0, "min_noise": 0.0, "max_noise": 0.0, "max_bins_percent": 100.0}


def values(site: str, offset: float = 0.0) -> dict[str, Any]:
    """40, 80 or 120 rows: a spread-out column, one of whole numbers with gaps, one of texts."""
    number = int(site[-1])
    random = np.random.default_rng(number)
    ages = random.integers(0, 90, 40 * number).astype(float)
    ages[::10] = np.nan
    return {
        "x": offset + random.normal(number, 1 + number, 40 * number),
        "age": ages,
        "ward": ["a", "b"] * (20 * number),
    }


def table(site: str, offset: float = 0.0, policy: Any = None) -> Tables:
    return Tables(policy=OPEN if policy is None else policy, patients=values(site, offset))


def few(site: str, policy: Any = None) -> Tables:
    """A rare column with four values at site-2."""
    rare = np.full(40, np.nan)
    rare[: 4 if site == "site-2" else 40] = np.arange(4 if site == "site-2" else 40)
    return Tables(policy=policy, patients={"rare_secret": rare, "common": np.arange(40.0)})


def odd(site: str) -> Any:
    """What is wrong at site-3."""
    good = {"a": np.arange(50.0), "b": np.arange(50.0)}
    return {"site-1": good, "site-2": {"a": np.arange(50.0), "c": np.arange(50.0)}, "site-3": {"a": np.empty(0)}}[site]


def texts(site: str) -> Any:
    return {"a": ["x"] * 50 if site == "site-3" else np.arange(50.0)}


def images(site: str) -> Tables:
    random = np.random.default_rng(int(site[-1]))
    return Tables(policy=OPEN, scans=Images([random.integers(0, 256, (8, 6), dtype=np.uint8) for _ in range(12)]))


def spec(**changes: Any) -> Recipe:
    algorithm = {"kind": "statistics", **changes.pop("algorithm", {})}
    fields = {"name": "statistics", "workload": f"{HERE}:table", "rounds": 1, "attempts": 1}
    return Recipe.load({**fields, "algorithm": algorithm, **changes})


def run(**changes: Any) -> Journal:
    return simulate(spec(**changes), SITES, run="statistics")


def pooled(name: str, offset: float = 0.0) -> Any:
    found = np.concatenate([values(site, offset)[name] for site in SITES])
    return found[np.isfinite(found)]


# -- figures -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("offset", [0.0, 1e9, -1e9])
def test_moments_are_those_of_the_pooled_values(offset: float) -> None:
    journal = run(workload={"path": f"{HERE}:table", "args": {"offset": offset}})
    found = read_result(journal).values["datasets"]["patients"]["x"]
    for figures, x in [
        (found["all"], pooled("x", offset)),
        *((found["sites"][s], values(s, offset)["x"]) for s in SITES),
    ]:
        assert figures["count"] == len(x) and figures["failures"] == 0
        about = x.astype(np.longdouble) - np.longdouble(offset)
        mean = np.longdouble(offset) + about.mean()
        assert figures["sum"] == pytest.approx(float(x.astype(np.longdouble).sum()), rel=1e-12)
        assert figures["mean"] == pytest.approx(float(mean), rel=1e-12)
        variance = float(about.var(ddof=1))
        assert figures["variance"] == pytest.approx(variance, rel=1e-12)
        assert figures["stddev"] == pytest.approx(variance**0.5, rel=1e-12)
        assert (figures["min"], figures["max"]) == (x.min(), x.max())


def test_numpys_own_figures_are_met() -> None:
    found = read_result(run()).values["datasets"]["patients"]["age"]["all"]
    x = pooled("age")
    assert [found[n] for n in ("mean", "variance", "stddev")] == pytest.approx(
        [x.mean(), x.var(ddof=1), x.std(ddof=1)], rel=1e-12
    )
    assert found["failures"] == 4 + 8 + 12 and found["min"] == 0.0


def test_pandas_figures_are_met() -> None:
    found = read_result(run()).values["datasets"]["patients"]["age"]["all"]
    frame = pandas.concat([pandas.DataFrame(values(site)) for site in SITES])["age"]
    expected = [frame.count(), frame.sum(), frame.mean(), frame.min(), frame.max(), frame.var(), frame.std()]
    names = ("count", "sum", "mean", "min", "max", "variance", "stddev")
    assert [found[n] for n in names] == pytest.approx(expected, rel=1e-12)


def test_a_histogram_is_that_of_the_pooled_values() -> None:
    found = read_result(run(algorithm={"bins": 7, "ranges": {"age": [0, 35]}})).values["datasets"]["patients"]
    for name, span in (("x", None), ("age", (0, 35))):
        counts, edges = np.histogram(pooled(name), bins=7, range=span)
        assert found[name]["all"]["histogram"]["counts"] == counts.tolist()
        assert found[name]["all"]["histogram"]["edges"] == pytest.approx(edges.tolist(), rel=1e-12)
        assert (
            np.sum([s["histogram"]["counts"] for s in found[name]["sites"].values()], axis=0).tolist()
            == counts.tolist()
        )


@given(
    st.lists(st.lists(st.integers(-20, 20), min_size=1, max_size=60), min_size=1, max_size=4),
    st.integers(1, 12),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
)
def test_the_rank_of_a_quantile_is_within_the_bound(sites: list[list[int]], parts: int, wanted: list[float]) -> None:
    """Some of the values that are equal to the one that is found, or lie beside it, have a rank within the bound of q·(N − 1)."""
    sketches = [sketch(np.array(x, dtype=float), parts) for x in sites]
    everything = np.sort(np.concatenate(sites))
    error = rank_error(sketches) * len(everything)
    for q, found in zip(wanted, quantiles(sketches, wanted), strict=True):
        rank = q * (len(everything) - 1)
        below, at_most = (everything < found).sum(), (everything <= found).sum()
        assert below - error - 1e-6 <= rank + 1 and rank <= at_most - 1 + error + 1 + 1e-6


def test_with_every_value_in_the_sketch_quantiles_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    sites = [random.normal(size=n) for n in (50, 31)]
    found = quantiles([sketch(x, 1000) for x in sites], [0, 0.25, 0.5, 1])
    everything = np.sort(np.concatenate(sites))
    assert found == pytest.approx(np.quantile(everything, [0, 0.25, 0.5, 1]).tolist(), rel=1e-9)


def test_quantiles_of_a_run_are_within_their_bound() -> None:
    found = read_result(run(algorithm={"sketch": 20, "quantiles": [0.1, 0.5, 0.9]})).values["datasets"]["patients"][
        "x"
    ]["all"]
    x = np.sort(pooled("x"))
    error = found["quantiles"]["rank_error"]
    assert 0 < error <= 3 / 20
    for q, value in found["quantiles"]["values"].items():
        assert abs(np.searchsorted(x, value) / (len(x) - 1) - float(q)) <= error + 2 / len(x)


# -- policy ------------------------------------------------------------------------------------------------------------
def payloads(journal: Journal) -> bytes:
    """Every byte that site-2 sent."""
    return b"".join(journal.store.get(key) for key in journal.store.list("sites/site-2"))


def test_below_the_minimum_count_nothing_of_a_feature_leaves_the_site() -> None:
    policy = {**OPEN, "min_count": 5}
    journal = run(workload={"path": f"{HERE}:few", "args": {"policy": policy}})
    found = read_result(journal).values
    assert b"common" in payloads(journal) and b"rare_secret" not in payloads(journal)
    assert found["differs"] == {"patients": {"rare_secret": ["site-1", "site-3"]}}
    assert found["datasets"]["patients"]["rare_secret"]["all"]["count"] == 80
    allowed = run(workload={"path": f"{HERE}:few", "args": {"policy": {**OPEN, "min_count": 4}}})
    assert b"rare_secret" in payloads(allowed)


def test_a_minimum_of_0_is_none_and_a_smallest_value_of_0_stays_0() -> None:
    found = read_result(run(workload={"path": f"{HERE}:few", "args": {"policy": OPEN}})).values
    rare = found["datasets"]["patients"]["rare_secret"]
    assert rare["sites"]["site-2"]["count"] == 4 and rare["all"]["min"] == 0.0 == rare["sites"]["site-2"]["min"]


def test_by_default_extremes_are_noised_and_few_points_leave_a_site() -> None:
    """NVFlare's policy: 10 % to 30 % of the range outwards; a bin, and a point, per ten values."""
    journal = run(workload={"path": f"{HERE}:table", "args": {"policy": {}}})
    found = read_result(journal).values["datasets"]["patients"]["x"]
    for site in SITES:
        x = values(site)["x"]
        width = x.max() - x.min()
        assert 0.1 <= (x.min() - found["sites"][site]["min"]) / width <= 0.3
        assert 0.1 <= (found["sites"][site]["max"] - x.max()) / width <= 0.3
        assert ("histogram" in found["sites"][site]) == (len(x) // 10 >= 20)
    assert not any(np.float64(values("site-2")["x"].min()).tobytes() in part for part in [payloads(journal)])


def test_the_sites_own_configuration_goes_before_what_anybody_else_says(tmp_path: Path) -> None:
    store = ObjectStore(str(tmp_path / "store"))
    journal = start_run(store, "statistics", spec(), ["site-1"])
    step = next_step(journal, journal.recipe())
    assert step is not None
    plan, opening = open_round(journal, step)
    config = SiteConfig(
        name="site-1",
        store=store.url,
        state=str(tmp_path / "state"),
        allowed_imports=["*"],
        statistics=StatisticsPolicy(min_count=1000),
    )
    site_step(SiteWork("statistics", 0, "summary", opening.number), config)
    assert survey(journal, plan).accepted.keys() == {"site-1"}
    assert b"age" not in b"".join(store.get(key) for key in store.list("sites/site-1"))


def test_a_retry_draws_the_same_noise() -> None:
    first, second = (
        read_result(run(workload={"path": f"{HERE}:table", "args": {"policy": {}}})).values for _ in (1, 2)
    )
    assert first == second


# -- tables and images -------------------------------------------------------------------------------------------------
def same(found: dict[str, Dataset], expected: dict[str, list[float]], failures: int, others: list[str]) -> None:
    (dataset,) = found.values()
    assert {n: c[0].tolist() for n, c in dataset.columns.items()} == expected
    assert sum(c[1] for c in dataset.columns.values()) == failures and list(dataset.others) == others
    assert dataset.individuals == 3


def test_tables_of_every_kind_are_read_alike(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "t.csv").write_text("a,b,c\n1,2.5,x\n,nope,y\n3,4,z\n")
    expected = {"a": [1.0, 3.0], "b": [2.5, 4.0]}
    same(datasets_of(tmp_path / "t.csv"), expected, 2, ["c"])
    arrow = pyarrow.table({"a": [1, None, 3], "b": [2.5, None, 4.0], "c": ["x", "y", "z"]})
    pyarrow.parquet.write_table(arrow, tmp_path / "t.parquet")
    for source in (arrow, str(tmp_path / "t.parquet"), arrow.to_pydict()):
        same(datasets_of(source), expected, 2, ["c"])
    same(datasets_of(np.array([[1.0, 2.5], [np.nan, np.inf], [3.0, 4.0]])), {"0": [1, 3], "1": [2.5, 4]}, 2, [])
    structured = np.array([(1, 2.5), (2, 3.5), (3, 4.0)], dtype=[("a", "i4"), ("b", "f4")])
    same(datasets_of(structured), {"a": [1, 2, 3], "b": [2.5, 3.5, 4.0]}, 0, [])


def test_a_frame_of_pandas_is_a_table() -> None:
    frame = pandas.DataFrame({"a": [1, None, 3], "b": [2.5, float("inf"), 4.0], "c": ["x", "y", "z"]})
    same(datasets_of(frame), {"a": [1.0, 3.0], "b": [2.5, 4.0]}, 2, ["c"])


def test_intensities_of_images_are_those_of_all_pixels(tmp_path: Path) -> None:
    found = read_result(
        run(workload=f"{HERE}:images", algorithm={"bins": 16, "ranges": {"intensity": [0, 256]}})
    ).values
    pixels = np.concatenate([datasets_of(images(s))["scans"].columns["intensity"][0] for s in SITES])
    figures = found["datasets"]["scans"]["intensity"]["all"]
    assert figures["count"] == 3 * 12 * 48
    assert figures["histogram"]["counts"] == np.histogram(pixels, bins=16, range=(0, 256))[0].tolist()


def test_images_are_read_from_files_and_counted_as_individuals(tmp_path: Path) -> None:
    from PIL import Image

    colour = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    Image.fromarray(colour).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", colour)
    found = Images(tmp_path).dataset()
    assert found.individuals == 2 and sorted(found.columns) == ["intensity/0", "intensity/1", "intensity/2"]
    assert found.columns["intensity/1"][0].tolist() == colour[..., 1].ravel().tolist() * 2
    assert not StatisticsPolicy(min_count=3).allows(len(found.columns["intensity/0"][0]), found.individuals)


# -- mistakes ----------------------------------------------------------------------------------------------------------
def test_columns_that_differ_are_listed_and_an_empty_table_excludes_its_site() -> None:
    journal = run(workload=f"{HERE}:odd", quorum=2)
    found = read_result(journal).values
    assert found["differs"] == {"data": {"b": ["site-1"], "c": ["site-2"]}} and found["sites"] == ["site-1", "site-2"]
    manifest = journal.manifest(0, "summary")
    assert manifest is not None and "table 'data': found no rows" in manifest.excluded["site-3"]


def test_a_column_that_is_named_and_not_numeric_excludes_its_site() -> None:
    with pytest.raises(QuorumLost, match=r"algorithm.features: found \['a'\] of table 'data' without a number"):
        run(workload=f"{HERE}:texts", algorithm={"features": ["a"]})
    found = read_result(run(workload=f"{HERE}:texts")).values
    assert found["not_numeric"] == {"site-3": {"data": ["a"]}}


@pytest.mark.parametrize(
    ("algorithm", "told"),
    [
        ({"bins": 0}, "algorithm.bins"),
        ({"quantiles": [1.5]}, "algorithm.quantiles"),
        ({"ranges": {"x": [2, 1]}}, "ranges.x: found [2.0, 1.0]"),
        ({"features": []}, "algorithm.features"),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_is_refused(algorithm: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as error:
        spec(algorithm=algorithm)
    assert told in str(error.value)


def test_a_policy_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(RecipeError, match="must not exceed max_noise"):
        SiteConfig.load({"name": "a", "store": "memory://a", "state": "/a", "statistics": {"min_noise": 0.5}})


def test_what_is_no_table_is_told() -> None:
    with pytest.raises(UserError, match="table 'data': found 'int'"):
        datasets_of(3)
    with pytest.raises(UserError, match="columns of one length"):
        datasets_of({"a": [1, 2], "b": [1]})


# -- environments, files -----------------------------------------------------------------------------------------------
def test_worker_processes_find_the_same() -> None:
    assert read_result(simulate_on(spec(), SITES, run="statistics", workers=2)).values == read_result(run()).values


def run_statistics(store: str, fault: Any = None) -> None:
    if fault is not None:
        fault.arm()
    simulate(spec(), SITES, store=store, run="statistics")


def test_killed_between_its_passes_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    stores = [str(tmp_path / name) for name in ("killed", "undisturbed")]
    fault = fail_at("manifest", round=0, when="after", token=tmp_path / "token")
    assert in_child(run_statistics, stores[0], fault) == -signal.SIGKILL and fault.struck
    for store in stores:
        run_statistics(store)
    killed, undisturbed = (Journal(ObjectStore(store), "statistics") for store in stores)
    assert outcome(killed)["state"] == outcome(undisturbed)["state"]


def test_statistics_are_written_as_json_table_and_page(tmp_path: Path) -> None:
    import pyarrow.parquet

    result = read_result(run())
    assert json.loads(write_statistics(result, tmp_path / "s.json", "s").read_text()) == dict(result.values)
    rows = pyarrow.parquet.read_table(write_statistics(result, tmp_path / "s.parquet", "s")).to_pylist()
    (mean,) = [r["value"] for r in rows if (r["feature"], r["site"], r["statistic"]) == ("age", "", "mean")]
    assert mean == pytest.approx(pooled("age").mean(), rel=1e-12)
    assert len(rows) == len(list(statistics_rows(result)))
    page = write_statistics(result, tmp_path / "s.html", "ward <1>").read_text()
    assert "ward &lt;1&gt;" in page and page.count("<svg") == 2 and page.count("<rect") == 40 and "site-3" in page
    assert "not numeric: ward" in page and page == as_html(result, "ward <1>")
    with pytest.raises(UserError, match="--out"):
        write_statistics(result, tmp_path / "s.txt", "s")


def test_a_forged_answer_excludes_its_site() -> None:
    from fedflow.algorithms.answers import Answer
    from fedflow.errors import UpdateInvalid
    from fedflow.types import Update

    algorithm = spec().algorithm
    good = {"not_numeric": {}, "t": {"x": {"count": 1, "failures": 0, "sum": 0.0, "min": 0.0, "max": 1.0}}}
    unsorted = {"t/x": torch.tensor([2.0, 1.0], dtype=torch.float64)}
    for values, tensors in (({"t": {"x": {"count": 0}}}, {}), ({**good, "t": {"x": 3}}, {}), (good, unsorted)):
        update = Update("a", 0, 1, 1, 0.0, {"answer": Answer(values, tensors).encoded()})
        with pytest.raises(UpdateInvalid, match="statistics: "):
            algorithm.decode(update, None, "summary")
