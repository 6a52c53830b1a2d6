"""Boosted trees: what is merged is what xgboost predicts, and trees grown together are those of all rows at one place."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import psutil
import pytest
import torch
import xgboost
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from sklearn.datasets import load_breast_cancer, make_classification
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from fedflow.algorithms.xgboost import Meeting, Tracker, XGBoost, XGBoostState, _bytes
from fedflow.engine import simulate
from fedflow.engine.aggregation import read_model
from fedflow.engine.export import export_model
from fedflow.errors import QuorumLost, RecipeError, ResolveError, SiteError, UpdateInvalid, UserError
from fedflow.local import together
from fedflow.local.together import RowData
from fedflow.recipe import TLS, Numerics, Recipe, SiteConfig
from fedflow.schedules import Everyone
from fedflow.simulation.engine import simulate as simulate_on
from fedflow.store.journal import Journal
from fedflow.types import RoundContext, Update

HERE = __name__
SITES = ["site-1", "site-2"]
SIX = make_classification(600, 8, n_informative=6, n_classes=6, random_state=0)
ROWS, LABELS = load_breast_cancer(return_X_y=True)
CANCER = train_test_split(ROWS, LABELS, test_size=0.3, random_state=0, stratify=LABELS)
BINARY = {"objective": "binary:logistic", "eval_metric": ["auc", "logloss"], "max_depth": 3, "eta": 0.3}


def six(site: str, sites: list[str]) -> Any:
    """Every second row, of six classes."""
    i = sites.index(site)
    return SIX[0][i :: len(sites)], SIX[1][i :: len(sites)]


def cancer(site: str, sites: list[str]) -> Any:
    """Real rows; a part of them is held out."""
    train, held_out, labels, held_out_labels = CANCER
    i, n = sites.index(site), len(sites)
    return {"train": (train[i::n], labels[i::n]), "held_out": (held_out[i::n], held_out_labels[i::n])}


def whole_numbers(site: str, sites: list[str]) -> Any:
    """Features of 16 values: any sketch of them has the same cuts."""
    random = np.random.default_rng(5)
    features = random.integers(0, 16, (400, 5)).astype(np.float32)
    labels = (features[:, 0] + features[:, 1] * random.uniform(0.5, 1.5, 400) > 15).astype(np.float32)
    return (
        (features, labels)
        if not sites
        else (features[sites.index(site) :: len(sites)], labels[sites.index(site) :: len(sites)])
    )


def recipe(workload: str = "six", **changes: Any) -> Recipe:
    algorithm = {"kind": "xgboost", **changes.pop("algorithm", {})}
    fields = {"name": "trees", "workload": f"{HERE}:{workload}", "rounds": 3, "attempts": 1}
    return Recipe.load({**fields, "algorithm": algorithm, **changes})


def booster_of(journal: Journal, round: int = -1) -> xgboost.Booster:
    committed = [step for step in journal.committed() if step[1] == "boost"]
    manifest = journal.manifest(*committed[round])
    assert manifest
    found = xgboost.Booster()
    found.load_model(bytearray(read_model(journal, manifest)["params"]["booster"].numpy().tobytes()))
    return found


def as_json(booster: xgboost.Booster) -> Any:
    return json.loads(bytes(booster.save_raw("json")))["learner"]


def model_of(booster: xgboost.Booster) -> Any:
    return as_json(booster)["gradient_booster"]["model"]


def margin(booster: xgboost.Booster, rows: xgboost.DMatrix, **more: Any) -> Any:
    return booster.predict(rows, output_margin=True, **more)


# -- bagging -----------------------------------------------------------------------------------------------------------
SIX_CLASSES = {"objective": "multi:softprob", "num_class": 6, "max_depth": 2}


@pytest.fixture(scope="module")
def bagged() -> Journal:
    return simulate(recipe(algorithm={"params": SIX_CLASSES}, rounds=5), SITES)


def test_six_classes_five_rounds_and_two_sites_are_60_trees(bagged: Journal) -> None:
    booster = booster_of(bagged)
    model = model_of(booster)
    assert model["iteration_indptr"] == [0, 12, 24, 36, 48, 60] and booster.num_boosted_rounds() == 5
    assert model["tree_info"] == [0, 1, 2, 3, 4, 5] * 10
    assert [tree["id"] for tree in model["trees"]] == list(range(60))
    assert model["gbtree_model_param"] == {"num_parallel_tree": "1", "num_trees": "60"}


def test_the_margin_is_the_base_and_the_sum_of_the_trees(bagged: Journal) -> None:
    """Walked down by hand."""
    booster, rows = booster_of(bagged), SIX[0][:50].astype(np.float32)
    expected = np.full((len(rows), 6), 0.5)
    model = model_of(booster)
    for tree, group in zip(model["trees"], model["tree_info"], strict=True):
        for i, row in enumerate(rows):
            node = 0
            while tree["left_children"][node] != -1:
                small = row[tree["split_indices"][node]] < np.float32(tree["split_conditions"][node])
                node = tree["left_children" if small else "right_children"][node]
            expected[i, group] += tree["split_conditions"][node]
    assert np.allclose(margin(booster, xgboost.DMatrix(rows)), expected, atol=1e-5)


def test_a_round_moves_the_margin_by_the_mean_of_the_sites_steps() -> None:
    """Site i continues the round before on its own rows: Δᵢ; the margin moves by Σ nᵢΔᵢ / Σ nᵢ."""
    data = {"site-1": (SIX[0][:200], SIX[1][:200]), "site-2": (SIX[0][200:], SIX[1][200:])}
    journal = simulate(recipe(algorithm={"params": SIX_CLASSES, "trees_per_round": 2}, rounds=2), data)
    rows, before, after = xgboost.DMatrix(SIX[0]), booster_of(journal, 0), booster_of(journal, 1)
    assert after.num_boosted_rounds() == 4
    assert np.array_equal(margin(after, rows, iteration_range=(0, 2)), margin(before, rows))
    steps = []
    for features, labels in data.values():
        params = {**SIX_CLASSES, "base_score": 0.5, "nthread": 1}
        grown = xgboost.train(params, xgboost.DMatrix(features, labels), 2, xgb_model=before.copy())
        steps.append(margin(grown, rows) - margin(before, rows))
    expected = margin(before, rows) + (200 * steps[0] + 400 * steps[1]) / 600
    assert np.allclose(margin(after, rows), expected, atol=1e-5)


def test_sites_with_the_same_rows_are_one_site() -> None:
    """The mean of equal steps is that step: boosting on the rows at one place."""
    algorithm = {"params": {**BINARY, "subsample": 1}, "weight_by": "uniform"}
    train, _, labels, _ = CANCER
    journal = simulate(recipe(algorithm=algorithm), {"a": (train, labels), "b": (train, labels)})
    central = xgboost.train({**BINARY, "base_score": 0.5, "nthread": 1}, xgboost.DMatrix(train, labels), 3)
    rows = xgboost.DMatrix(train)
    assert np.allclose(margin(booster_of(journal), rows), margin(central, rows), atol=1e-5)


def test_a_random_forest() -> None:
    """The forest of all sites' trees predicts the mean of the sites' forests."""
    forest = {**BINARY, "num_parallel_tree": 5, "subsample": 0.7, "colsample_bynode": 0.5, "eta": 1.0}
    journal = simulate(recipe("cancer", algorithm={"params": forest}, rounds=1), SITES)
    booster = booster_of(journal)
    assert model_of(booster)["iteration_indptr"] == [0, 10] and booster.num_boosted_rounds() == 1
    assert _auc(booster) > 0.97
    trees = [json.dumps(tree["split_conditions"]) for tree in model_of(booster)["trees"]]
    assert len(set(trees)) == 10, "sites and trees draw differently"


def test_cyclic_boosting_is_a_schedule() -> None:
    """Each round continues on one site's rows, whole."""
    data = {site: six(site, SITES) for site in SITES}
    journal = simulate(recipe(algorithm={"params": SIX_CLASSES}, schedule="cyclic", rounds=3), data)
    by_hand = None
    for site in ("site-1", "site-2", "site-1"):
        params = {**SIX_CLASSES, "base_score": 0.5, "nthread": 1}
        by_hand = xgboost.train(params, xgboost.DMatrix(*data[site]), 1, xgb_model=by_hand)
    rows = xgboost.DMatrix(SIX[0])
    assert np.array_equal(margin(booster_of(journal), rows), margin(by_hand, rows))


