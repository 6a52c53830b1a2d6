"""k-means and support vector machines over sites: by their formulas, and from a recipe."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.svm import SVC

from fedflow.engine import simulate
from fedflow.local.kmeans import Centres, KMeansWorkload, MiniBatchKMeans
from fedflow.local.model import model_groups
from fedflow.local.svm import SupportVectors, SVMWorkload, UnionOfVectors, machine
from fedflow.recipe import Recipe
from fedflow.store.tensors import read_tensors
from fedflow.types import RoundContext, Update
from tests.builders import blobs, head

SERVER = RoundContext("run", 1, "train", None, num_sites=2, seed=3)


def sent(site: str, **tensors: torch.Tensor) -> Update:
    return Update(site, 1, examples=5, steps=1, lr_sum=0.0, tensors={"params": tensors})


def test_centres_move_by_the_examples_they_stand_for() -> None:
    """Cluster 0: 4 at 1, then 2 at 3 and 2 at 5: (4·1 + 2·3 + 2·5) / 8 = 2.5; cluster 1: nothing new: it stays."""
    algorithm = MiniBatchKMeans()
    state = algorithm.init(model_groups(Centres(2, 1)))
    state = type(state)({"centres": torch.tensor([[1.0], [7.0]]).double(), "counts": torch.tensor([4.0, 3.0]).double()})
    updates = [
        sent("a", centres=torch.tensor([[3.0], [0.0]]).double(), counts=torch.tensor([2.0, 0.0]).double()),
        sent("b", centres=torch.tensor([[5.0], [0.0]]).double(), counts=torch.tensor([2.0, 0.0]).double()),
    ]
    after = algorithm.server_update(state, algorithm.aggregate(updates, SERVER), SERVER)
    assert after.params["centres"].tolist() == [[2.5], [7.0]] and after.params["counts"].tolist() == [8.0, 3.0]


def clusters(site: str) -> KMeansWorkload:
    inputs, _ = blobs(60, seed=int(site[-1]))
    return KMeansWorkload(3 * inputs.double().numpy())


def machines(site: str) -> SVMWorkload:
    inputs, classes = blobs(60, seed=int(site[-1]))
    return SVMWorkload(inputs.double().numpy(), (classes == 0).double().numpy(), kernel="linear")


def recipe(model: str, args: dict[str, int], algorithm: str, workload: str, **options: str) -> Recipe:
    fields = {"model": {"path": f"fedflow.local.{model}", "args": args}, "workload": f"{__name__}:{workload}"}
    return Recipe.load(
        {"name": "r", "rounds": 3, **fields, "algorithm": {"kind": f"fedflow.local.{algorithm}", **options}}
    )


def test_three_centres_are_found() -> None:
    """The blobs lie around (2,0,0,1), (0,2,0,−1), (0,0,2,0), times three, with a spread of three."""
    journal = simulate(
        recipe("kmeans:Centres", {"clusters": 3, "features": 4}, "kmeans:MiniBatchKMeans", "clusters"),
        ["site-1", "site-2"],
    )
    found = read_tensors(journal.store, head(journal).model["params"])
    centres = 3 * np.array([[2.0, 0, 0, 1], [0, 2, 0, -1], [0, 0, 2, 0]])
    distances = np.linalg.norm(found["centres"].numpy()[:, None] - centres[None], axis=2)
    assert sorted(distances.argmin(axis=1)) == [0, 1, 2]
    assert found["counts"].sum() == 3 + 2 * 120  # one each from round 0, then all examples in two rounds


def test_the_union_of_support_vectors_is_nearly_the_machine_over_all_data() -> None:
    journal = simulate(
        recipe("svm:SupportVectors", {"features": 4, "most": 120}, "svm:UnionOfVectors", "machines", kernel="linear"),
        ["site-1", "site-2"],
    )
    found = {n: t.numpy() for n, t in read_tensors(journal.store, head(journal).model["params"]).items()}
    data = [blobs(60, seed=n) for n in (1, 2)]
    inputs = np.concatenate([x.double().numpy() for x, _ in data])
    targets = np.concatenate([(y == 0).double().numpy() for _, y in data])
    pooled = SVC(kernel="linear").fit(inputs, targets)
    test, _ = blobs(300, seed=5)
    agree = (machine(found, "linear").predict(test.double().numpy()) == pooled.predict(test.double().numpy())).mean()
    assert agree > 0.95
    vectors = found["vectors"][: int(found["used"][0])]
    assert all((np.abs(inputs - vector).max(axis=1) == 0).any() for vector in vectors), "vectors are rows of the data"


def test_too_little_room_is_told() -> None:
    import pytest

    from fedflow.errors import QuorumLost

    with pytest.raises(QuorumLost, match="model.args.most: found 2, expected room for"):
        simulate(recipe("svm:SupportVectors", {"features": 4, "most": 2}, "svm:UnionOfVectors", "machines"), ["site-1"])


def test_they_come_back_from_json() -> None:
    again = Recipe.model_validate_json(
        recipe("svm:SupportVectors", {"features": 4, "most": 9}, "svm:UnionOfVectors", "machines").model_dump_json()
    )
    assert again.algorithm == UnionOfVectors() and isinstance(SupportVectors(4, 9), torch.nn.Module)
