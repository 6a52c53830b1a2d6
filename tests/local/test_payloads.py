"""What leaves a site: the model's tensors, by name; what a site remembers lies at the site and nowhere else."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from sklearn.linear_model import SGDClassifier
from torch.utils.data import DataLoader, TensorDataset

from fedflow.engine import simulate
from fedflow.local import FunctionWorkload, ScriptWorkload
from fedflow.local.arrays import ArrayWorkload
from fedflow.local.model import build_model, model_groups
from fedflow.local.sklearn import LinearWorkload
from fedflow.recipe import Recipe
from fedflow.store.objects import ObjectStore
from fedflow.store.records import UpdateManifest
from tests.builders import Blobs, blobs
from tests.local.test_adapters import keras_workload, least_squares
from tests.local.test_clusters_and_machines import clusters, machines
from tests.local.test_preserved import train
from tests.local.test_uninterrupted import SCRIPT, lightning
from tests.local.test_with_algorithms import hugging_face

os.environ.setdefault("KERAS_BACKEND", "torch")
INPUTS, TARGETS = blobs(22, seed=1)


def linear() -> LinearWorkload:
    return LinearWorkload(SGDClassifier(), INPUTS.double().numpy(), TARGETS.numpy(), classes=[0, 1, 2])


def arrays() -> ArrayWorkload:
    inputs = np.random.default_rng(0).normal(size=(30, 2))
    return ArrayWorkload(least_squares, (inputs, inputs @ np.array([1.0, -2.0])), examples=30)


TINY = {"path": "tests.builders:Tiny"}
KEEPING = {"kind": "diloco", "local_steps_per_round": 2}
FORMS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    # name: (model, workload from a folder, an algorithm that keeps as much at the site as this kind of training can)
    "torch": (TINY, lambda folder: Blobs("site-1"), KEEPING),
    "function": (
        TINY,
        lambda folder: FunctionWorkload(train, DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4, shuffle=True)),
        KEEPING,
    ),
    "script": (TINY, lambda folder: ScriptWorkload([sys.executable, "-u", str(SCRIPT)]), KEEPING),
    "lightning": ({"path": "tests.local.test_uninterrupted:module"}, lambda folder: lightning(), KEEPING),
    "hugging face": (
        {"path": "tests.local.test_adapters:tiny_transformer"},
        lambda folder: hugging_face("site-1", folder),
        KEEPING,
    ),
    "lora": ({"path": "tests.local.test_adapters:tiny_lora"}, lambda folder: hugging_face("site-1", folder), KEEPING),
    "keras": (
        {"path": "tests.local.test_adapters:keras_with_norm"},
        lambda folder: keras_workload(),
        {"kind": "scaffold", "apply": "after_step"},
    ),
    "numpy": ({"path": "fedflow.local.arrays:ArrayModel", "args": {"w": [2]}}, lambda folder: arrays(), {}),
    "scikit-learn": (
        {"path": "fedflow.local.sklearn:LinearModel", "args": {"features": 4, "outputs": 3}},
        lambda folder: linear(),
        {},
    ),
    "k-means": (
        {"path": "fedflow.local.kmeans:Centres", "args": {"clusters": 3, "features": 4}},
        lambda folder: clusters("site-1"),
        {"kind": "fedflow.local.kmeans:MiniBatchKMeans"},
    ),
    "svm": (
        {"path": "fedflow.local.svm:SupportVectors", "args": {"features": 4, "most": 120}},
        lambda folder: machines("site-1"),
        {"kind": "fedflow.local.svm:UnionOfVectors", "kernel": "linear"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_update_holds_the_models_tensors_and_the_shared_store_nothing_else(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    model, make, algorithm = FORMS[form]
    recipe = Recipe.load(
        {
            "name": "r",
            "rounds": 1 if form == "script" else 2,
            "model": model,
            "workload": f"{__name__}:linear",
            "algorithm": algorithm or {"kind": "fedavg"},
            "training": {"batch_size": 8},
        }
    )
    journal = simulate(recipe, {"site-1": make(tmp_path)}, store=str(tmp_path / "store"))
    groups = model_groups(build_model(model["path"], model.get("args", {})))
    expected = {"params": groups["params"].keys(), "buffers": groups["buffers"].keys()}
    if algorithm.get("kind") == "scaffold":
        expected["control"] = expected["params"]
    store = journal.store
    updates = [k for k in store.list() if "sites/" in k and k.endswith(".json")]
    assert len(updates) == recipe.rounds
    for key in updates:
        update = UpdateManifest.from_bytes(store.get(key))
        sent = {g: safetensors.torch.load(store.get(ref.key)).keys() for g, ref in update.groups.items()}
        assert {g: names for g, names in sent.items() if names} == {g: names for g, names in expected.items() if names}
    own = {name for tensors in groups.values() for name in tensors}
    for key in store.list():
        data = store.get(key)
        assert b"fingerprint" not in data and "/state/" not in key, "the training's state is in the shared store"
        if key.endswith(".safetensors"):
            assert safetensors.torch.load(data).keys() <= own, key
    kept = [k for k in ObjectStore(f"{store.url}-states/site-1").list() if "/state/" in k]
    assert bool(kept) == (algorithm.get("kind") in ("diloco", "scaffold"))