def test_the_same_bits_come_from_worker_processes(tmp_path: Path, bagged: Journal) -> None:
    again = simulate_on(recipe(algorithm={"params": SIX_CLASSES}, rounds=5), SITES, store=str(tmp_path), workers=1)
    heads = [journal.manifest(4, "boost") for journal in (bagged, again)]
    assert heads[0] and heads[1] and heads[0].model_digest == heads[1].model_digest


# -- on real data ------------------------------------------------------------------------------------------------------
def _auc(booster: xgboost.Booster) -> float:
    _, held_out, _, labels = CANCER
    return float(roc_auc_score(labels, booster.predict(xgboost.DMatrix(held_out))))


def test_breast_cancer_as_good_as_central_stopped_early_and_exported(tmp_path: Path) -> None:
    train, _, labels, _ = CANCER
    central = xgboost.train({**BINARY, "base_score": 0.5}, xgboost.DMatrix(train, labels), 10)
    early = {"key_metric": {"name": "auc", "mode": "max"}, "early_stop": {"patience": 8}, "federated_evaluation": True}
    journal = simulate(recipe("cancer", algorithm={"params": BINARY}, rounds=60, **early), [*SITES, "site-3"])
    manifest = journal.manifest(*journal.committed()[-1])
    assert manifest and manifest.phase == "validate" and manifest.round < 59
    assert {"auc", "logloss"} == set(manifest.metrics) and (manifest.metrics["auc"] or 0) > 0.9
    assert _auc(booster_of(journal)) >= 0.99 * _auc(central)
    for suffix in (".json", ".ubj"):
        export_model(journal, manifest.round, tmp_path / f"model{suffix}")
        loaded = xgboost.Booster(model_file=tmp_path / f"model{suffix}")
        assert _auc(loaded) == _auc(booster_of(journal))
    with pytest.raises(UserError, match=r"OUT: found .*model.onnx"):
        export_model(journal, manifest.round, tmp_path / "model.onnx")


# -- histograms --------------------------------------------------------------------------------------------------------
def test_trees_grown_together_are_those_of_all_rows_at_one_place(tmp_path: Path) -> None:
    params = {**BINARY, "tree_method": "hist"}
    algorithm = {"mode": "histogram", "params": params, "trees_per_round": 2}
    journal = simulate_on(recipe("whole_numbers", algorithm=algorithm, rounds=2), SITES, store=str(tmp_path))
    features, labels = whole_numbers("", [])
    central = xgboost.train({**params, "base_score": 0.5, "nthread": 1}, xgboost.DMatrix(features, labels), 4)
    ours, theirs = model_of(booster_of(journal))["trees"], model_of(central)["trees"]
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        for name in ("left_children", "right_children", "split_indices", "default_left"):
            assert a[name] == b[name]
        assert np.allclose(a["split_conditions"], b["split_conditions"], rtol=1e-4, atol=1e-6)
        assert np.allclose(a["sum_hessian"], b["sum_hessian"], rtol=1e-4)
    assert set(journal.committed()) == {(round, phase) for round in (0, 1) for phase in ("meet", "boost")}


@pytest.mark.parametrize("victim", [0, 1])
def test_a_site_that_is_killed_while_all_train_together_has_all_of_them_asked_again(
    tmp_path: Path, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that trains for one of them dies once; then the round is repeated from the last commit, to the same trees."""
    algorithm = {"mode": "histogram", "params": BINARY, "patience": 60}
    undisturbed = simulate(recipe("whole_numbers", algorithm=algorithm, rounds=2), SITES)
    begin, killed = together._Process.__enter__, []

    def kill_once(self: Any) -> Any:
        job = json.loads(self._job.read_text())
        if not killed and "server" in job and job["rank"] == victim and job["booster"]:
            killed.append(self._process.pid)
            os.kill(self._process.pid, signal.SIGKILL)
        return begin(self)

    monkeypatch.setattr(together._Process, "__enter__", kill_once)
    store = str(tmp_path)
    with pytest.raises(QuorumLost, match="training together failed"):
        simulate(recipe("whole_numbers", algorithm=algorithm, rounds=2), SITES, store=store, run="trees-1")
    journal = simulate(recipe("whole_numbers", algorithm=algorithm, rounds=2), SITES, store=store, run="trees-1")
    assert killed and model_of(booster_of(journal)) == model_of(booster_of(undisturbed))
    ours = psutil.Process().children(recursive=True)  # others may run beside this test
    assert not [p for p in ours if any("boosting.py" in argument for argument in p.cmdline())]


def test_a_site_that_is_killed_leaves_neither_processes_nor_rows_behind(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "rows").write_text("of patients")
    site = """
import sys
from pathlib import Path
from fedflow.local.together import _answers, _free_port, _Process
port = _free_port()
server = _Process(Path(sys.argv[1]), "serve", {"size": 2, "port": port, "patience": 60})
while not _answers(port):
    pass
print(server._process.pid, flush=True)
sys.stdin.read()
"""
    killed = subprocess.Popen(
        [sys.executable, "-c", site, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout
    server = psutil.Process(int(killed.stdout.readline()))
    killed.kill()
    killed.communicate()
    gone, _ = psutil.wait_procs([server], timeout=60)
    assert gone and not folder.exists()


# -- sites on several machines -----------------------------------------------------------------------------------------
def certified(folder: Path, *names: str, host: str = "localhost") -> dict[str, TLS]:
    """Name -> a certificate for `host`, all by one authority."""
    folder.mkdir()
    now, made = datetime.now(UTC), {}
    authority: tuple[Any, Any] | None = None
    for name in ("authority", *names):
        key, subject = (
            ec.generate_private_key(ec.SECP256R1()),
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
        )
        issuer, signer = authority or (subject, key)
        alternative = x509.SubjectAlternativeName([x509.DNSName(host)])
        made_of = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        dated = made_of.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        basic = dated.add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        signed = basic.add_extension(alternative, critical=False).sign(signer, hashes.SHA256())
        plain = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / f"{name}.key").write_bytes(key.private_bytes(*plain))
        (folder / f"{name}.key").chmod(0o600)
        (folder / f"{name}.pem").write_bytes(signed.public_bytes(Encoding.PEM))
        authority = authority or (subject, key)
        paths = {
            field: str(folder / path)
            for field, path in (("certificate", f"{name}.pem"), ("private_key", f"{name}.key"))
        }
        made[name] = TLS(authority=str(folder / "authority.pem"), **paths)
    return made


def meet(site: str, name: str, tracker: Tracker, tls: TLS | None, patience: float) -> bytes:
    """What a site with these certificates does in the phase `boost`."""
    config = SiteConfig(name=site, store="memory://", state="/nowhere", tls=tls)
    data = RowData(None, Numerics(), lambda function: None, config)
    features, labels = whole_numbers(site, SITES)
    ctx = RoundContext.at(0, "run", 0, "boost", site, 2, {})
    params = {**BINARY, "base_score": 0.5, "nthread": 1}
    rows = xgboost.DMatrix(features, labels)
    return data.boosted(rows, params, 2, None, Meeting(name, SITES, tracker, patience), ctx)


def test_between_machines_they_meet_with_certificates_and_strangers_do_not_come_in(tmp_path: Path) -> None:
    sites, strangers = certified(tmp_path / "sites", *SITES), certified(tmp_path / "strangers", "site-2")
    with socket.create_server(("", 0)) as free:
        tracker = Tracker(site="site-1", host="localhost", port=free.getsockname()[1])
    with ThreadPoolExecutor() as pool:
        leader = pool.submit(meet, "site-1", "secret", tracker, sites["site-1"], 60)
        for stranger in (strangers["site-2"], None):
            with pytest.raises(SiteError, match="found no site-1 to train together with"):
                meet("site-2", "secret", tracker, stranger, 1)
        other = pool.submit(meet, "site-2", "secret", tracker, sites["site-2"], 60)
        assert leader.result() == other.result()
    grown = json.loads(leader.result())["learner"]["gradient_booster"]["model"]["trees"]
    central = xgboost.train({**BINARY, "base_score": 0.5, "nthread": 1}, xgboost.DMatrix(*whole_numbers("", [])), 2)
    assert [t["split_indices"] for t in grown] == [t["split_indices"] for t in model_of(central)["trees"]]


def test_a_site_without_certificates_where_others_have_them_is_told_before_anything_is_trained() -> None:
    tracker = {"site": "site-1", "host": "localhost", "port": 9091}
    algorithm = XGBoost(mode="histogram", tracker=tracker)
    said = {s: {"token": s, "columns": ["a"], "tls": s == "site-1"} for s in SITES}
    updates = [Update(s, 0, 1, 1, 0.0, {"sent": {"bytes": _bytes(json.dumps(t).encode())}}) for s, t in said.items()]
    with pytest.raises(UpdateInvalid, match="tls: found 'no certificates', expected certificates, as site-1; give all"):
        algorithm.aggregate(updates, RoundContext.at(0, "run", 0, "meet", None, 2, {}))


def test_certificates_that_cannot_be_used_are_told_before_anybody_is_waited_for(tmp_path: Path) -> None:
    tracker = Tracker(site="site-1", host="localhost", port=9091)
    files, other = certified(tmp_path / "sites", *SITES).values(), TLS(**dict.fromkeys(TLS.model_fields, "/no/a.pem"))
    _, here, there = files
    told = "tls: found .*, expected PEM files that belong together, the key without a passphrase; correct the site's"
    for wrong in (other, here.model_copy(update={"private_key": there.private_key})):
        for site in SITES:
            with pytest.raises(ResolveError, match=told):
                meet(site, "secret", tracker, wrong, 1)
    key = Path(here.private_key)
    found = load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(found.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    with pytest.raises(ResolveError, match=told):  # and nobody is asked at the terminal
        meet("site-2", "secret", tracker, here, 1)
    key.chmod(0o604)
    with pytest.raises(ResolveError, match=r"tls.private_key: found .*, expected a file that not everybody may read"):
        meet("site-2", "secret", tracker, here, 1)


def test_who_waits_under_another_name_than_the_trackers_is_not_trusted(tmp_path: Path) -> None:
    """The right authority is not enough: each of the sites could be taken for the one that all go to."""
    files = certified(tmp_path / "sites", "site-1", "site-2", host="elsewhere.example.org")
    with socket.create_server(("localhost", 0)) as listener, ThreadPoolExecutor() as pool:
        leader = together.tls_context(files["site-1"], leads=True)
        address = listener.getsockname()
        place = together._Place("secret", ("localhost", address[1]), together.tls_context(files["site-2"], leads=False))
        met = pool.submit(together._connected, place)
        with pytest.raises(ssl.SSLError):
            leader.wrap_socket(listener.accept()[0], server_side=True)
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            met.result()


def test_a_meeting_on_one_machine_needs_no_short_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("deep" * 30)))
    place = together._Place("0" * 32, None, None)
    with together._listening(place) as listener, together._connected(place):
        assert listener.accept()[0]


# -- mistakes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "algorithm, told",
    [
        ({"params": {"seed": 1}}, "found seed, expected parameters of xgboost .*; set the recipe's seed"),
        ({"params": {"n_estimators": 9}}, "set rounds and trees_per_round"),
        ({"params": {"booster": "dart"}}, "booster: found 'dart', expected 'gbtree'"),
        ({"mode": "histogram", "params": {"tree_method": "exact"}}, "tree_method: found 'exact', expected 'hist'"),
        ({"mode": "vertical"}, "algorithm.*'bagging' or 'histogram'"),
    ],
)
def test_parameters_that_are_not_to_be_had(algorithm: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe(algorithm=algorithm)


def test_no_module_evaluates_trees() -> None:
    with pytest.raises(RecipeError, match="evaluation: found 'a:B', expected none with algorithm xgboost"):
        recipe(evaluation="a:B")


X, Y = SIX[0][:40], (SIX[1][:40] > 2).astype(int)
CATEGORIES = pandas.DataFrame(X, columns=list("abcdefgh")).assign(colour=pandas.Categorical(["red", "blue"] * 20))


@pytest.mark.parametrize(
    "data, told",
    [
        ((X[:0], Y[:0]), "workload: found 'no rows', expected some"),
        ((X, Y[:9]), "found '40 rows and 9 labels', expected as many of each"),
        ([X, Y], r"workload: found 'list', expected \(features, labels\)"),
        ({"test": (X, Y)}, r"workload: found \['test'\], expected a mapping with 'train'"),
        ((X, Y + 7), "label must be in"),
        ((np.array([["a"] * 8] * 40), Y), "workload: found 'features of type <U1', expected numbers"),
        ((X, ["a"] * 40), "xgboost: "),
        (
            (CATEGORIES, Y),
            r"workload: found \"categorical columns \['colour'\]\", expected columns of numbers; encode them",
        ),
        (xgboost.DMatrix(X, Y, feature_types=["q"] * 7 + ["c"]), r"categorical columns \['7'\]"),
        ((X[:, :5], Y), r"columns: found .*\['5', '6', '7'\] fewer"),
    ],
)
def test_a_site_whose_rows_do_not_fit_is_excluded(data: Any, told: str) -> None:
    ran = recipe(algorithm={"params": BINARY}, rounds=1, quorum=1)
    journal = simulate(ran, {"site-1": (X, Y), "site-2": data})
    manifest = journal.manifest(0, "boost")
    assert manifest and list(manifest.contributors) == ["site-1"]
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(manifest.excluded["site-2"])


def test_features_may_be_a_tensor_or_lists() -> None:
    ran = recipe(algorithm={"params": BINARY}, rounds=1)
    others = [
        simulate(ran, {"site-1": (X, Y), "site-2": (made(X), Y)}) for made in (torch.as_tensor, np.ndarray.tolist)
    ]
    expected = model_of(booster_of(simulate(ran, dict.fromkeys(SITES, (X, Y)))))
    assert [model_of(booster_of(other)) for other in others] == [expected] * 2


def test_columns_that_differ_end_a_histogram_round_before_anything_is_trained() -> None:
    with pytest.raises(QuorumLost, match=r"columns: found .*\['5', '6', '7'\] fewer"):
        simulate(recipe(algorithm={"mode": "histogram", "params": BINARY}), {"a": (X, Y), "b": (X[:, :5], Y)})


def test_a_tracker_that_is_not_asked_is_refused_before_anything_is_done() -> None:
    tracker = {"site": "site-3", "host": "localhost", "port": 9091}
    ran = recipe("whole_numbers", algorithm={"mode": "histogram", "params": BINARY, "tracker": tracker})
    with pytest.raises(
        UserError, match=r"algorithm.tracker.site: found 'site-3', expected one of \['site-1', 'site-2'\]"
    ):
        simulate(ran, SITES)
    named = ran.model_copy(update={"schedule": Everyone(sites=SITES)})
    with pytest.raises(UserError, match=r"algorithm.tracker.site: found 'site-3', expected one of"):
        simulate(named, [*SITES, "site-3"])


def test_what_is_no_booster_is_refused() -> None:
    algorithm, good = XGBoost(params=BINARY), xgboost.train(BINARY, xgboost.DMatrix(X, Y), 1)
    text = bytes(good.save_raw("json")).decode()
    for bad in (
        "{}",
        "[]",
        "no json",
        text.replace('"left_children":[1', '"left_children":[0'),
        text.replace('"iteration_indptr":[0,1]', '"iteration_indptr":[0,2]'),
    ):
        assert bad != text
        with pytest.raises(UpdateInvalid, match="not a booster of 1 iterations"):
            algorithm.decode(
                Update("a", 0, 1, 1, 0.0, {"sent": {"bytes": _bytes(bad.encode())}}), XGBoostState(), "boost"
            )


def test_a_backend_on_which_sites_are_done_one_after_the_other_is_refused() -> None:
    with pytest.raises(UserError, match="backend: found 'debug', expected 'processes'"):
        simulate_on(recipe(algorithm={"mode": "histogram"}), SITES, backend="debug")
